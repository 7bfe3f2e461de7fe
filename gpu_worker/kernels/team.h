// The threads of one parallel region, and how they share the work of a phase.
//
// Every kernel is a function that all threads of a Team call alike ("a phase"); its units of
// work are taken from one atomic counter, so a thread that the system has put aside delays
// nobody but its own unit. A phase ends with a barrier, which spins for a moment and then
// yields: nothing spins outside of a region. `run_team` opens the region, on the OpenMP pool
// that torch uses too.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace folo {

constexpr int SPINS = 2000;         // about 20 µs, then the processor goes to whoever wants it

struct alignas(64) Shared {
    std::atomic<int64_t> tickets{0};             // units handed out, ever; each thread overshoots a phase once
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<int32_t> turn{0};    // barriers passed
};

class Team {
  public:
    Team(Shared& shared, int rank, int size) : rank(rank), size(size), shared_(shared) {}

    const int rank, size;

    // unit(i) for each i in [0, count), by whichever thread is free; all are done when it returns.
    template <typename Unit>
    void for_each(int64_t count, Unit unit) {
        int64_t ticket;
        while ((ticket = shared_.tickets.fetch_add(1, std::memory_order_relaxed) - first_ticket_) < count) unit(ticket);
        first_ticket_ += count + size;
        barrier();
    }

    void barrier() {
        if (size == 1) return;
        const int32_t turn = shared_.turn.load(std::memory_order_relaxed);
        if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            shared_.arrived.store(0, std::memory_order_relaxed);
            shared_.turn.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; shared_.turn.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins < SPINS) __builtin_ia32_pause();
            else sched_yield();
        }
    }

  private:
    Shared& shared_;
    int64_t first_ticket_ = 0;      // the same in all threads
};

// body(team) on `threads` threads.
template <typename Body>
void run_team(int threads, Body body) {
    Shared shared;
#pragma omp parallel num_threads(threads)
    {
        Team team(shared, omp_get_thread_num(), omp_get_num_threads());
        body(team);
    }
}

}  // namespace folo
