// Vectors of the machine's width, and the walk over a pixel's channels in pieces of that width.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef REAL
#define REAL float
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define MOST_PIXELS 12  // 12 x 2 sums, 2 weights and 1 broadcast fit 32 registers
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define MOST_PIXELS 6  // 6 x 2 sums, 2 weights and 1 broadcast fit 16 registers
#else
#define VECTOR_BYTES 16
#define MOST_PIXELS 4
#endif

#define INLINE static inline __attribute__((always_inline))

using index_t = std::int64_t;

constexpr index_t LANES = VECTOR_BYTES / sizeof(REAL);
constexpr index_t QUAD = 4;  // channels are padded to a multiple of it, always

typedef REAL wide __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL quad __attribute__((vector_size(4 * sizeof(REAL))));

template <class V>
INLINE V load(const REAL* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

template <class V>
INLINE void store(REAL* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}

template <class V>
INLINE V zero() {
    return V{};
}

// Calls visit(V{}, number of vectors, first channel) for pieces that cover `channels`, a multiple of 4: pairs of wide
// vectors, a single one, then what is left in vectors of 4.
template <class Visit>
INLINE void pieces(index_t channels, Visit visit) {
    index_t first = 0;
    for (; first + 2 * LANES <= channels; first += 2 * LANES) visit(wide{}, std::integral_constant<int, 2>{}, first);
    for (; first + LANES <= channels; first += LANES) visit(wide{}, std::integral_constant<int, 1>{}, first);
    if (LANES > QUAD)
        for (; first < channels; first += QUAD) visit(quad{}, std::integral_constant<int, 1>{}, first);
}

// One vector of channels after another: visit(V{}, first channel).
template <class Visit>
INLINE void vectors(index_t channels, Visit visit) {
    index_t first = 0;
    for (; first + LANES <= channels; first += LANES) visit(wide{}, first);
    for (; first < channels; first += QUAD) visit(quad{}, first);
}
