// The helpers, and the board on which a caller shows them its loop: team.h.

#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <mutex>

namespace folo {

namespace {

constexpr int SPINS = 2000;                     // about 20 µs, then the processor goes to whoever wants it
constexpr size_t STACK_BYTES = 4 << 20;         // a kernel's scratch takes up to 768 KiB of it (linear_tiles.h)

struct Board {
    alignas(64) std::atomic<uint64_t> open{0};           // the loop's number · 2³² + units that nobody has taken
    // What the loop is: written while none of its units is open, so whoever takes one has read it right.
    std::atomic<Team::UnitFunction> run{nullptr};
    std::atomic<const void*> unit{nullptr};
    std::atomic<int64_t> count{0};
    std::atomic<int> size{1};                            // of the team
    alignas(64) std::atomic<int64_t> ended{0};           // units of the loop, by helpers
    alignas(64) std::atomic<uint32_t> turn{0};           // odd from a call's first loop to its end
    std::atomic<int> sleeping{0};

    // Takes units and runs them until none is left, or none that is for this rank: how many.
    int64_t work(int rank) {
        int64_t done = 0;
        uint64_t seen = open.load(std::memory_order_acquire);
        while (const uint32_t left = static_cast<uint32_t>(seen)) {
            if (rank >= size.load(std::memory_order_relaxed)) return done;      // a helper that was put aside in a larger team
            const Team::UnitFunction function = run.load(std::memory_order_relaxed);
            const void* const given = unit.load(std::memory_order_relaxed);
            const int64_t i = count.load(std::memory_order_relaxed) - left;
            if (!open.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
            function(given, i, rank);
            ++done;
            seen = open.load(std::memory_order_acquire);
        }
        return done;
    }
};

void pause_or_yield(int waited) {
    if (waited < SPINS) __builtin_ia32_pause();
    else sched_yield();
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// The threads of the process, as many as a team has asked for so far. They stay as long as the process does.
class Helpers {
  public:
    static Helpers& get() {
        static Helpers& all = *new Helpers;
        return all;
    }

    // For a team of `threads`: its size.
    int take(int threads) {
        if (threads < 2 || !taken_.try_lock()) return 1;
        while (started_ < threads - 1 && start()) ++started_;
        const int size = std::min(started_ + 1, threads);
        if (size == 1) taken_.unlock();
        return size;
    }

    void give_back() { taken_.unlock(); }

    Board board;

  private:
    bool start() {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);     // signals are for the threads that know of them
        pthread_t thread;
        const auto run = [](void* rank) -> void* { Helpers::get().help(static_cast<int>(reinterpret_cast<intptr_t>(rank))); return nullptr; };
        const bool is_started = pthread_create(&thread, &attributes, run, reinterpret_cast<void*>(intptr_t{started_ + 1})) == 0;
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attributes);
        return is_started;
    }

    void help(int rank) {
        for (;;) {
            const uint32_t turn = board.turn.load();
            if (turn % 2 == 0 || rank >= board.size.load()) {
                ++board.sleeping;
                sleep_while(board.turn, turn);
                --board.sleeping;
                continue;
            }
            for (int waited = 0; board.turn.load(std::memory_order_acquire) == turn; ++waited) {
                if (const int64_t done = board.work(rank)) {
                    board.ended.fetch_add(done, std::memory_order_release);
                    waited = 0;
                }
                pause_or_yield(waited);
            }
        }
    }

    std::mutex taken_;
    int started_ = 0;
};

}  // namespace

Team::Team(int threads) : size(Helpers::get().take(threads)) {}

Team::~Team() {
    if (size == 1) return;
    if (is_awake_) ++Helpers::get().board.turn;
    Helpers::get().give_back();
}

void Team::share(UnitFunction run, const void* unit, int64_t count) noexcept {
    Board& board = Helpers::get().board;
    const uint64_t number = (board.open.load(std::memory_order_relaxed) >> 32) + 1;
    board.run.store(run, std::memory_order_relaxed);
    board.unit.store(unit, std::memory_order_relaxed);
    board.count.store(count, std::memory_order_relaxed);
    board.size.store(size, std::memory_order_relaxed);
    board.open.store(number << 32 | static_cast<uint64_t>(count), std::memory_order_release);
    if (!is_awake_) {
        is_awake_ = true;
        ++board.turn;
        if (board.sleeping.load()) wake_all(board.turn);
    }
    const int64_t others = count - board.work(0);
    for (int waited = 0; board.ended.load(std::memory_order_acquire) != others; ++waited) pause_or_yield(waited);
    board.ended.store(0, std::memory_order_relaxed);
}

}  // namespace folo
