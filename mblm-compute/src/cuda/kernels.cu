// Kernels for NVIDIA cards, compiled when the first one runs. Each is held against the composition that it stands for.
// All tensors are contiguous and f32. A "row" is one position; a block of threads works on one row unless a kernel says
// otherwise.

#define WARP 32
#define INFINITE __int_as_float(0x7f800000)

struct Sum {
    static constexpr float none = 0.0f;
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};

struct Max {
    static constexpr float none = -3.4e38f;
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op> static __device__ __forceinline__ float of_warp(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}

// Over a block of at most 1024 threads, in every thread.
template <class Op> static __device__ float of_block(float v) {
    __shared__ float parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    v = of_warp<Op>(v);
    __syncthreads();
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    return of_warp<Op>(lane < warps ? parts[lane] : Op::none);
}

// The factor of element i in a dropout mask: `mode::Dropout::factor`.
static __device__ __forceinline__ float dropped(unsigned long long i, unsigned long long key, unsigned threshold, float scale) {
    unsigned long long mixed = i + key;
    unsigned hash = (unsigned)mixed ^ ((unsigned)(mixed >> 32) * 0x9E3779B9u);
    hash = (hash ^ (hash >> 16)) * 0x7FEB352Du;
    hash = (hash ^ (hash >> 15) ^ (unsigned)(key >> 32)) * 0x846CA68Bu;
    hash ^= hash >> 16;
    return hash < threshold ? 0.0f : scale;
}

// y = x * mask, or the mask itself where x is null.
extern "C" __global__ void dropout(const float *x, float *y, long long len, unsigned long long key, unsigned threshold,
                                   float scale) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len) y[i] = dropped(i, key, threshold, scale) * (x ? x[i] : 1.0f);
}

// The same for attention weights (B H, Q, K): query q is position first + q of `seq`, and an element has the number that it
// has among those of all queries and keys.
extern "C" __global__ void dropout_weights(const float *x, float *y, long long len, int queries, int keys, int seq, int first,
                                           unsigned long long key, unsigned threshold, float scale) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    int k = i % keys;
    long long row = i / keys;
    unsigned long long number = ((row / queries) * seq + first + row % queries) * seq + k;
    y[i] = x[i] * dropped(number, key, threshold, scale);
}

// Channel c of row `row` after the token shift: channels from `half` on come from the position before.
static __device__ __forceinline__ float shifted(const float *x, long long row, int c, int seq, int dim, int half) {
    if (c < half) return x[row * dim + c];
    return row % seq == 0 ? 0.0f : x[(row - 1) * dim + c];
}

// RMSNorm over the last dimension after a token shift (half = dim: none). Keeps 1 / rms of each row, negative where the
// floor is in force: then it does not depend on the row.
extern "C" __global__ void rms_norm(const float *x, const float *gain, float *y, float *inverse, int seq, int dim, int half,
                                    float floor, float inside) {
    long long row = blockIdx.x;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        float v = shifted(x, row, c, seq, dim, half);
        squares += v * v;
    }
    float mean = of_block<Sum>(squares) / dim;
    float rms = sqrtf(mean + inside);
    float inv = 1.0f / fmaxf(rms, floor);
    for (int c = threadIdx.x; c < dim; c += blockDim.x)
        y[row * dim + c] = shifted(x, row, c, seq, dim, half) * inv * gain[c];
    if (threadIdx.x == 0) inverse[row] = rms < floor ? -inv : inv;
}

// The gradient of the input, dx, and per block that of the gain over its rows: partial, (gridDim.x, dim).
extern "C" __global__ void rms_norm_backward(const float *x, const float *gain, const float *inverse, const float *dy,
                                             float *dx, float *partial, long long rows, int seq, int dim, int half) {
    extern __shared__ float dgain[];
    for (int c = threadIdx.x; c < dim; c += blockDim.x) dgain[c] = 0.0f;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        float inv = fabsf(inverse[row]);
        bool fixed = inverse[row] < 0.0f;
        float along = 0.0f;
        for (int c = threadIdx.x; c < dim; c += blockDim.x) {
            float n = shifted(x, row, c, seq, dim, half) * inv, d = dy[row * dim + c];
            along += n * d * gain[c];
            dgain[c] += n * d;
        }
        along = fixed ? 0.0f : of_block<Sum>(along) / dim;
        if (fixed) __syncthreads();
        for (int c = threadIdx.x; c < dim; c += blockDim.x) {
            float n = shifted(x, row, c, seq, dim, half) * inv;
            float d = inv * (dy[row * dim + c] * gain[c] - n * along);
            if (c < half) {
                dx[row * dim + c] = d;
            } else {
                if (row % seq != 0) dx[(row - 1) * dim + c] = d;
                if (row % seq == seq - 1) dx[row * dim + c] = 0.0f;
            }
        }
    }
    for (int c = threadIdx.x; c < dim; c += blockDim.x) partial[(long long)blockIdx.x * dim + c] = dgain[c];
}

// The sums of the columns of x, (rows, columns): one thread per column and slice of rows, then the slices.
extern "C" __global__ void column_sums(const float *x, float *partial, long long rows, int columns) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= columns) return;
    float sum = 0.0f;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) sum += x[row * columns + c];
    partial[(long long)blockIdx.y * columns + c] = sum;
}

// y = gelu(x + bias) with dropout.
extern "C" __global__ void bias_gelu(const float *x, const float *bias, float *y, long long len, int dim,
                                     unsigned long long key, unsigned threshold, float scale) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    float u = x[i] + bias[i % dim];
    float v = u * normcdff(u);
    y[i] = threshold ? v * dropped(i, key, threshold, scale) : v;
}

extern "C" __global__ void bias_gelu_backward(const float *x, const float *bias, const float *dy, float *dx, long long len,
                                              int dim, unsigned long long key, unsigned threshold, float scale) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    float u = x[i] + bias[i % dim];
    float density = 0.3989422804014327f * expf(-0.5f * u * u);
    float d = dy[i] * (normcdff(u) + u * density);
    dx[i] = threshold ? d * dropped(i, key, threshold, scale) : d;
}

// y = x + bias
extern "C" __global__ void bias_add(const float *x, const float *bias, float *y, long long len, int dim) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len) y[i] = x[i] + bias[i % dim];
}

// Heads out of rows: y (B, H, S, d) from columns first.. of x (B, S, width), rotated by halves if cos is not null. With
// `back`, rows out of heads: the columns of x from y, rotated the other way.
extern "C" __global__ void heads(float *x, float *y, const float *cosines, const float *sines, long long len, int heads, int seq,
                                 int head_dim, int width, int first, int back) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int half = head_dim / 2, pairs = cosines ? half : head_dim;
    if (i >= len) return; // len = B H S pairs
    int c = i % pairs;
    long long rest = i / pairs;
    int t = rest % seq, h = rest / seq % heads;
    long long b = rest / seq / heads;
    float *row = x + (b * seq + t) * width + first + h * head_dim;
    float *out = y + ((b * heads + h) * seq + t) * head_dim;
    if (!cosines) {
        if (back) row[c] = out[c];
        else out[c] = row[c];
        return;
    }
    float cosine = cosines[t * half + c], sine = sines[t * half + c];
    if (back) {
        float p = out[c], q = out[c + half];
        row[c] = p * cosine + q * sine;
        row[c + half] = q * cosine - p * sine;
    } else {
        float p = row[c], q = row[c + half];
        out[c] = p * cosine - q * sine;
        out[c + half] = q * cosine + p * sine;
    }
}

// Keys that a thread holds in registers; rows of more are read again.
#define HELD 8

// Softmax of rows of scores (B H, Q, K) times `scale`, in place. Query q is position first + q; causal: it sees keys up to its
// own. mask: (B, K), 0 = hidden; may be null. A row that sees masked keys alone is uniform over them, as in the package. One
// block per row.
extern "C" __global__ void softmax(float *scores, const unsigned char *mask, int queries, int keys, int heads, int first,
                                   int causal, float scale) {
    long long row = blockIdx.x;
    int q = row % queries;
    float *s = scores + row * keys;
    const unsigned char *seen = mask ? mask + row / queries / heads * keys : 0;
    int limit = causal ? min(keys, first + q + 1) : keys;
    float held[HELD], most = -INFINITE, total = 0.0f;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = threadIdx.x + i * blockDim.x;
        held[i] = k >= limit ? -INFINITE : seen && !seen[k] ? -1e30f : s[k] * scale;
        most = fmaxf(most, held[i]);
    }
    for (int k = threadIdx.x + HELD * blockDim.x; k < limit; k += blockDim.x) {
        s[k] = seen && !seen[k] ? -1e30f : s[k] * scale;
        most = fmaxf(most, s[k]);
    }
    most = of_block<Max>(most);
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = expf(held[i] - most);
        total += held[i];
    }
    for (int k = threadIdx.x + HELD * blockDim.x; k < limit; k += blockDim.x) {
        s[k] = expf(s[k] - most);
        total += s[k];
    }
    total = 1.0f / of_block<Sum>(total);
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = threadIdx.x + i * blockDim.x;
        if (k < keys) s[k] = held[i] * total;
    }
    for (int k = threadIdx.x + HELD * blockDim.x; k < keys; k += blockDim.x) s[k] = k < limit ? s[k] * total : 0.0f;
}

// The gradient of the scores before `scale`: d = scale * p * (d - sum(p d)), in place in d. The scores of masked keys have none,
// also where all keys are masked.
extern "C" __global__ void softmax_backward(const float *weights, float *d, const unsigned char *mask, int queries, int keys,
                                            int heads, float scale) {
    long long row = blockIdx.x;
    const float *p = weights + row * keys;
    const unsigned char *seen = mask ? mask + row / queries / heads * keys : 0;
    float *g = d + row * keys;
    float ps[HELD], gs[HELD], along = 0.0f;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = threadIdx.x + i * blockDim.x;
        ps[i] = k < keys ? p[k] : 0.0f;
        gs[i] = k < keys ? g[k] : 0.0f;
        along += ps[i] * gs[i];
    }
    for (int k = threadIdx.x + HELD * blockDim.x; k < keys; k += blockDim.x) along += p[k] * g[k];
    along = of_block<Sum>(along);
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = threadIdx.x + i * blockDim.x;
        if (k < keys) g[k] = seen && !seen[k] ? 0.0f : scale * ps[i] * (gs[i] - along);
    }
    for (int k = threadIdx.x + HELD * blockDim.x; k < keys; k += blockDim.x)
        g[k] = seen && !seen[k] ? 0.0f : scale * p[k] * (g[k] - along);
}

// Adam with decoupled weight decay; the gradient is multiplied by `factor` first.
extern "C" __global__ void adam(float *p, const float *g, float *m, float *v, long long len, float one_minus_beta1, float beta2,
                                float one_minus_beta2, float root_bias2, float eps, float step_size, float decay) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    float grad = g[i];
    float mean = m[i] + one_minus_beta1 * (grad - m[i]);
    float square = beta2 * v[i] + one_minus_beta2 * grad * grad;
    m[i] = mean;
    v[i] = square;
    p[i] = decay * p[i] - step_size * (mean / (sqrtf(square) / root_bias2 + eps));
}

// The sum and the sum of squares of x, as doubles in out[0] and out[1] of each block: out (gridDim.x, 2).
extern "C" __global__ void sums(const float *x, double *out, long long len) {
    __shared__ double parts[2][256];
    double sum = 0.0, squares = 0.0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += (long long)gridDim.x * blockDim.x) {
        double v = x[i];
        sum += v;
        squares += v * v;
    }
    parts[0][threadIdx.x] = sum;
    parts[1][threadIdx.x] = squares;
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) {
            parts[0][threadIdx.x] += parts[0][threadIdx.x + step];
            parts[1][threadIdx.x] += parts[1][threadIdx.x + step];
        }
        __syncthreads();
    }
    if (threadIdx.x < 2) out[2 * blockIdx.x + threadIdx.x] = parts[threadIdx.x][0];
}

// y = silu(bias + causal depthwise convolution of x): x may be columns first.. of rows of `width`; y is (B, S, C).
extern "C" __global__ void conv1d_silu(const float *x, const float *weight, const float *bias, float *y, long long len, int seq,
                                       int channels, int taps, int width, int first) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    int c = i % channels;
    long long row = i / channels;
    int t = row % seq;
    float u = bias[c];
    for (int k = max(0, taps - 1 - t); k < taps; k++) u += weight[c * taps + k] * x[(row - (taps - 1) + k) * width + first + c];
    y[i] = u / (1.0f + expf(-u));
}

// du = dy silu'(u), where u is computed again.
extern "C" __global__ void conv1d_silu_backward(const float *x, const float *weight, const float *bias, const float *dy, float *du,
                                                long long len, int seq, int channels, int taps, int width, int first) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    int c = i % channels;
    long long row = i / channels;
    int t = row % seq;
    float u = bias[c];
    for (int k = max(0, taps - 1 - t); k < taps; k++) u += weight[c * taps + k] * x[(row - (taps - 1) + k) * width + first + c];
    float s = 1.0f / (1.0f + expf(-u));
    du[i] = dy[i] * s * (1.0f + u * (1.0f - s));
}

// The gradient of the convolution's input from du: dx (B, S, C).
extern "C" __global__ void conv1d_input_backward(const float *weight, const float *du, float *dx, long long len, int seq,
                                                 int channels, int taps) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    int c = i % channels;
    long long row = i / channels;
    int t = row % seq;
    float d = 0.0f;
    for (int back = 0; back < taps && t + back < seq; back++) d += weight[c * taps + taps - 1 - back] * du[(row + back) * channels + c];
    dx[i] = d;
}

// The gradients of weight and bias over a slice of the rows: partial (gridDim.y, channels, taps + 1), the bias last.
extern "C" __global__ void conv1d_weight_backward(const float *x, const float *du, float *partial, long long rows, int seq,
                                                  int channels, int taps, int width, int first) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    float sums[9];
    for (int k = 0; k <= taps; k++) sums[k] = 0.0f;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        int t = row % seq;
        float d = du[row * channels + c];
        for (int k = max(0, taps - 1 - t); k < taps; k++) sums[k] += d * x[(row - (taps - 1) + k) * width + first + c];
        sums[taps] += d;
    }
    for (int k = 0; k <= taps; k++) partial[((long long)blockIdx.y * channels + c) * (taps + 1) + k] = sums[k];
}

// LayerNorm over the last dimension. Keeps mean and 1 / deviation of each row in stats (rows, 2).
extern "C" __global__ void layer_norm(const float *x, const float *gain, const float *bias, float *y, float *stats, int dim,
                                      float eps) {
    long long row = blockIdx.x;
    x += row * dim;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) sum += x[c];
    float mean = of_block<Sum>(sum) / dim, squares = 0.0f;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) squares += (x[c] - mean) * (x[c] - mean);
    float inv = rsqrtf(of_block<Sum>(squares) / dim + eps);
    for (int c = threadIdx.x; c < dim; c += blockDim.x) y[row * dim + c] = (x[c] - mean) * inv * gain[c] + bias[c];
    if (threadIdx.x == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = inv;
    }
}

// The gradient of the input, and per block those of gain and bias over its rows: partial (gridDim.x, 2 dim).
extern "C" __global__ void layer_norm_backward(const float *x, const float *gain, const float *stats, const float *dy, float *dx,
                                               float *partial, long long rows, int dim) {
    float *dgain = partial + (long long)blockIdx.x * 2 * dim, *dbias = dgain + dim;
    for (int c = threadIdx.x; c < dim; c += blockDim.x) dgain[c] = dbias[c] = 0.0f;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        float mean = stats[2 * row], inv = stats[2 * row + 1], sum = 0.0f, along = 0.0f;
        for (int c = threadIdx.x; c < dim; c += blockDim.x) {
            float n = (x[row * dim + c] - mean) * inv, d = dy[row * dim + c];
            sum += d * gain[c];
            along += d * gain[c] * n;
            dgain[c] += d * n;
            dbias[c] += d;
        }
        sum = of_block<Sum>(sum) / dim;
        along = of_block<Sum>(along) / dim;
        for (int c = threadIdx.x; c < dim; c += blockDim.x) {
            float n = (x[row * dim + c] - mean) * inv;
            dx[row * dim + c] = inv * (dy[row * dim + c] * gain[c] - sum - n * along);
        }
    }
}

// Turns logits (rows, vocab) into their gradients, and writes the loss of each row; one warp per row. A weight is that of
// the row's loss in the mean, and 0 where nothing is predicted.
extern "C" __global__ void cross_entropy(float *logits, const unsigned *tokens, const float *weights, float *losses,
                                         long long rows, int vocab) {
    long long row = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float *l = logits + row * vocab, most = -INFINITE, total = 0.0f;
    for (int i = lane; i < vocab; i += WARP) most = fmaxf(most, l[i]);
    most = of_warp<Max>(most);
    float chosen = l[tokens[row]] - most;
    __syncwarp();
    for (int i = lane; i < vocab; i += WARP) {
        l[i] = expf(l[i] - most);
        total += l[i];
    }
    total = of_warp<Sum>(total);
    float weight = weights[row];
    for (int i = lane; i < vocab; i += WARP) l[i] = weight * (l[i] / total - (i == (int)tokens[row] ? 1.0f : 0.0f));
    if (lane == 0) losses[row] = weight == 0.0f ? 0.0f : weight * (logf(total) - chosen);
}
