// Threads that work on one image together. Work is dealt in such a way that each number is made by the code that makes
// it on a single thread, from the same sums in the same order: a result does not depend on the team, bit for bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include "simd.h"

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE()
#endif

// Holds threads up until all have come. It spins, since an instruction ends every 10 us and OpenMP's own barrier may
// put threads to sleep (OMP_WAIT_POLICY=passive); after a while it lets others have the core, who may be those awaited.
struct alignas(64) Barrier {
    std::atomic<index_t> arrived{0};
    alignas(64) std::atomic<index_t> round{0};

    void wait(index_t members) {
        constexpr int SPINS = 2000;
        const index_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins < SPINS)
                PAUSE();
            else
                std::this_thread::yield();
    }
};

// From first to before last.
struct Part {
    index_t first, last;
};

struct Team {
    index_t member, members;
    Barrier* barrier;

    // This member's part of `count` rows. Frames of one height are dealt alike in every instruction.
    Part part(index_t count) const { return {count * member / members, count * (member + 1) / members}; }
    bool leads() const { return member == 0; }
    void wait() const {
        if (members > 1) barrier->wait(members);
    }
};
