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

// Rows of the image are dealt out, and the sums over pixels are sums of rows' sums: so no long sum loses digits, and each
// member of a team can add them all up, in the same order whoever made them.
// rows_of[i][y][first]: the sum over row y of the i-th number that term(sums, y, x) adds to.
template <class V, int COUNT, class Term>
INLINE void sum_rows(const Frame& f, Part rows, REAL* rows_of, index_t first, Term term) {
    for (index_t y = rows.first; y < rows.last; y++) {
        V even[COUNT], odd[COUNT];
        for (int i = 0; i < COUNT; i++) even[i] = odd[i] = zero<V>();
        index_t x = 0;
        for (; x + 2 <= f.width; x += 2) {
            term(even, y, x);
            term(odd, y, x + 1);
        }
        if (x < f.width) term(even, y, x);
        for (int i = 0; i < COUNT; i++) store<V>(rows_of + (i * f.height + y) * f.padded + first, even[i] + odd[i]);
    }
}

template <class V>
INLINE V total(const Frame& f, const REAL* rows_of, index_t first) {
    V sum = zero<V>();
    for (index_t y = 0; y < f.height; y++) sum += load<V>(rows_of + y * f.padded + first);
    return sum;
}

template <class V>
INLINE V inverse_root(V variance, REAL eps) {
    V root;
    for (size_t i = 0; i < sizeof(V) / sizeof(REAL); i++) root[i] = REAL(1) / std::sqrt(variance[i] + eps);
    return root;
}

// raw -> normalised, scaled, shifted, through LeakyReLU -> to. `sums` is room for two sums of each row.
static void normalise(const Normalisation& norm, REAL eps, const Frame& raw, const Frame& to, REAL* workspace,
                      REAL* sums, const Team& team) {
    const REAL count = raw.height * raw.width;
    const Part rows = team.part(raw.height);
    REAL* squares = sums + raw.height * raw.padded;
    vectors(raw.padded, [&](auto kind, index_t first) {
        using V = decltype(kind);
        sum_rows<V, 1>(raw, rows, sums, first,
                       [&](V* s, index_t y, index_t x) { s[0] += load<V>(raw.at(workspace, y, x) + first); });
    });
    team.wait();
    vectors(raw.padded, [&](auto kind, index_t first) {
        using V = decltype(kind);
        const V mean = total<V>(raw, sums, first) / count;
        sum_rows<V, 1>(raw, rows, squares, first, [&](V* s, index_t y, index_t x) {
            const V d = load<V>(raw.at(workspace, y, x) + first) - mean;
            s[0] += d * d;
        });
    });
    team.wait();
    vectors(raw.padded, [&](auto kind, index_t first) {
        using V = decltype(kind);
        const V mean = total<V>(raw, sums, first) / count;
        const V scale = inverse_root<V>(total<V>(raw, squares, first) / count, eps);
        if (team.leads()) {
            store<V>(norm.mean + first, mean);
            store<V>(norm.scale + first, scale);
        }
        const V weight = load<V>(norm.weight + first) * scale, bias = load<V>(norm.bias + first);
        for (index_t y = rows.first; y < rows.last; y++)
            for (index_t x = 0; x < raw.width; x++) {
                const V value = (load<V>(raw.at(workspace, y, x) + first) - mean) * weight + bias;
                store<V>(to.at(workspace, y, x) + first, value > 0 ? value : value * norm.slope);
            }
    });
}

// Replaces `raw` by the gradient of the loss with respect to it, given that with respect to `to` in frame `to`.
static void normalise_back(const Normalisation& norm, const Frame& raw, const Frame& to, REAL* workspace,
                           REAL* weight_gradient, REAL* bias_gradient, REAL* sums, const Team& team) {
    const REAL count = raw.height * raw.width;
    const Part rows = team.part(raw.height);
    // Calls visit(V{}, first channel, read), where read(y, x, normal, g) gives the normalised value and its gradient.
    const auto each_vector = [&](auto visit) {
        vectors(raw.padded, [&](auto kind, index_t first) {
            using V = decltype(kind);
            const V mean = load<V>(norm.mean + first), scale = load<V>(norm.scale + first);
            const V weight = load<V>(norm.weight + first), bias = load<V>(norm.bias + first);
            visit(kind, first, [&](index_t y, index_t x, V& normal, V& g) {
                normal = (load<V>(raw.at(workspace, y, x) + first) - mean) * scale;
                g = load<V>(to.at(workspace, y, x) + first);
                g = normal * weight + bias > 0 ? g : g * norm.slope;
            });
        });
    };
    each_vector([&](auto kind, index_t first, auto read) {
        using V = decltype(kind);
        sum_rows<V, 2>(raw, rows, sums, first, [&](V* s, index_t y, index_t x) {
            V normal, g;
            read(y, x, normal, g);
            s[0] += g;
            s[1] += g * normal;
        });
    });
    team.wait();
    each_vector([&](auto kind, index_t first, auto read) {
        using V = decltype(kind);
        const V sum_g = total<V>(raw, sums, first);
        const V sum_gn = total<V>(raw, sums + raw.height * raw.padded, first);
        for (index_t i = 0; team.leads() && i < index_t(sizeof(V) / sizeof(REAL)); i++) {
            const bool real = first + i < raw.channels;  // a joined frame's last lanes may belong to its neighbour
            bias_gradient[first + i] = real ? sum_g[i] : 0;
            weight_gradient[first + i] = real ? sum_gn[i] : 0;
        }
        const V mean_g = sum_g / count, mean_gn = sum_gn / count;
        const V factor = load<V>(norm.weight + first) * load<V>(norm.scale + first);
        for (index_t y = rows.first; y < rows.last; y++)
            for (index_t x = 0; x < raw.width; x++) {
                V normal, g;
                read(y, x, normal, g);
                store<V>(raw.at(workspace, y, x) + first, factor * (g - mean_g - normal * mean_gn));
            }
    });
}
