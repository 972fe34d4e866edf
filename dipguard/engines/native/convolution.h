// Convolution of one image, forward and backward. Weights lie as [kernel row][kernel column][input][output].
//
// Each routine is one small product held in registers: a few pixels (or inputs) times one or two vectors of channels.
#pragma once

#include "frame.h"

constexpr index_t MOST_TAPS = 121;

struct Tap {
    index_t pixel, weight;  // offsets of the tap's first input number and of its weights
};

// out[p][:] += sum over taps and channels c of in[tap + p * in_step + c] * weights[tap + c * outputs][:]
template <class V, int NV, int PX>
INLINE void tile(const REAL* in, index_t in_step, index_t inputs, const Tap* taps, index_t count, const REAL* weights,
                 index_t outputs, REAL* out, index_t out_step, const REAL* bias) {
    constexpr index_t L = sizeof(V) / sizeof(REAL);
    V sum[PX][NV];
#pragma GCC unroll 16
    for (int p = 0; p < PX; p++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[p][v] = load<V>(bias ? bias + v * L : out + p * out_step + v * L);
    for (index_t t = 0; t < count; t++) {
        const REAL* x = in + taps[t].pixel;
        const REAL* w = weights + taps[t].weight;
        for (index_t c = 0; c < inputs; c++, x++, w += outputs) {
            V row[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) row[v] = load<V>(w + v * L);
#pragma GCC unroll 16
            for (int p = 0; p < PX; p++) {
                const V value = x[p * in_step] - V{};
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sum[p][v] += value * row[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < PX; p++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store<V>(out + p * out_step + v * L, sum[p][v]);
}

// Cuts a row into tiles as even as can be: a short last one would leave registers, and their sums, unused.
template <class V, int NV>
static void tiles(index_t pixels, const REAL* in, index_t in_step, index_t inputs, const Tap* taps, index_t count,
                  const REAL* weights, index_t outputs, REAL* out, index_t out_step, const REAL* bias) {
    while (pixels > 0) {
        const index_t left = (pixels + MOST_PIXELS - 1) / MOST_PIXELS, now = (pixels + left - 1) / left;
        switch (now) {
#define CASE(PX)                                                                                           \
    case PX:                                                                                               \
        tile<V, NV, PX>(in, in_step, inputs, taps, count, weights, outputs, out, out_step, bias);          \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#if MOST_PIXELS >= 6
            CASE(5) CASE(6)
#endif
#if MOST_PIXELS >= 12
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
        }
        pixels -= now, in += now * in_step, out += now * out_step;
    }
}

struct Convolution {
    index_t kernel, stride, pad;  // pad: pixels before the image, above and left
    const REAL* weights;
    const REAL* bias;
};

// Rows of the output are dealt out.
static void convolve(const Convolution& conv, const Frame& in, const Frame& out, REAL* workspace, const Team& team) {
    Tap taps[MOST_TAPS];
    index_t count = 0;
    for (index_t i = 0; i < conv.kernel; i++)
        for (index_t j = 0; j < conv.kernel; j++, count++)
            taps[count] = {i * in.row + j * in.pixel, count * in.channels * out.padded};
    const Part rows = team.part(out.height);
    pieces(out.padded, [&](auto kind, auto vectors, index_t first) {
        for (index_t y = rows.first; y < rows.last; y++)
            tiles<decltype(kind), vectors.value>(
                out.width, in.at(workspace, y * conv.stride - conv.pad, -conv.pad), conv.stride * in.pixel, in.channels,
                taps, count, conv.weights + first, out.padded, out.at(workspace, y, 0) + first, out.pixel,
                conv.bias + first);
    });
}

// turned[tap][output][input]: the weights as the gradient of the input needs them, transposed in squares of 4 x 4.
static void turn_weights(const Convolution& conv, const Frame& in, const Frame& out, REAL* turned, const Team& team) {
    typedef std::conditional_t<sizeof(REAL) == 4, std::int32_t, std::int64_t> whole;
    typedef whole order __attribute__((vector_size(4 * sizeof(REAL))));
    const index_t taps = conv.kernel * conv.kernel, rows = in.channels;
    const Part quads = team.part(taps * out.padded / 4);
    for (index_t q = quads.first; q < quads.last; q++) {
        const index_t t = q / (out.padded / 4), c = q % (out.padded / 4) * 4;
        const REAL* from = conv.weights + t * rows * out.padded;
        REAL* to = turned + t * out.channels * in.padded;
        for (index_t r = 0; r < in.padded; r += 4) {
            quad x[4];
            for (index_t i = 0; i < 4; i++)
                x[i] = r + i < rows ? load<quad>(from + (r + i) * out.padded + c) : zero<quad>();
            const quad a = __builtin_shuffle(x[0], x[1], order{0, 4, 1, 5});
            const quad b = __builtin_shuffle(x[2], x[3], order{0, 4, 1, 5});
            const quad d = __builtin_shuffle(x[0], x[1], order{2, 6, 3, 7});
            const quad e = __builtin_shuffle(x[2], x[3], order{2, 6, 3, 7});
            const quad y[4] = {
                __builtin_shuffle(a, b, order{0, 1, 4, 5}), __builtin_shuffle(a, b, order{2, 3, 6, 7}),
                __builtin_shuffle(d, e, order{0, 1, 4, 5}), __builtin_shuffle(d, e, order{2, 3, 6, 7})};
            for (index_t i = 0; i < 4 && c + i < out.channels; i++) store<quad>(to + (c + i) * in.padded + r, y[i]);
        }
    }
}

// Adds the gradient of the input, border included, to frame `in`. `out` holds the output's gradient and needs a border
// of zeros, kernel - 1 pixels to the left and to the right. `turned` is room for the turned weights. Rows of the input,
// border included, are dealt out.
static void convolve_back(const Convolution& conv, const Frame& in, const Frame& out, REAL* workspace, REAL* turned,
                          const Team& team) {
    turn_weights(conv, in, out, turned, team);
    team.wait();
    const index_t k = conv.kernel, s = conv.stride;
    const index_t height = (out.height - 1) * s + k, width = (out.width - 1) * s + k;
    Tap taps[MOST_TAPS];
    const Part rows = team.part(height);
    for (index_t y = rows.first; y < rows.last; y++)
        for (index_t first_x = 0; first_x < s && first_x < width; first_x++) {
            index_t count = 0;
            for (index_t i = y % s; i < k; i += s) {
                const index_t from = (y - i) / s;
                if (y < i || from >= out.height) continue;
                for (index_t j = first_x; j < k; j += s)
                    taps[count++] = {from * out.row - (j - first_x) / s * out.pixel,
                                     (i * k + j) * out.channels * in.padded};
            }
            if (count == 0) continue;
            const index_t pixels = (width - first_x + s - 1) / s;
            pieces(in.padded, [&](auto kind, auto vectors, index_t first) {
                tiles<decltype(kind), vectors.value>(
                    pixels, out.at(workspace, 0, 0), out.pixel, out.channels, taps, count, turned + first, in.padded,
                    in.at(workspace, y - conv.pad, first_x - conv.pad) + first, s * in.pixel, nullptr);
            });
        }
}

// gradient[i][:] (+)= sum over pixels of in[pixel][i] * out[pixel][:], for IN inputs
template <class V, int NV, int IN>
INLINE void outer(const REAL* in, index_t in_step, index_t in_row, const REAL* out, index_t out_step, index_t out_row,
                  index_t rows, index_t pixels, REAL* gradient, index_t outputs, bool fresh) {
    constexpr index_t L = sizeof(V) / sizeof(REAL);
    V sum[IN][NV];
#pragma GCC unroll 16
    for (int i = 0; i < IN; i++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[i][v] = fresh ? zero<V>() : load<V>(gradient + i * outputs + v * L);
    for (index_t y = 0; y < rows; y++, in += in_row, out += out_row) {
        const REAL* x = in;
        const REAL* g = out;
        for (index_t p = 0; p < pixels; p++, x += in_step, g += out_step) {
            V row[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) row[v] = load<V>(g + v * L);
#pragma GCC unroll 16
            for (int i = 0; i < IN; i++) {
                const V value = x[i] - V{};
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sum[i][v] += value * row[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < IN; i++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store<V>(gradient + i * outputs + v * L, sum[i][v]);
}

// The same for a number of inputs that is known at run time, at most MOST_PIXELS.
template <class V, int NV>
static void outer_of(index_t inputs, const REAL* in, index_t in_step, index_t in_row, const REAL* out, index_t out_step,
                     index_t out_row, index_t rows, index_t pixels, REAL* gradient, index_t outputs, bool fresh) {
    switch (inputs) {
#define CASE(IN)                                                                                                    \
    case IN:                                                                                                        \
        return outer<V, NV, IN>(in, in_step, in_row, out, out_step, out_row, rows, pixels, gradient, outputs, fresh);
        CASE(1) CASE(2) CASE(3) CASE(4)
#if MOST_PIXELS >= 6
        CASE(5) CASE(6)
#endif
#if MOST_PIXELS >= 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

// Block by block of pixels that stay in the nearest cache. Tiles of a tap's inputs are dealt out: never pixels, over
// which the sums run, nor single inputs, since the compiler may round a tile of another size otherwise (it did).
static void weight_gradient(const Convolution& conv, const Frame& in, const Frame& out, REAL* workspace,
                            REAL* gradient, const Team& team) {
    constexpr index_t BLOCK = 128;  // pixels
    const index_t segment = out.width < BLOCK ? out.width : BLOCK;
    const index_t block_rows = BLOCK / segment;
    const index_t tiles = (in.channels + MOST_PIXELS - 1) / MOST_PIXELS;
    const index_t least = in.channels / tiles, larger = in.channels % tiles;  // so many have one input more
    const Part dealt = team.part(conv.kernel * conv.kernel * tiles);
    for (index_t y = 0; y < out.height; y += block_rows) {
        const index_t rows = out.height - y < block_rows ? out.height - y : block_rows;
        for (index_t x = 0; x < out.width; x += segment) {
            const index_t pixels = out.width - x < segment ? out.width - x : segment;
            const bool fresh = x == 0 && y == 0;
            for (index_t d = dealt.first; d < dealt.last; d++) {
                const index_t tap = d / tiles, tile = d % tiles;
                const index_t input = tile * least + std::min(tile, larger), inputs = least + (tile < larger);
                const REAL* from = in.at(workspace, y * conv.stride - conv.pad + tap / conv.kernel,
                                         x * conv.stride - conv.pad + tap % conv.kernel);
                REAL* to = gradient + (tap * in.channels + input) * out.padded;
                pieces(out.padded, [&](auto kind, auto vectors, index_t first) {
                    outer_of<decltype(kind), vectors.value>(
                        inputs, from + input, conv.stride * in.pixel, conv.stride * in.row,
                        out.at(workspace, y, x) + first, out.pixel, out.row, rows, pixels, to + first, out.padded,
                        fresh);
                });
            }
        }
    }
}

static void bias_gradient(const Frame& out, REAL* workspace, REAL* gradient) {
    std::memset(gradient, 0, out.padded * sizeof(REAL));
    for (index_t y = 0; y < out.height; y++)
        for (index_t x = 0; x < out.width; x++) {
            const REAL* g = out.at(workspace, y, x);
            for (index_t c = 0; c < out.channels; c++) gradient[c] += g[c];
        }
}
