/*
 * A small block, y = x * scale + a decayed sum of the past, and one fault at a time: -DFAULT_<NAME> plants it. Without
 * any, it passes every check. The tests compile it once per fault and see that the check of that name catches it.
 */
#include "mblm_plugin.h"

#include <fenv.h>
#include <pthread.h>
#include <stddef.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DECAY 0.5f
#ifndef TYPE
#define TYPE "leaky"
#endif

static const mblm_host *host;

static mblm_status fail(mblm_status status, const char *where, const char *message) {
    mblm_text w = {where, strlen(where)}, m = {message, strlen(message)};
    host->set_error(host->context, w, m);
    return status;
}

struct mblm_instance {
    uint64_t dim, layers;
#if defined(FAULT_OWN_WEIGHTS) || defined(FAULT_STALE)
    float own;
#endif
};
struct mblm_tape {
    float *sums; /* (batch, seq, dim): s_t = x_t + DECAY s_{t-1} */
};
struct mblm_state {
    uint64_t batch, dim, t;
    float *sums;
};

static mblm_status check(const mblm_block *block, mblm_text config, uint64_t dim, uint32_t *positions) {
    (void)block, (void)dim;
    *positions = MBLM_POS_NONE;
#ifdef FAULT_CHECK_EXIT
    exit(0);
#endif
#ifdef FAULT_CHECK_CRASH
    *(volatile int *)8 = 1;
#endif
#ifdef FAULT_CHECK_HANG
    for (;;) usleep(1000);
#endif
#ifdef FAULT_CHECK_NOISE
    for (int i = 0; i < 100000; i++) printf("a line of noise, number %d\n", i);
#endif
#ifdef FAULT_CONFIGS_CRASH
    if (config.len > 1000) abort();
#endif
#ifdef FAULT_CONFIGS
    return MBLM_OK;
#endif
#ifdef FAULT_CIRCLE
    return MBLM_OK;
#endif
    if (config.len == 2 && memcmp(config.data, "{}", 2) == 0) return MBLM_OK;
    return fail(MBLM_INVALID, "", "expected no fields");
}

static mblm_status create(const mblm_block *block, mblm_text config, mblm_text place, uint64_t dim, uint64_t num_layers,
                          mblm_instance_info *info, mblm_instance **instance) {
    (void)block, (void)config, (void)place;
    mblm_instance *m = malloc(sizeof *m);
    if (!m) return fail(MBLM_FAILED, "", "out of memory");
    *m = (mblm_instance){.dim = dim, .layers = num_layers};
#ifdef FAULT_OWN_WEIGHTS
    static int made;
    m->own = 1.0f + 0.1f * (float)made++;
#endif
#ifdef FAULT_CREATE_EXIT
    exit(0);
#endif
#ifdef FAULT_CREATE_HANG
    for (;;) usleep(1000);
#endif
#ifdef FAULT_CREATE_DAEMON
    FILE *mark = fopen(getenv("MBLM_TEST_MARKER"), "a");
    pid_t daemon = fork();
    if (daemon == 0) {
        setsid();
        for (;;) usleep(1000);
    }
    fprintf(mark, "%d\n", daemon);
    fclose(mark);
#endif
    info->num_params = 2;
    *instance = m;
    return MBLM_OK;
}

static void destroy(mblm_instance *m) {
#ifdef FAULT_DESTROY_EXIT
    exit(0);
#endif
#ifdef FAULT_LEAKS
    static void *volatile lost;
    lost = malloc(4096);
    memset(lost, 1, 4096);
#endif
    free(m);
}

static mblm_status param(const mblm_instance *m, uint64_t index, mblm_param_info *info) {
    if (index > 1) return fail(MBLM_INVALID, "", "there is no such parameter");
    const char *name = index ? "mix" : "scale";
#ifdef FAULT_PARAMS
    static int asked;
    if (asked++ >= 2) name = "other";
    if (index) name = "mix";
#endif
    info->name = (mblm_text){name, strlen(name)};
    info->num_dims = 1;
    info->dims[0] = m->dim;
    info->init = MBLM_INIT_CONST;
    info->a = index ? 0.5f : 1.0f;
#ifdef FAULT_DECAY
    if (info->struct_size >= offsetof(mblm_param_info, decay) + sizeof info->decay)
        info->decay = index ? MBLM_DECAY_NO : MBLM_DECAY_YES;
    info->init = MBLM_INIT_UNIFORM_BETWEEN;
    info->a = 2.0f;
    info->b = 3.0f;
#endif
    return MBLM_OK;
}

static inline void *exit_on_a_thread(void *unused) {
    (void)unused;
    exit(0);
}

#ifdef FAULT_LATE_STACK
static int deep(int n) {
    volatile char frame[4096];
    frame[0] = (char)n;
    return deep(n + 1) + frame[0];
}
#endif

static float one(const mblm_params *p, uint64_t c, float x, float sum) { return x * p->values[0][c] + sum * p->values[1][c]; }

static mblm_status forward(mblm_instance *m, const mblm_params *params, const mblm_pass *pass, const float *x, float *y,
                           mblm_tape **tape) {
    uint64_t d = m->dim, len = pass->batch * pass->seq * d;
    float *sums = malloc(len * sizeof(float));
    if (!sums) return fail(MBLM_FAILED, "", "out of memory");
    for (uint64_t i = 0; i < len; i++) {
        uint64_t t = i / d % pass->seq;
        sums[i] = x[i] + (t ? DECAY * sums[i - d] : 0.0f);
        y[i] = one(params, i % d, x[i], sums[i]);
    }
#ifdef FAULT_OWN_WEIGHTS
    for (uint64_t i = 0; i < len; i++) y[i] *= m->own;
#endif
#ifdef FAULT_STALE
    if (m->own == 0.0f) m->own = params->values[0][0];
    for (uint64_t i = 0; i < len; i++) y[i] *= m->own;
#endif
#ifdef FAULT_STATE
    static int before;
    y[0] += 0.1f * (float)before++;
#endif
#ifdef FAULT_FORWARD_EXIT
    exit(0);
#endif
#ifdef FAULT_OUTPUTS
    y[len - 1] = 0.0f / 0.0f;
#endif
#ifdef FAULT_OUTPUTS_GUARD
    y[len] = 1.0f;
#endif
#ifdef FAULT_OUTPUTS_INPUT
    ((float *)x)[0] += 1.0f;
#endif
#ifdef FAULT_SIZES
    if (pass->seq == 1) y[0] = 1.0f / 0.0f;
#endif
#ifdef FAULT_CAUSALITY
    if (pass->seq > 1) y[0] += x[d];
#endif
#ifdef FAULT_DETERMINISTIC
    static int passes;
    y[0] += 1e-6f * (float)(passes++);
#endif
#ifdef FAULT_THREADS
    static float shared;
    shared = x[0];
    usleep(200);
    y[0] += shared - x[0];
    static volatile int inside;
    if (__atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST) > 1) y[0] += 1.0f;
    usleep(500);
    __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
#endif
#ifdef FAULT_LATE_NAN
    static int calls;
    if (pass->training && calls++ == 12) y[7] = 0.0f / 0.0f;
#endif
#ifdef FAULT_LATE_ERROR
    static int calls;
    if (pass->training && calls++ == 12) return fail(MBLM_FAILED, "", "the sensor came off");
#endif
#ifdef FAULT_LATE_PANIC
    static int calls;
    if (pass->training && calls++ == 12) return fail(MBLM_PANICKED, "", "the sensor fell off");
#endif
#ifdef FAULT_LATE_EXIT
    static int calls;
    if (pass->training && calls++ == 12) exit(0);
#endif
#ifdef FAULT_LATE_QUICK_EXIT
    static int quick_calls;
    if (pass->training && quick_calls++ == 12) quick_exit(0);
#endif
#ifdef FAULT_LATE_UNDERSCORE_EXIT
    static int calls;
    if (pass->training && calls++ == 12) _exit(0);
#endif
#ifdef FAULT_LATE_SEGV
    static int calls;
    if (pass->training && calls++ == 12) *(volatile int *)8 = 1;
#endif
#ifdef FAULT_LATE_ABORT
    static int calls;
    if (pass->training && calls++ == 12) abort();
#endif
#ifdef FAULT_LATE_FPE
    static int calls;
    if (pass->training && calls++ == 12) raise(SIGFPE);
#endif
#ifdef FAULT_LATE_STACK
    static int calls;
    if (pass->training && calls++ == 12) y[0] = deep(1);
#endif
#ifdef FAULT_LATE_HANG
    static int calls;
    if (pass->training && calls++ == 12) {
        FILE *mark = fopen(getenv("MBLM_TEST_MARKER"), "w");
        if (mark) fclose(mark);
        for (;;) usleep(1000);
    }
#endif
#ifdef FAULT_LATE
    static int calls;
    if (pass->training && calls++ == 12) {
        FAULT_LATE
    }
#endif
#ifdef FAULT_HANG
    for (;;) usleep(1000);
#endif
    if (!tape) {
        free(sums);
        return MBLM_OK;
    }
    *tape = malloc(sizeof **tape);
    if (!*tape) {
        free(sums);
        return fail(MBLM_FAILED, "", "out of memory");
    }
    (*tape)->sums = sums;
#ifdef FAULT_TAPES
    static float *newest;
    newest = sums;
    (*tape)->sums = (float *)&newest;
#endif
    return MBLM_OK;
}

static mblm_status backward(mblm_instance *m, const mblm_params *params, const mblm_pass *pass, mblm_tape *tape, const float *x,
                            const float *dy, float *dx, float *const *dparams) {
    uint64_t d = m->dim, len = pass->batch * pass->seq * d;
    const float *sums = tape->sums;
#ifdef FAULT_TAPES
    sums = *(float **)tape->sums;
#endif
#ifdef FAULT_ACCUMULATION
    memset(dparams[0], 0, d * sizeof(float));
#endif
    for (uint64_t i = len; i-- > 0;) {
        uint64_t c = i % d, t = i / d % pass->seq;
        dparams[0][c] += dy[i] * x[i];
        dparams[1][c] += dy[i] * sums[i];
        /* dx holds the gradient of s until the position after has added its part. */
        float later = t + 1 < pass->seq ? DECAY * (dx[i + d] - dy[i + d] * params->values[0][c]) : 0.0f;
        dx[i] = dy[i] * params->values[0][c] + dy[i] * params->values[1][c] + later;
    }
#ifdef FAULT_GRADIENTS
    for (uint64_t i = 0; i < len; i++) dx[i] *= 1.1f;
#endif
#ifdef FAULT_GRADIENTS_PARAM
    memset(dparams[1], 0, d * sizeof(float));
#endif
    return MBLM_OK;
}

static void tape_free(mblm_tape *tape) {
#ifndef FAULT_TAPES
    free(tape->sums);
#endif
    free(tape);
}

static mblm_status state_create(mblm_instance *m, const mblm_params *params, uint64_t batch, mblm_state **out) {
    (void)params;
    mblm_state *s = malloc(sizeof *s);
    if (!s) return fail(MBLM_FAILED, "", "out of memory");
    *s = (mblm_state){batch, m->dim, 0, calloc(batch * m->dim, sizeof(float))};
    *out = s;
    return MBLM_OK;
}

static mblm_status state_reset(mblm_state *s) {
#ifndef FAULT_DECODING
    memset(s->sums, 0, s->batch * s->dim * sizeof(float));
#endif
    s->t = 0;
    return MBLM_OK;
}

static mblm_status state_clone(const mblm_state *s, mblm_state **out) {
    mblm_status status = state_create(&(mblm_instance){s->dim, 1}, NULL, s->batch, out);
    if (status != MBLM_OK) return status;
#ifndef FAULT_STATES
    memcpy((*out)->sums, s->sums, s->batch * s->dim * sizeof(float));
#endif
    return MBLM_OK;
}

static mblm_status state_save(const mblm_state *s, uint8_t *buffer, uint64_t *len) {
    *len = s->batch * s->dim * sizeof(float);
    if (buffer) memcpy(buffer, s->sums, *len);
    return MBLM_OK;
}

static mblm_status state_load(mblm_state *s, const uint8_t *bytes, uint64_t len) {
#ifndef FAULT_STATES_LOAD
    if (len != s->batch * s->dim * sizeof(float)) return fail(MBLM_INVALID, "", "not such a state");
#endif
    memcpy(s->sums, bytes, len);
    return MBLM_OK;
}

static void state_free(mblm_state *s) {
    free(s->sums);
    free(s);
}

static mblm_status step(mblm_instance *m, const mblm_params *params, mblm_state *s, const float *x, float *y) {
    for (uint64_t i = 0; i < s->batch * m->dim; i++) {
        s->sums[i] = x[i] + DECAY * s->sums[i];
        y[i] = one(params, i % m->dim, x[i], s->sums[i]);
    }
#ifdef FAULT_STEP_NAN
    if (s->t == 2) y[3] = 0.0f / 0.0f;
#endif
    s->t++;
    return MBLM_OK;
}

static const mblm_block BLOCK = {
    .struct_size = sizeof(mblm_block),
#ifdef FAULT_NO_BACKWARD
    .flags = MBLM_STEP | MBLM_CONCURRENT | MBLM_DETERMINISTIC,
#else
    .flags = MBLM_BACKWARD | MBLM_STEP | MBLM_CONCURRENT | MBLM_DETERMINISTIC,
#endif
    .block_type = MBLM_TEXT(TYPE),
#ifdef FAULT_HEADER
    .version = MBLM_TEXT(""),
#else
    .version = MBLM_TEXT("1"),
#endif
    .about = MBLM_TEXT("A leaky sum"),
#ifdef FAULT_SCHEMA
    .schema = MBLM_TEXT("{\"type\": \"object\", \"properties\": {}}"),
#elif defined(FAULT_NO_PROPERTIES)
    .schema = MBLM_TEXT("{\"type\": \"object\", \"additionalProperties\": false}"),
#elif defined(FAULT_CIRCLE)
    .schema = MBLM_TEXT("{\"type\": \"object\", \"additionalProperties\": false, \"required\": [\"a\"], \"properties\": {\"a\": "
                        "{\"$ref\": \"#/$defs/a\"}}, \"$defs\": {\"a\": {\"$ref\": \"#/$defs/a\"}}}"),
#else
    .schema = MBLM_TEXT("{\"type\": \"object\", \"properties\": {}, \"additionalProperties\": false}"),
#endif
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
};

static const mblm_block *const BLOCKS[] = {&BLOCK};

static mblm_status init(const mblm_host *h) {
    host = h;
#ifdef FAULT_INIT_SIGCHLD
    signal(SIGCHLD, SIG_IGN);
#endif
#ifdef FAULT_INIT
    return fail(MBLM_FAILED, "", "no licence");
#endif
    return MBLM_OK;
}

#ifdef FAULT_LOAD_EXIT
__attribute__((constructor)) static void at_load(void) { exit(0); }
#endif
#ifdef FAULT_LOAD_ABORT
__attribute__((constructor)) static void at_load(void) { abort(); }
#endif
#ifdef FAULT_LOAD_HANG
__attribute__((constructor)) static void at_load(void) { for (;;) usleep(1000); }
#endif

static const mblm_plugin PLUGIN = {
    .magic = MBLM_PLUGIN_MAGIC,
    .struct_size = sizeof(mblm_plugin),
#ifdef FAULT_MAJOR
    .major = MBLM_PLUGIN_MAJOR + 1,
#else
    .major = MBLM_PLUGIN_MAJOR,
#endif
#ifdef FAULT_MINOR
    .minor = MBLM_PLUGIN_MINOR + 1,
#endif
    .name = MBLM_TEXT("leaky"),
    .version = MBLM_TEXT("1"),
    .num_blocks = 1,
    .blocks = BLOCKS,
    .init = init,
};

#ifdef FAULT_SYMBOL
MBLM_EXPORT const mblm_plugin *another_entry(void) { return &PLUGIN; }
#else
const mblm_plugin *mblm_plugin_entry(void) { return &PLUGIN; }
#endif
