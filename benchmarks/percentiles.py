"""Latencies of streams: time to first token, time per output token, gaps between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Stream:
    """One request as its client saw it, s from the start of the run."""

    due_s: float                  # when it should have been sent: a late sender hides nothing
    times_s: list[float]          # of each output token; those of one delta are equal

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with one token."""
        count = len(self.times_s) - 1
        return (self.times_s[-1] - self.times_s[0]) / count if count else None

    def gaps_s(self) -> list[float]:
        """Between deltas: tokens that come together are one arrival."""
        arrivals = sorted(set(self.times_s))
        return [b - a for a, b in zip(arrivals, arrivals[1:])]


def percentile(values: Sequence[float], quantile: float) -> float:
    """Linear between the two nearest values."""
    return float(np.percentile(values, quantile))


def summary_ms(streams: Sequence[Stream]) -> dict[str, float]:
    """"TTFT p50" and so on, ms; of the gaps of all streams together."""
    series = {"TTFT": [s.ttft_s for s in streams], "TPOT": [s.tpot_s for s in streams if s.tpot_s is not None],
              "ITL": [gap for s in streams for gap in s.gaps_s()]}
    return {f"{name} p{quantile}": 1e3 * percentile(values, quantile)
            for name, values in series.items() if values for quantile in QUANTILES}


def tokens_per_s(streams: Sequence[Stream]) -> float:
    """Output tokens over the time from the first due request to the last token."""
    last_s, first_s = max(s.times_s[-1] for s in streams), min(s.due_s for s in streams)
    return sum(len(s.times_s) for s in streams) / (last_s - first_s)
