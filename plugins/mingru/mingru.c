/*
 * minGRU (Feng et al. 2024, arXiv 2410.01201, §3.1) as a stage block in plain C11: a recurrence whose gate looks at the
 * input alone. A layer of width D with E = expand * D channels is
 *
 *     u   = RMSNorm(x) * gain                                   (D)
 *     z_t = sigmoid(W_z u_t + b_z)                              (E)
 *     g_t = W_h u_t + b_h                                       (E)
 *     h_t = (1 - z_t) h_{t-1} + z_t g_t,   h_{-1} = 0           (E)
 *     y_t = x_t + W_o h_t                                       (D)
 *
 * It shows a whole plugin: configuration, parameters, forward, backward and decoding. `make` builds it. Threads are left
 * out to keep it short; the matrix products are written so that a compiler vectorises them.
 */
#include "mblm_plugin.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EPS 1e-5f
#define MAX_EXPAND 16

static const mblm_host *host;

static mblm_status fail(mblm_status status, const char *where, const char *message) {
    mblm_text w = {where, strlen(where)}, m = {message, strlen(message)};
    host->set_error(host->context, w, m);
    return status;
}

static mblm_status out_of_memory(void) { return fail(MBLM_FAILED, "", "out of memory"); }

/* ---- Configuration: {"expand": 1 to 16, "pos_emb_type": null | "fixed" | "rope"}, both optional. ---- */

typedef struct {
    uint64_t expand;
    uint32_t positions;
} config;

typedef struct {
    const char *at, *end;
} reader;

static void skip_space(reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\t' || *r->at == '\r')) r->at++;
}

static int take(reader *r, char c) {
    skip_space(r);
    if (r->at == r->end || *r->at != c) return 0;
    r->at++;
    return 1;
}

/* A string without escapes, as names are. */
static int take_string(reader *r, const char **start, size_t *len) {
    if (!take(r, '"')) return 0;
    *start = r->at;
    while (r->at < r->end && *r->at != '"' && *r->at != '\\') r->at++;
    *len = (size_t)(r->at - *start);
    return take(r, '"');
}

static int take_word(reader *r, const char *word) {
    size_t len = strlen(word);
    skip_space(r);
    if ((size_t)(r->end - r->at) < len || memcmp(r->at, word, len) != 0) return 0;
    r->at += len;
    return 1;
}

static int equals(const char *start, size_t len, const char *word) {
    return len == strlen(word) && memcmp(start, word, len) == 0;
}

static mblm_status read_expand(reader *r, config *c) {
    skip_space(r);
    uint64_t value = 0;
    const char *start = r->at;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9' && r->at - start < 4) value = value * 10 + (uint64_t)(*r->at++ - '0');
    int more = r->at < r->end && strchr("0123456789.eE", *r->at) != NULL;
    if (r->at == start || more || value < 1 || value > MAX_EXPAND)
        return fail(MBLM_INVALID, "expand", "expected an integer from 1 to 16");
    c->expand = value;
    return MBLM_OK;
}

static mblm_status read_positions(reader *r, config *c) {
    const char *start = "";
    size_t len = 0;
    if (take_word(r, "null")) {
        c->positions = MBLM_POS_NONE;
    } else if (take_string(r, &start, &len) && equals(start, len, "fixed")) {
        c->positions = MBLM_POS_FIXED;
    } else if (equals(start, len, "rope")) {
        c->positions = MBLM_POS_ROPE;
    } else {
        return fail(MBLM_INVALID, "pos_emb_type", "expected null, \"fixed\" or \"rope\"");
    }
    return MBLM_OK;
}

static mblm_status unknown_field(const char *name, size_t len) {
    char where[65];
    if (len > sizeof where - 1) len = sizeof where - 1;
    memcpy(where, name, len);
    where[len] = 0;
    return fail(MBLM_INVALID, where, "unknown field; expected one of `expand`, `pos_emb_type`");
}

static mblm_status read_config(mblm_text text, config *c) {
    reader r = {text.data, text.data + text.len};
    *c = (config){.expand = 1, .positions = MBLM_POS_NONE};
    if (text.len == 0 || !take(&r, '{')) return fail(MBLM_INVALID, "", "expected an object");
    int first = 1;
    while (!take(&r, '}')) {
        const char *name;
        size_t len;
        if ((!first && !take(&r, ',')) || !take_string(&r, &name, &len) || !take(&r, ':'))
            return fail(MBLM_INVALID, "", "not valid JSON");
        first = 0;
        mblm_status status = equals(name, len, "expand")         ? read_expand(&r, c)
                             : equals(name, len, "pos_emb_type") ? read_positions(&r, c)
                                                                 : unknown_field(name, len);
        if (status != MBLM_OK) return status;
    }
    skip_space(&r);
    return r.at == r.end ? MBLM_OK : fail(MBLM_INVALID, "", "not valid JSON: text after the object");
}

/* ---- The model. ---- */

enum { NORM, W_Z, B_Z, W_H, B_H, W_O, PER_LAYER };
static const char *const NAMES[PER_LAYER] = {"norm.weight",   "gate.weight",   "gate.bias",
                                             "hidden.weight", "hidden.bias", "out.weight"};
#define NAME_SIZE 48

struct mblm_instance {
    size_t dim, inner, layers;
    char (*names)[NAME_SIZE];
};

/* Per layer and row: x, u (dim each), z, g, h (inner each). Of a sequence, the h of the row before is h_{t-1}. */
struct mblm_tape {
    float *floats;
};

/* h of every layer and sequence. */
struct mblm_state {
    size_t batch, len;
    float *h;
};

static const float *const *layer_params(const mblm_params *p, size_t layer) { return p->values + layer * PER_LAYER; }

/* out (rows x n) += a (rows x k) b (n x k)^T */
static void product_nt(float *restrict out, const float *restrict a, const float *restrict b, size_t rows, size_t n, size_t k) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < n; j++) {
            const float *restrict x = a + i * k, *restrict w = b + j * k;
            float sums[16] = {0};
            size_t c = 0;
            for (; c + 16 <= k; c += 16)
                for (size_t l = 0; l < 16; l++) sums[l] += x[c + l] * w[c + l];
            float sum = 0;
            for (size_t l = 0; l < 16; l++) sum += sums[l];
            for (; c < k; c++) sum += x[c] * w[c];
            out[i * n + j] += sum;
        }
}

/* y (k) += s[0] a[0] + s[1] a[1] + … for `count` rows of a, k apart: four at a time, so that y is read and written less. */
static void add_rows(float *restrict y, const float *restrict s, size_t apart, const float *restrict a, size_t count, size_t k) {
    size_t r = 0;
    for (; r + 4 <= count; r += 4) {
        const float s0 = s[r * apart], s1 = s[(r + 1) * apart], s2 = s[(r + 2) * apart], s3 = s[(r + 3) * apart];
        const float *restrict a0 = a + r * k, *restrict a1 = a0 + k, *restrict a2 = a1 + k, *restrict a3 = a2 + k;
        for (size_t c = 0; c < k; c++) y[c] += s0 * a0[c] + s1 * a1[c] + s2 * a2[c] + s3 * a3[c];
    }
    for (; r < count; r++)
        for (size_t c = 0; c < k; c++) y[c] += s[r * apart] * a[r * k + c];
}

/* out (rows x k) += a (rows x n) b (n x k) */
static void product_nn(float *out, const float *a, const float *b, size_t rows, size_t n, size_t k) {
    for (size_t i = 0; i < rows; i++) add_rows(out + i * k, a + i * n, 1, b, n, k);
}

/* out (n x k) += a (rows x n)^T b (rows x k), in blocks of rows that stay in the cache. */
static void product_tn(float *out, const float *a, const float *b, size_t rows, size_t n, size_t k) {
    const size_t block = 32;
    for (size_t i = 0; i < rows; i += block)
        for (size_t j = 0; j < n; j++)
            add_rows(out + j * k, a + i * n + j, n, b + i * k, rows - i < block ? rows - i : block, k);
}

static float inverse_rms(const float *x, size_t dim) {
    float sum = 0;
    for (size_t c = 0; c < dim; c++) sum += x[c] * x[c];
    return 1.0f / sqrtf(sum / (float)dim + EPS);
}

/* The parts of a row of one layer: u from x, then z and g. */
static void gates(const mblm_instance *m, const float *const *w, const float *x, float *u, float *z, float *g, size_t rows) {
    for (size_t r = 0; r < rows; r++) {
        float scale = inverse_rms(x + r * m->dim, m->dim);
        for (size_t c = 0; c < m->dim; c++) u[r * m->dim + c] = x[r * m->dim + c] * scale * w[NORM][c];
        memcpy(z + r * m->inner, w[B_Z], m->inner * sizeof(float));
        memcpy(g + r * m->inner, w[B_H], m->inner * sizeof(float));
    }
    product_nt(z, u, w[W_Z], rows, m->inner, m->dim);
    product_nt(g, u, w[W_H], rows, m->inner, m->dim);
    for (size_t i = 0; i < rows * m->inner; i++) z[i] = 1.0f / (1.0f + expf(-z[i]));
}

/* One step of the recurrence. before may be null: zero. */
static void recur(const float *z, const float *g, const float *before, float *h, size_t inner) {
    for (size_t c = 0; c < inner; c++) h[c] = (before ? (1.0f - z[c]) * before[c] : 0.0f) + z[c] * g[c];
}

/* Floats of a layer's tape. */
static size_t tape_len(const mblm_instance *m, size_t rows) { return rows * (2 * m->dim + 3 * m->inner); }

static mblm_status forward(mblm_instance *m, const mblm_params *params, const mblm_pass *pass, const float *x, float *y,
                           mblm_tape **tape) {
    size_t rows = pass->batch * pass->seq, kept = tape ? m->layers : 1;
    float *floats = malloc(kept * tape_len(m, rows) * sizeof(float));
    mblm_tape *made = tape ? malloc(sizeof *made) : NULL;
    if (!floats || (tape && !made)) {
        free(floats);
        free(made);
        return out_of_memory();
    }
    memcpy(y, x, rows * m->dim * sizeof(float));
    for (size_t l = 0; l < m->layers; l++) {
        const float *const *w = layer_params(params, l);
        float *in = floats + (tape ? l * tape_len(m, rows) : 0), *u = in + rows * m->dim;
        float *z = u + rows * m->dim, *g = z + rows * m->inner, *h = g + rows * m->inner;
        memcpy(in, y, rows * m->dim * sizeof(float));
        gates(m, w, in, u, z, g, rows);
        for (size_t r = 0; r < rows; r++) {
            size_t at = r * m->inner;
            recur(z + at, g + at, r % pass->seq ? h + at - m->inner : NULL, h + at, m->inner);
        }
        product_nt(y, h, w[W_O], rows, m->dim, m->inner);
    }
    if (!tape) {
        free(floats);
        return MBLM_OK;
    }
    made->floats = floats;
    *tape = made;
    return MBLM_OK;
}

/* dx = dy + the gradient through RMSNorm of du; dgain += …  (x_c s with s = (mean x² + eps)^-1/2) */
static void norm_backward(const float *x, const float *gain, const float *du, float *dx, float *dgain, size_t dim) {
    float s = inverse_rms(x, dim), dot = 0;
    for (size_t c = 0; c < dim; c++) {
        dgain[c] += du[c] * x[c] * s;
        dot += du[c] * gain[c] * x[c];
    }
    float pull = dot * s * s * s / (float)dim;
    for (size_t c = 0; c < dim; c++) dx[c] += du[c] * gain[c] * s - x[c] * pull;
}

/* dz and dg (before the gates' nonlinearity) from dh, the gradient of every h from outside; dh is overwritten. */
static void recur_backward(const float *z, const float *g, const float *h, float *dh, float *dz, float *dg, size_t seq, size_t inner) {
    for (size_t t = seq; t-- > 0;) {
        size_t at = t * inner;
        for (size_t c = 0; c < inner; c++) {
            float d = dh[at + c], zt = z[at + c], before = t ? h[at - inner + c] : 0.0f;
            if (t) dh[at - inner + c] += d * (1.0f - zt);
            dg[at + c] = d * zt;
            dz[at + c] = d * (g[at + c] - before) * zt * (1.0f - zt);
        }
    }
}

static mblm_status backward(mblm_instance *m, const mblm_params *params, const mblm_pass *pass, mblm_tape *tape, const float *x,
                            const float *dy, float *dx, float *const *dparams) {
    (void)x; /* the tape has it */
    size_t rows = pass->batch * pass->seq, wide = rows * m->inner;
    float *scratch = malloc((3 * wide + rows * m->dim) * sizeof(float));
    if (!scratch) return out_of_memory();
    float *dh = scratch, *dz = dh + wide, *dg = dz + wide, *du = dg + wide;
    memcpy(dx, dy, rows * m->dim * sizeof(float));
    for (size_t l = m->layers; l-- > 0;) {
        const float *const *w = layer_params(params, l);
        float *const *d = dparams + l * PER_LAYER;
        const float *in = tape->floats + l * tape_len(m, rows), *u = in + rows * m->dim;
        const float *z = u + rows * m->dim, *g = z + wide, *h = g + wide;
        memset(dh, 0, wide * sizeof(float));
        product_nn(dh, dx, w[W_O], rows, m->dim, m->inner);
        product_tn(d[W_O], dx, h, rows, m->dim, m->inner);
        for (size_t b = 0; b < pass->batch; b++) {
            size_t at = b * pass->seq * m->inner;
            recur_backward(z + at, g + at, h + at, dh + at, dz + at, dg + at, pass->seq, m->inner);
        }
        product_tn(d[W_Z], dz, u, rows, m->inner, m->dim);
        product_tn(d[W_H], dg, u, rows, m->inner, m->dim);
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < m->inner; c++) {
                d[B_Z][c] += dz[r * m->inner + c];
                d[B_H][c] += dg[r * m->inner + c];
            }
        memset(du, 0, rows * m->dim * sizeof(float));
        product_nn(du, dz, w[W_Z], rows, m->inner, m->dim);
        product_nn(du, dg, w[W_H], rows, m->inner, m->dim);
        for (size_t r = 0; r < rows; r++)
            norm_backward(in + r * m->dim, w[NORM], du + r * m->dim, dx + r * m->dim, d[NORM], m->dim);
    }
    free(scratch);
    return MBLM_OK;
}

static void tape_free(mblm_tape *tape) {
    free(tape->floats);
    free(tape);
}

/* ---- Instances. ---- */

static mblm_status check(const mblm_block *block, mblm_text text, uint64_t dim, uint32_t *positions) {
    (void)block, (void)dim; /* any width will do */
    config c;
    mblm_status status = read_config(text, &c);
    if (status == MBLM_OK) *positions = c.positions;
    return status;
}

static mblm_status create(const mblm_block *block, mblm_text text, mblm_text place, uint64_t dim, uint64_t num_layers,
                          mblm_instance_info *info, mblm_instance **instance) {
    (void)block, (void)place; /* nothing here is random */
    config c;
    mblm_status status = read_config(text, &c);
    if (status != MBLM_OK) return status;
    if (dim == 0 || num_layers == 0) return fail(MBLM_INVALID, "", "expected a positive width and number of layers");
    mblm_instance *m = calloc(1, sizeof *m);
    if (!m) return out_of_memory();
    *m = (mblm_instance){.dim = dim, .inner = c.expand * dim, .layers = num_layers};
    m->names = calloc(num_layers * PER_LAYER, sizeof *m->names);
    if (!m->names) {
        free(m);
        return out_of_memory();
    }
    for (size_t i = 0; i < num_layers * PER_LAYER; i++)
        snprintf(m->names[i], NAME_SIZE, "layers.%zu.%s", i / PER_LAYER, NAMES[i % PER_LAYER]);
    info->num_params = num_layers * PER_LAYER;
    *instance = m;
    return MBLM_OK;
}

static void destroy(mblm_instance *m) {
    free(m->names);
    free(m);
}

static mblm_status param(const mblm_instance *m, uint64_t index, mblm_param_info *info) {
    if (index >= m->layers * PER_LAYER) return fail(MBLM_INVALID, "", "there is no such parameter");
    int which = (int)(index % PER_LAYER);
    uint64_t rows = which == W_O ? m->dim : which == NORM ? m->dim : m->inner, columns = which == W_O ? m->inner : m->dim;
    info->name = (mblm_text){m->names[index], strlen(m->names[index])};
    info->num_dims = which == W_Z || which == W_H || which == W_O ? 2 : 1;
    info->dims[0] = rows;
    info->dims[1] = columns;
    info->init = which == NORM ? MBLM_INIT_CONST : MBLM_INIT_UNIFORM;
    info->a = which == NORM ? 1.0f : 1.0f / sqrtf((float)(which == W_O ? m->inner : m->dim));
    return MBLM_OK;
}

static mblm_status cost(const mblm_instance *m, uint64_t seq_len, double *flops, double *activations) {
    (void)seq_len; /* the cost of a position does not grow with the sequence */
    double d = (double)m->dim, e = (double)m->inner, layers = (double)m->layers;
    *flops = layers * (6 * d * e + 5 * d + 9 * e);
    *activations = layers * (2 * d + 3 * e);
    return MBLM_OK;
}

/* ---- Decoding: h is all there is to keep. ---- */

static mblm_status state_new(size_t batch, size_t len, mblm_state **out) {
    mblm_state *s = malloc(sizeof *s);
    if (!s) return out_of_memory();
    *s = (mblm_state){.batch = batch, .len = len, .h = calloc(len, sizeof(float))};
    if (!s->h) {
        free(s);
        return out_of_memory();
    }
    *out = s;
    return MBLM_OK;
}

static mblm_status state_create(mblm_instance *m, const mblm_params *params, uint64_t batch, mblm_state **out) {
    (void)params;
    if (batch == 0) return fail(MBLM_INVALID, "", "expected at least one sequence");
    return state_new(batch, m->layers * batch * m->inner, out);
}

static mblm_status state_reset(mblm_state *s) {
    memset(s->h, 0, s->len * sizeof(float));
    return MBLM_OK;
}

static mblm_status state_clone(const mblm_state *s, mblm_state **out) {
    mblm_status status = state_new(s->batch, s->len, out);
    if (status == MBLM_OK) memcpy((*out)->h, s->h, s->len * sizeof(float));
    return status;
}

static const char SAVED[8] = "minGRU 1";

static mblm_status state_save(const mblm_state *s, uint8_t *buffer, uint64_t *len) {
    uint64_t room = *len, batch = s->batch;
    *len = sizeof SAVED + sizeof batch + s->len * sizeof(float);
    if (!buffer) return MBLM_OK;
    if (room < *len) return fail(MBLM_INVALID, "", "the buffer is too small for the state");
    memcpy(buffer, SAVED, sizeof SAVED);
    memcpy(buffer + sizeof SAVED, &batch, sizeof batch);
    memcpy(buffer + sizeof SAVED + sizeof batch, s->h, s->len * sizeof(float));
    return MBLM_OK;
}

static mblm_status state_load(mblm_state *s, const uint8_t *bytes, uint64_t len) {
    uint64_t batch = s->batch, head = sizeof SAVED + sizeof batch;
    if (len != head + s->len * sizeof(float) || memcmp(bytes, SAVED, sizeof SAVED) != 0 ||
        memcmp(bytes + sizeof SAVED, &batch, sizeof batch) != 0)
        return fail(MBLM_INVALID, "", "not a saved state of such an instance and batch");
    memcpy(s->h, bytes + head, s->len * sizeof(float));
    return MBLM_OK;
}

static void state_free(mblm_state *s) {
    free(s->h);
    free(s);
}

static mblm_status step(mblm_instance *m, const mblm_params *params, mblm_state *s, const float *x, float *y) {
    size_t wide = s->batch * m->inner;
    float *scratch = malloc((2 * wide + 2 * s->batch * m->dim) * sizeof(float));
    if (!scratch) return out_of_memory();
    float *z = scratch, *g = z + wide, *u = g + wide, *in = u + s->batch * m->dim;
    memcpy(y, x, s->batch * m->dim * sizeof(float));
    for (size_t l = 0; l < m->layers; l++) {
        const float *const *w = layer_params(params, l);
        float *h = s->h + l * wide;
        memcpy(in, y, s->batch * m->dim * sizeof(float));
        gates(m, w, in, u, z, g, s->batch);
        recur(z, g, h, h, wide);
        product_nt(y, h, w[W_O], s->batch, m->dim, m->inner);
    }
    free(scratch);
    return MBLM_OK;
}

/* ---- The tables. ---- */

static const mblm_block BLOCK = {
    .struct_size = sizeof(mblm_block),
    .flags = MBLM_BACKWARD | MBLM_STEP | MBLM_CONCURRENT | MBLM_DETERMINISTIC,
    .block_type = MBLM_TEXT("mingru"),
    .version = MBLM_TEXT("1.0.0"),
    .about = MBLM_TEXT("Gated linear recurrence (minGRU, Feng et al. 2024), in C"),
    .schema = MBLM_TEXT("{\"type\": \"object\", \"additionalProperties\": false, \"properties\": {"
                        "\"expand\": {\"type\": \"integer\", \"minimum\": 1, \"maximum\": 16, \"default\": 1, "
                        "\"description\": \"Channels of the recurrence as a multiple of the stage's width.\"}, "
                        "\"pos_emb_type\": {\"enum\": [null, \"fixed\", \"rope\"], \"default\": null, "
                        "\"description\": \"Position embeddings of the stage.\"}}}"),
    .check = check,
    .create = create,
    .destroy = destroy,
    .param = param,
    .forward = forward,
    .backward = backward,
    .tape_free = tape_free,
    .state_create = state_create,
    .state_reset = state_reset,
    .state_clone = state_clone,
    .state_save = state_save,
    .state_load = state_load,
    .state_free = state_free,
    .step = step,
    .cost = cost,
};

static const mblm_block *const BLOCKS[] = {&BLOCK};

static mblm_status init(const mblm_host *h) {
    host = h;
    return MBLM_OK;
}

static const mblm_plugin PLUGIN = {
    .magic = MBLM_PLUGIN_MAGIC,
    .struct_size = sizeof(mblm_plugin),
    .major = MBLM_PLUGIN_MAJOR,
    .minor = 0,
    .name = MBLM_TEXT("mingru"),
    .version = MBLM_TEXT("1.0.0"),
    .num_blocks = 1,
    .blocks = BLOCKS,
    .init = init,
};

const mblm_plugin *mblm_plugin_entry(void) { return &PLUGIN; }
