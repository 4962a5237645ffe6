
// The selective scan of Mamba: h_t = exp(delta_t a) h_{t-1} + delta_t B_t x_t, y_t = (C_t . h_t + D x_t) silu(z_t), with
// a = -exp(a_log) and delta = softplus(dt + bias).
//
// rows: (B, S, parts E), x, dt and, with three parts, z; without z nothing gates the outputs. maps: (B, S, 2 N), B and C; params: (E, N + 2), a_log, D and the bias.
//
// Sequences are cut into chunks of CHUNK positions. A first pass runs every chunk from a zero state, `scan_carry` turns the
// states at their ends into the states at their starts, and a second pass runs every chunk from there. Backward does the
// same from the last position to the first. Sequences of one chunk need the second pass alone.
//
// A thread holds STATES states of one channel; a channel with more of them has the groups in turn, which add up. A block
// works on neighbouring channels of one chunk after another. Nothing is added up in an order that can change.

#define CHUNK 16 // `CHUNK` of selective_scan.rs
#define STATES 16 // half a warp: a lane for each gradient of B and C
#define SCAN_THREADS 128 // `THREADS` of selective_scan.rs
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

static __device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A chunk of a sequence: its number among those of all sequences, its first row, and its positions.
struct Chunk {
    long long number, row;
    int len;
};

static __device__ __forceinline__ int chunks_of(int seq) { return (seq + CHUNK - 1) / CHUNK; }

static __device__ __forceinline__ Chunk chunk_of(long long number, int seq) {
    int chunks = chunks_of(seq);
    int first = (int)(number % chunks) * CHUNK;
    return {number, number / chunks * seq + first, min(CHUNK, seq - first)};
}

// x, dt and z of channel e in a row; zeros for threads without a channel.
struct Position {
    float x, raw, delta, z;
};

static __device__ __forceinline__ Position position(const float *rows, long long row, int e, int channels, int parts,
                                                    float bias) {
    if (e >= channels) return {0.0f, 0.0f, 0.0f, 0.0f};
    const float *at = rows + row * parts * channels + e;
    float raw = at[channels] + bias;
    return {at[0], raw, softplus(raw), parts == 3 ? at[2 * channels] : 0.0f};
}

// What the output is multiplied by.
static __device__ __forceinline__ float gate_of(Position at, int parts) { return parts == 3 ? at.z * sigmoid(at.z) : 1.0f; }

// B and C of the group of states from `first` on; zeros where there are no more states.
struct Maps {
    float b[CHUNK][STATES], c[CHUNK][STATES];
};

static __device__ __forceinline__ void load_maps(Maps &to, const float *maps, Chunk chunk, int states, int first) {
    __syncthreads();
    for (int i = threadIdx.x; i < chunk.len * STATES; i += blockDim.x) {
        int t = i / STATES, n = i % STATES;
        const float *at = maps + (chunk.row + t) * 2 * states + first + n;
        bool there = first + n < states;
        to.b[t][n] = there ? at[0] : 0.0f;
        to.c[t][n] = there ? at[states] : 0.0f;
    }
    __syncthreads();
}

// a / ln 2 of the group, so that exp(delta a) is a power of two.
static __device__ __forceinline__ void load_decays(float *a, const float *params, int e, int channels, int states, int first) {
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        bool there = e < channels && first + n < states;
        a[n] = there ? -LOG2E * expf(params[(long long)e * (states + 2) + first + n]) : 0.0f;
    }
}

// The group's states at the border of a chunk, kept as (B, chunks, N, E); zeros if none are kept.
static __device__ __forceinline__ void load_states(float *h, const float *kept, long long chunk, int e, int channels, int states,
                                                   int first) {
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        bool there = kept && e < channels && first + n < states;
        h[n] = there ? kept[(chunk * states + first + n) * channels + e] : 0.0f;
    }
}

static __device__ __forceinline__ void store_states(const float *h, float *kept, long long chunk, int e, int channels, int states,
                                                    int first) {
#pragma unroll
    for (int n = 0; n < STATES; n++)
        if (e < channels && first + n < states) kept[(chunk * states + first + n) * channels + e] = h[n];
}

// Runs chunks from their starts (null: from zero). Writes outputs to y if it is not null, and otherwise the states at the
// ends of the chunks to `ends` and the sums of delta over each to `steps`, (B, chunks, E).
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    scan(const float *__restrict__ rows, const float *__restrict__ maps, const float *__restrict__ params,
         const float *__restrict__ starts, float *y, float *ends, float *steps, long long count, int seq, int channels, int states, int parts) {
    __shared__ Maps map;
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    const float *own = params + (long long)e * (states + 2) + states;
    float d = e < channels ? own[0] : 0.0f, bias = e < channels ? own[1] : 0.0f;
    for (int first = 0; first < states; first += STATES) {
        bool last = first + STATES >= states;
        float a[STATES];
        load_decays(a, params, e, channels, states, first);
        for (long long number = blockIdx.y; number < count; number += gridDim.y) {
            Chunk chunk = chunk_of(number, seq);
            load_maps(map, maps, chunk, states, first);
            if (e >= channels) continue;
            float h[STATES], total = 0.0f;
            load_states(h, starts, number, e, channels, states, first);
            for (int t = 0; t < chunk.len; t++) {
                Position at = position(rows, chunk.row + t, e, channels, parts, bias);
                float *out = y + (chunk.row + t) * channels + e;
                float input = at.delta * at.x, sum = 0.0f;
                total += at.delta;
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    h[n] = exp2f(at.delta * a[n]) * h[n] + map.b[t][n] * input;
                    sum += map.c[t][n] * h[n];
                }
                if (!y) continue;
                sum += first == 0 ? d * at.x : *out;
                *out = last ? sum * gate_of(at, parts) : sum;
            }
            if (y) continue;
            store_states(h, ends, number, e, channels, states, first);
            steps[number * channels + e] = total;
        }
    }
}

// The gradients of the states before the chunks, from zero gradients of the states at their ends.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    scan_retreat(const float *__restrict__ rows, const float *__restrict__ maps, const float *__restrict__ params,
                 const float *__restrict__ dy, float *grads, long long count, int seq, int channels, int states, int parts) {
    __shared__ Maps map;
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    float bias = e < channels ? params[(long long)e * (states + 2) + states + 1] : 0.0f;
    for (int first = 0; first < states; first += STATES) {
        float a[STATES];
        load_decays(a, params, e, channels, states, first);
        for (long long number = blockIdx.y; number < count; number += gridDim.y) {
            Chunk chunk = chunk_of(number, seq);
            load_maps(map, maps, chunk, states, first);
            if (e >= channels) continue;
            float dh[STATES];
            load_states(dh, 0, number, e, channels, states, first);
            for (int t = chunk.len - 1; t >= 0; t--) {
                Position at = position(rows, chunk.row + t, e, channels, parts, bias);
                float dsum = dy[(chunk.row + t) * channels + e] * gate_of(at, parts);
#pragma unroll
                for (int n = 0; n < STATES; n++) dh[n] = (dh[n] + map.c[t][n] * dsum) * exp2f(at.delta * a[n]);
            }
            store_states(dh, grads, number, e, channels, states, first);
        }
    }
}

// Replaces what each chunk leaves behind if it starts from zero by what it starts from; `back`: from the last chunk to the
// first. One thread per state, len = B N E.
extern "C" __global__ void scan_carry(float *kept, const float *steps, const float *params, long long len, int chunks, int channels,
                                      int states, int back) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    int e = i % channels, n = i / channels % states;
    long long b = i / channels / states;
    float a = -LOG2E * expf(params[(long long)e * (states + 2) + n]), h = 0.0f;
    for (int k = 0; k < chunks; k++) {
        long long chunk = b * chunks + (back ? chunks - 1 - k : k);
        float *at = kept + (chunk * states + n) * channels + e;
        float left = *at;
        *at = h;
        h = left + exp2f(a * steps[chunk * channels + e]) * h;
    }
}

// Adds up pairs of lanes that are STEP apart; the upper one keeps the sums of the upper half of the 2 STEP values.
template <int STEP> static __device__ __forceinline__ void add_halves(float *v) {
    bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        float mine = upper ? v[i + STEP] : v[i], theirs = upper ? v[i] : v[i + STEP];
        v[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, STEP);
    }
}

// The sums over a warp of 32 values per thread, that of value i in lane i.
static __device__ __forceinline__ float sums_of_warp(float *v) {
    add_halves<16>(v);
    add_halves<8>(v);
    add_halves<4>(v);
    add_halves<2>(v);
    add_halves<1>(v);
    return v[0];
}

// Every gradient, from the states at the starts of the chunks and the gradients of those at their ends (null: zero).
// drows: like rows; dmaps: (gridDim.x, B, S, 2 N), over the channels of a block; dparams: (gridDim.y, E, N + 2), over the
// chunks of a block.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    scan_backward(const float *__restrict__ rows, const float *__restrict__ maps, const float *__restrict__ params,
                  const float *__restrict__ starts, const float *__restrict__ grads, const float *__restrict__ dy, float *drows,
                  float *dmaps, float *dparams, long long count, int seq, int channels, int states, int parts) {
    __shared__ Maps map;
    __shared__ float sums[SCAN_THREADS / WARP][CHUNK][2 * STATES];
    int e = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    bool there = e < channels;
    const float *own = params + (long long)e * (states + 2) + states;
    float *down = dparams + ((long long)blockIdx.y * channels + e) * (states + 2);
    float d = there ? own[0] : 0.0f, bias = there ? own[1] : 0.0f, dd = 0.0f, dbias = 0.0f;
    for (int first = 0; first < states; first += STATES) {
        float a[STATES], da[STATES];
        load_decays(a, params, e, channels, states, first);
#pragma unroll
        for (int n = 0; n < STATES; n++) da[n] = 0.0f;
        for (long long number = blockIdx.y; number < count; number += gridDim.y) {
            Chunk chunk = chunk_of(number, seq);
            load_maps(map, maps, chunk, states, first);
            // The chunk once more, keeping the state before each position.
            float before[CHUNK][STATES], h[STATES], dh[STATES];
            load_states(h, starts, number, e, channels, states, first);
            for (int t = 0; t < chunk.len; t++) {
                Position at = position(rows, chunk.row + t, e, channels, parts, bias);
                float input = at.delta * at.x;
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    before[t][n] = h[n];
                    h[n] = exp2f(at.delta * a[n]) * h[n] + map.b[t][n] * input;
                }
            }
            load_states(dh, grads, number, e, channels, states, first);
            for (int t = chunk.len - 1; t >= 0; t--) {
                long long row = chunk.row + t;
                Position at = position(rows, row, e, channels, parts, bias);
                float gate = sigmoid(at.z), dout = there ? dy[row * channels + e] : 0.0f;
                float dsum = dout * gate_of(at, parts), input = at.delta * at.x;
                float sum = 0.0f, dinput = 0.0f, ddelta = 0.0f, dmap[2 * STATES];
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    float p = exp2f(at.delta * a[n]);
                    float now = p * before[t][n] + map.b[t][n] * input;
                    float g = dh[n] + map.c[t][n] * dsum;
                    sum += map.c[t][n] * now;
                    dinput += map.b[t][n] * g;
                    dmap[n] = g * input;
                    dmap[STATES + n] = dsum * now;
                    dh[n] = g * p;
                    float decay = dh[n] * before[t][n];
                    ddelta += a[n] * decay;
                    da[n] += at.delta * decay;
                }
                ddelta = LN2 * ddelta + at.x * dinput;
                float dx = at.delta * dinput, ddt = ddelta * sigmoid(at.raw);
                dbias += ddt;
                if (first == 0) {
                    sum += d * at.x;
                    dx += d * dsum;
                    dd += dsum * at.x;
                }
                float dz = dout * sum * gate * (1.0f + at.z * (1.0f - gate));
                if (there) {
                    float *to = drows + row * parts * channels + e;
                    to[0] = first == 0 ? dx : to[0] + dx;
                    to[channels] = first == 0 ? ddt : to[channels] + ddt;
                    if (parts == 3) to[2 * channels] = first == 0 ? dz : to[2 * channels] + dz;
                }
                sums[warp][t][lane] = sums_of_warp(dmap);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < chunk.len * 2 * STATES; i += blockDim.x) {
                int t = i / (2 * STATES), v = i % (2 * STATES), n = first + v % STATES;
                float sum = 0.0f;
                for (int w = 0; w < blockDim.x / WARP; w++) sum += sums[w][t][v];
                long long row = blockIdx.x * (count / chunks_of(seq) * seq) + chunk.row + t;
                if (n < states) dmaps[row * 2 * states + v / STATES * states + n] = sum;
            }
        }
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (there && first + n < states) down[first + n] = LN2 * a[n] * da[n];
    }
    if (there) {
        down[states] = dd;
        down[states + 1] = dbias;
    }
}
