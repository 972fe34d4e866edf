// Batch normalisation of one image (train mode, biased variance) with LeakyReLU, forward and backward, in place.
#pragma once

#include <cmath>

#include "frame.h"

struct Normalisation {
    const REAL* weight;
    const REAL* bias;
    REAL* mean;   // of each channel, kept for the backward pass
    REAL* scale;  // 1 / sqrt(variance + eps), kept too
    REAL slope;   // of LeakyReLU; 1 for none
};

// Sum over the image's pixels of term(y, x): row by row, so that no long sum loses digits.
template <class V, int COUNT, class Term>
INLINE void sum_pixels(const Frame& f, V (&total)[COUNT], Term term) {
    for (int i = 0; i < COUNT; i++) total[i] = zero<V>();
    for (index_t y = 0; y < f.height; y++) {
        V even[COUNT], odd[COUNT];
        for (int i = 0; i < COUNT; i++) even[i] = odd[i] = zero<V>();
        index_t x = 0;
        for (; x + 2 <= f.width; x += 2) {
            term(even, y, x);
            term(odd, y, x + 1);
        }
        if (x < f.width) term(even, y, x);
        for (int i = 0; i < COUNT; i++) total[i] += even[i] + odd[i];
    }
}

template <class V>
INLINE V inverse_root(V variance, REAL eps) {
    V root;
    for (size_t i = 0; i < sizeof(V) / sizeof(REAL); i++) root[i] = REAL(1) / std::sqrt(variance[i] + eps);
    return root;
}

// raw -> normalised, scaled, shifted, through LeakyReLU -> to
static void normalise(const Normalisation& norm, REAL eps, const Frame& raw, const Frame& to, REAL* workspace) {
    const REAL count = raw.height * raw.width;
    vectors(raw.padded, [&](auto kind, index_t first) {
        using V = decltype(kind);
        V sum[1];
        sum_pixels<V, 1>(raw, sum, [&](V* s, index_t y, index_t x) { s[0] += load<V>(raw.at(workspace, y, x) + first); });
        const V mean = sum[0] / count;
        sum_pixels<V, 1>(raw, sum, [&](V* s, index_t y, index_t x) {
            const V d = load<V>(raw.at(workspace, y, x) + first) - mean;
            s[0] += d * d;
        });
        const V scale = inverse_root<V>(sum[0] / count, eps);
        store<V>(norm.mean + first, mean);
        store<V>(norm.scale + first, scale);
        const V weight = load<V>(norm.weight + first) * scale, bias = load<V>(norm.bias + first);
        for (index_t y = 0; y < raw.height; y++)
            for (index_t x = 0; x < raw.width; x++) {
                const V value = (load<V>(raw.at(workspace, y, x) + first) - mean) * weight + bias;
                store<V>(to.at(workspace, y, x) + first, value > 0 ? value : value * norm.slope);
            }
    });
}

// Replaces `raw` by the gradient of the loss with respect to it, given that with respect to `to` in frame `to`.
static void normalise_back(const Normalisation& norm, const Frame& raw, const Frame& to, REAL* workspace,
                           REAL* weight_gradient, REAL* bias_gradient) {
    const REAL count = raw.height * raw.width;
    vectors(raw.padded, [&](auto kind, index_t first) {
        using V = decltype(kind);
        const V mean = load<V>(norm.mean + first), scale = load<V>(norm.scale + first);
        const V weight = load<V>(norm.weight + first), bias = load<V>(norm.bias + first);
        const auto read = [&](index_t y, index_t x, V& normal, V& g) {
            normal = (load<V>(raw.at(workspace, y, x) + first) - mean) * scale;
            g = load<V>(to.at(workspace, y, x) + first);
            g = normal * weight + bias > 0 ? g : g * norm.slope;
        };
        V sum[2];
        sum_pixels<V, 2>(raw, sum, [&](V* s, index_t y, index_t x) {
            V normal, g;
            read(y, x, normal, g);
            s[0] += g;
            s[1] += g * normal;
        });
        for (index_t i = 0; i < index_t(sizeof(V) / sizeof(REAL)); i++) {
            const bool real = first + i < raw.channels;  // a joined frame's last lanes may belong to its neighbour
            bias_gradient[first + i] = real ? sum[0][i] : 0;
            weight_gradient[first + i] = real ? sum[1][i] : 0;
        }
        const V mean_g = sum[0] / count, mean_gn = sum[1] / count, factor = weight * scale;
        for (index_t y = 0; y < raw.height; y++)
            for (index_t x = 0; x < raw.width; x++) {
                V normal, g;
                read(y, x, normal, g);
                store<V>(raw.at(workspace, y, x) + first, factor * (g - mean_g - normal * mean_gn));
            }
    });
}
