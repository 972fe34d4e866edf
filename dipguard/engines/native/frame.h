// Where a tensor of one image lies in the workspace: [rows][columns][channels], with a border around the image.
#pragma once

#include "team.h"

enum Border : index_t { NONE = 0, ZEROS = 1, REFLECT = 2, REPLICATE = 3 };

struct Frame {
    index_t offset;              // of the border's first pixel, in numbers
    index_t height, width;       // of the image, without border
    index_t channels, padded;    // what there are, and that up to a multiple of 4; the rest holds zeros
    index_t pixel, row;          // strides
    index_t top, left, bottom, right;  // the border
    index_t border;

    REAL* at(REAL* workspace, index_t y, index_t x) const {
        return workspace + offset + (y + top) * row + (x + left) * pixel;
    }
    index_t size() const { return (height + top + bottom) * row; }
};

INLINE void add_row(REAL* to, const REAL* from, index_t count) {
    for (index_t i = 0; i < count; i++) to[i] += from[i];
}

// The pixel inside the image that the border's d-th pixel before the first (or after the last) repeats.
INLINE index_t source(const Frame& f, index_t d) { return f.border == REFLECT ? d : 0; }

// Writes the border from the image, as far as these rows of it are asked for: what lies beside them, then the rows above
// and below the image that repeat one of them. (Of zeros, they "repeat" the first and the last row.)
static void fill_border(const Frame& f, REAL* workspace, Part rows) {
    if (f.border == NONE) return;
    const bool zeros = f.border == ZEROS;
    const size_t pixel = f.padded * sizeof(REAL), row = f.row * sizeof(REAL);
    const auto fill = [&](REAL* to, const REAL* from, size_t bytes) {
        zeros ? std::memset(to, 0, bytes) : std::memcpy(to, from, bytes);
    };
    for (index_t y = rows.first; y < rows.last; y++) {
        for (index_t d = 1; d <= f.left; d++) fill(f.at(workspace, y, -d), f.at(workspace, y, source(f, d)), pixel);
        for (index_t d = 1; d <= f.right; d++)
            fill(f.at(workspace, y, f.width - 1 + d), f.at(workspace, y, f.width - 1 - source(f, d)), pixel);
        const REAL* whole = f.at(workspace, y, -f.left);
        for (index_t d = 1; d <= f.top; d++)
            if (y == source(f, d)) fill(f.at(workspace, -d, -f.left), whole, row);
        for (index_t d = 1; d <= f.bottom; d++)
            if (y == f.height - 1 - source(f, d)) fill(f.at(workspace, f.height - 1 + d, -f.left), whole, row);
    }
}

// The transpose of fill_border: adds the border's gradient to the pixels of these rows that it was made from.
static void fold_border(const Frame& f, REAL* workspace, Part rows) {
    if (f.border == NONE || f.border == ZEROS) return;
    for (index_t y = rows.first; y < rows.last; y++) {
        REAL* whole = f.at(workspace, y, -f.left);
        for (index_t d = 1; d <= f.top; d++)
            if (y == source(f, d)) add_row(whole, f.at(workspace, -d, -f.left), f.row);
        for (index_t d = 1; d <= f.bottom; d++)
            if (y == f.height - 1 - source(f, d)) add_row(whole, f.at(workspace, f.height - 1 + d, -f.left), f.row);
        for (index_t d = 1; d <= f.left; d++)
            add_row(f.at(workspace, y, source(f, d)), f.at(workspace, y, -d), f.padded);
        for (index_t d = 1; d <= f.right; d++)
            add_row(f.at(workspace, y, f.width - 1 - source(f, d)), f.at(workspace, y, f.width - 1 + d), f.padded);
    }
}
