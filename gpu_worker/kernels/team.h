// The threads that share the work of a call, and how they share it.
//
// The thread that calls runs the code, alone; where that comes to a loop of units that do not depend
// on each other (`for_each`), helpers take units too, one at a time. The caller waits for units that
// helpers have begun, never for a helper: one that the system has put aside between two units, or
// not woken yet, has none and delays nobody. Helpers look for work all the time while a call is
// under way that has shared a loop, and sleep outside of it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace folo {

class Team {
  public:
    // Of at most `threads`: fewer where the system gives no more, the caller alone where another call has the helpers.
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    const int size;

    // unit(i) or unit(i, rank) for each i in [0, count), by whoever is free; all are done when it returns.
    // Threads at work at the same time have different ranks in [0, size).
    template <typename Unit>
    void for_each(int64_t count, const Unit& unit) {
        const auto run = [](const void* given, int64_t i, int rank) {
            const Unit& one = *static_cast<const Unit*>(given);
            if constexpr (std::is_invocable_v<const Unit&, int64_t, int>) one(i, rank);
            else one(i);
        };
        if (size > 1 && count > 1) return share(run, &unit, count);
        for (int64_t i = 0; i < count; ++i) run(&unit, i, 0);
    }

    using UnitFunction = void (*)(const void* unit, int64_t i, int rank);

  private:
    void share(UnitFunction run, const void* unit, int64_t count) noexcept;

    bool is_awake_ = false;         // the helpers have been told of this call
};

// body(team), with at most `threads`.
template <typename Body>
void run_team(int threads, const Body& body) {
    Team team(threads);
    body(team);
}

}  // namespace folo
