// Bilinear upsampling by 2 (half-pixel centres, as torch's align_corners=False), cut to the size of the target.
#pragma once

#include "frame.h"

// The two sources of pixel `to` and their weights.
struct Pair {
    index_t low, high;
    REAL low_weight, high_weight;
};

INLINE Pair sources(index_t to, index_t size) {
    const index_t centre = to / 2;
    const index_t other = to % 2 ? (centre + 1 < size ? centre + 1 : centre) : (centre > 0 ? centre - 1 : centre);
    return {centre, other, REAL(.75), REAL(.25)};
}

// The share of source `from` in pixel `to`.
INLINE REAL share(index_t from, index_t to, index_t size) {
    const Pair p = sources(to, size);
    return (p.low == from ? p.low_weight : 0) + (p.high == from ? p.high_weight : 0);
}

// `first`: the channel of `to` at which the upsampled channels begin.
static void upsample(const Frame& from, const Frame& to, index_t first, REAL* workspace, const Team& team) {
    const Part rows = team.part(to.height);
    for (index_t y = rows.first; y < rows.last; y++) {
        const Pair v = sources(y, from.height);
        for (index_t x = 0; x < to.width; x++) {
            const Pair h = sources(x, from.width);
            const REAL* a = from.at(workspace, v.low, h.low);
            const REAL* b = from.at(workspace, v.low, h.high);
            const REAL* c = from.at(workspace, v.high, h.low);
            const REAL* d = from.at(workspace, v.high, h.high);
            const REAL wa = v.low_weight * h.low_weight, wb = v.low_weight * h.high_weight;
            const REAL wc = v.high_weight * h.low_weight, wd = v.high_weight * h.high_weight;
            REAL* out = to.at(workspace, y, x) + first;
            vectors(from.padded, [&](auto kind, index_t i) {
                using V = decltype(kind);
                store<V>(out + i, load<V>(a + i) * wa + load<V>(b + i) * wb + load<V>(c + i) * wc + load<V>(d + i) * wd);
            });
        }
    }
}

// Replaces frame `from` by the gradient with respect to it, given that with respect to `to` in frame `to`. A pixel of
// `from` went into four columns of `to` at most, 2 x - 1 to 2 x + 2, of which it shares two with its neighbour: each
// column's sum over rows is made once.
static void upsample_back(const Frame& from, const Frame& to, index_t first, REAL* workspace, const Team& team) {
    const Part rows = team.part(from.height);
    for (index_t y = rows.first; y < rows.last; y++) {
        const index_t top = std::max(index_t(0), 2 * y - 1), count = std::min(to.height, 2 * y + 3) - top;
        REAL weights[4];
        for (index_t i = 0; i < count; i++) weights[i] = share(y, top + i, from.height);
        vectors(from.padded, [&](auto kind, index_t lane) {
            using V = decltype(kind);
            const auto column = [&](index_t x) {
                V sum = zero<V>();
                if (x < 0 || x >= to.width) return sum;  // outside: nothing, whatever its share
                const REAL* g = to.at(workspace, top, x) + first + lane;
                for (index_t i = 0; i < count; i++) sum += load<V>(g + i * to.row) * weights[i];
                return sum;
            };
            V sums[4] = {zero<V>(), zero<V>(), column(-1), column(0)};
            for (index_t x = 0; x < from.width; x++) {
                sums[0] = sums[2], sums[1] = sums[3], sums[2] = column(2 * x + 1), sums[3] = column(2 * x + 2);
                V sum = zero<V>();
                for (index_t i = 0; i < 4; i++) sum += sums[i] * share(x, 2 * x - 1 + i, from.width);
                store<V>(from.at(workspace, y, x) + lane, sum);
            }
        });
    }
}
