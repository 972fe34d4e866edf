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

INLINE void add_scaled(REAL* to, const REAL* from, REAL weight, index_t lanes) {
    vectors(lanes, [&](auto kind, index_t i) {
        using V = decltype(kind);
        store<V>(to + i, load<V>(to + i) + load<V>(from + i) * weight);
    });
}

// `first`: the channel of `to` at which the upsampled channels begin.
static void upsample(const Frame& from, const Frame& to, index_t first, REAL* workspace) {
    for (index_t y = 0; y < to.height; y++) {
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

// Replaces frame `from` by the gradient with respect to it, given that with respect to `to` in frame `to`. First the
// rows of `to` that a row of `from` went into are summed into `room`, one row of numbers, then its columns.
static void upsample_back(const Frame& from, const Frame& to, index_t first, REAL* workspace, REAL* room) {
    const index_t lanes = from.padded;
    for (index_t y = 0; y < from.height; y++) {
        std::memset(room, 0, to.width * lanes * sizeof(REAL));
        for (index_t ty = 2 * y > 0 ? 2 * y - 1 : 0; ty < to.height && ty <= 2 * y + 2; ty++) {
            const REAL weight = share(y, ty, from.height);
            for (index_t x = 0; x < to.width; x++) add_scaled(room + x * lanes, to.at(workspace, ty, x) + first, weight, lanes);
        }
        for (index_t x = 0; x < from.width; x++) {
            REAL* out = from.at(workspace, y, x);
            std::memset(out, 0, lanes * sizeof(REAL));
            for (index_t tx = 2 * x > 0 ? 2 * x - 1 : 0; tx < to.width && tx <= 2 * x + 2; tx++)
                add_scaled(out, room + tx * lanes, share(x, tx, from.width), lanes);
        }
    }
}
