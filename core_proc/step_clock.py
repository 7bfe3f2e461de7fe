"""How long steps take, learnt from the worker's own timings, and when the next plan is due.

Owned by ``EngineCore``.  A plan that lies in the worker's inbox makes a request that arrives
meanwhile wait for a whole step more; one that is not there when a step ends costs a message
each way.  So the next plan goes out shortly before the step under way is predicted to end.
A wrong prediction costs time and nothing else: results never depend on it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection
from statistics import median_low

import numpy as np

from core_proc.step import Step

LEAD_US = 2_000              # the next plan goes out this long before the step under way ends, ...
LEAD_SHARE = 0.1             # ... or this share of the step, where that is longer
REMEMBERED = 5               # measurements of one group
FORGOTTEN_AFTER = 100        # measurements of other groups
SINGLE_DEARER = 1.5          # than in smaller steps is a token in a step that was measured once, at most
LEAST_SHARE = 0.25           # of what chunks cost beside decodes, where all tokens cost the same


class Curve:
    """Time against size, from few and noisy measurements.

    Sizes are grouped by powers of two; a group stands for the medians of its last few, so one
    step that was disturbed moves nothing.  A group that is not met any more is forgotten: what
    steps cost changes with the length of what they attend to.
    """

    def __init__(self) -> None:
        self._groups: dict[int, deque[tuple[int, int]]] = {}     # bit length of the size → (size, µs)
        self._medians: dict[int, tuple[int, int]] = {}           # of each group
        self._met: dict[int, int] = {}                           # number of its last measurement
        self._count = 0
        self._sizes: list[int] = []                              # ascending, with ...
        self._times: list[int] = []                              # ... the µs of each

    def measured(self, size: int, time_us: int) -> None:
        """A step of ``size`` took ``time_us``."""
        self._count += 1
        key = size.bit_length()
        group = self._groups.setdefault(key, deque(maxlen=REMEMBERED))
        group.append((size, max(1, time_us)))
        medians = median_low([s for s, _ in group]), median_low([t for _, t in group])
        same = len(group) > 2 and medians == self._medians[key]
        self._medians[key], self._met[key] = medians, self._count
        forgotten = [k for k, met in self._met.items() if self._count - met > FORGOTTEN_AFTER]
        for old in forgotten:
            del self._groups[old], self._medians[old], self._met[old]
        if forgotten or not same:
            self._draw()

    def _draw(self) -> None:
        """The curve through the medians."""
        points = sorted(self._medians.items())
        self._sizes, self._times = [size for _, (size, _) in points], [time for _, (_, time) in points]
        for i, (key, _) in enumerate(points):
            if i and len(self._groups[key]) == 1:      # a single one may have been disturbed
                credible = SINGLE_DEARER * self._times[i - 1] * self._sizes[i] / self._sizes[i - 1]
                self._times[i] = min(self._times[i], int(credible))

    def at(self, size: int) -> float | None:
        """µs of a step of ``size``; None while nothing is known.

        Straight lines between what was measured and beyond; below it no shorter.
        """
        sizes, times = self._sizes, self._times
        if not sizes or not size:
            return None if size else 0.0
        i = bisect_right(sizes, size)
        if i == 0:
            return float(times[0])
        if i == len(sizes):
            return times[-1] + self._slope() * (size - sizes[-1])
        return times[i - 1] + (times[i] - times[i - 1]) * (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])

    def measured_at(self, size: int) -> float | None:
        """The same, where steps of about that size have been measured."""
        return self.at(size) if size.bit_length() in self._groups else None

    def largest_within(self, time_us: float) -> int | None:
        """The largest size that takes at most ``time_us``; None while nothing is known.

        Beyond what was measured one more at least, to find out, and never more than twice as
        large; below it in proportion.
        """
        sizes, times = self._sizes, self._times
        if not sizes:
            return None
        if times[-1] <= time_us:
            more = (time_us - times[-1]) / self._slope()
            return sizes[-1] + int(min(max(1.0, more), sizes[-1]))
        for i in range(len(sizes) - 2, -1, -1):
            if times[i] <= time_us:
                return int(sizes[i] + (sizes[i + 1] - sizes[i]) * (time_us - times[i]) / (times[i + 1] - times[i]))
        return int(sizes[0] * max(0.0, time_us) / times[0])

    def _slope(self) -> float:
        """µs for one more beyond what was measured: as between the last two groups, within what one cost
        there on average and a quarter of that (two groups that were disturbed say anything)."""
        sizes, times = self._sizes, self._times
        average = times[-1] / sizes[-1]
        if len(sizes) == 1:
            return average
        return min(max(average / 4, (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])), average)


class StepClock:
    """What decodes cost, what chunks cost beside them, and when the step under way began."""

    def __init__(self) -> None:
        self.decodes, self.chunks = Curve(), Curve()
        self._began_ns = 0           # the oldest step in flight

    def planned(self, step: Step, now_ns: int, is_oldest: bool) -> None:
        """``step`` goes out now; the worker begins it at once where nothing else is in flight."""
        known, drafts = step.num_tokens, 0
        if step.num_drafts is not None:
            known, drafts = known - step.num_drafts, int(step.num_drafts.sum())
        decodes = int(np.count_nonzero(known == step.num_steps)) + drafts
        step.shape = decodes, int(step.num_tokens.sum()) - decodes * step.num_steps
        one_us = self.predict_us(*step.shape)
        step.predicted_us = None if one_us is None else one_us * step.num_steps
        if is_oldest:
            self._began_ns = now_ns

    def ended(self, now_ns: int) -> None:
        """A result is here; the worker has begun the next step, if it has one."""
        self._began_ns = now_ns

    def learn(self, step: Step, time_us: int) -> None:
        """The worker says how long a good plan took."""
        time_us //= step.num_steps
        decodes, chunk_tokens = step.shape
        if not chunk_tokens:
            self.decodes.measured(decodes, time_us)
            return
        beside_us = self.decodes.at(decodes) or 0.0         # unknown: counted in with the chunks
        least_us = LEAST_SHARE * time_us * chunk_tokens / (decodes + chunk_tokens)
        self.chunks.measured(chunk_tokens, int(max(time_us - beside_us, least_us)))

    def predict_us(self, decodes: int, chunk_tokens: int) -> float | None:
        """A step with so many tokens of decoding requests and of chunks; None while nothing is known."""
        parts = [us for us in (self.decodes.at(decodes), self.chunks.at(chunk_tokens)) if us]
        return sum(parts) if parts else None

    def next_plan_ns(self, steps: Collection[Step]) -> int:
        """When the plan that follows ``steps``, those in flight, is due; 0: at once."""
        times_us = [step.predicted_us for step in steps]
        if not times_us or None in times_us:
            return 0
        lead_us = max(LEAD_US, LEAD_SHARE * times_us[-1])
        return self._began_ns + int(1000 * (sum(times_us) - lead_us))
