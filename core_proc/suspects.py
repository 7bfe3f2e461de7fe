"""Requests under suspicion of making steps fail, until they are cleared or convicted.

Owned by ``EngineCore``.  A failed step counts only against rows that it would have carried
further than they ever were; progress clears.  Two counts make a suspect.  Suspects run in
halves, then alone, nobody else beside them; only a request that fails *alone in a step*,
three times, is convicted.  Until then an innocent loses time, never its stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from core_proc.request import Request, RequestStatus

COUNTS_FOR_SUSPICION = 2
FAILURES_FOR_CONVICTION = 3


class Suspects:
    """Strikes, and the groups that wait for their trial; the first group is on trial."""

    def __init__(self) -> None:
        self._strikes: dict[Request, int] = {}
        self._alone: dict[Request, int] = {}         # failures while alone in a step
        self._groups: deque[list[Request]] = deque()

    @property
    def any(self) -> bool:
        return bool(self._strikes)

    def on_trial(self) -> frozenset[Request] | None:
        """Who may run now; None: everybody."""
        while self._groups:
            group = [r for r in self._groups[0] if r in self._strikes and r.status is not RequestStatus.FINISHED]
            if group:
                self._groups[0] = group
                return frozenset(group)
            self._groups.popleft()
        return None

    def progressed(self, requests: Iterable[Request]) -> None:
        """They got a token, or further than ever."""
        for request in requests:
            self._strikes.pop(request, None)
            self._alone.pop(request, None)

    def forget(self, request: Request) -> None:
        self.progressed((request,))

    def step_failed(self, culprits: list[Request]) -> Request | None:
        """Count a failed step against those it would have carried further; the convicted one, if any."""
        for request in culprits:
            self._strikes[request] = self._strikes.get(request, 0) + 1
        trial = self.on_trial()
        if trial is None:
            suspects = sorted((r for r in culprits if self._strikes[r] >= COUNTS_FOR_SUSPICION), key=lambda r: r.order)
            self._groups.extend(_halves(suspects))
            return None
        group = self._groups.popleft()
        if len(group) > 1:
            self._groups.extendleft(reversed(_halves(group)))
            return None
        self._groups.appendleft(group)
        suspect = group[0]
        if suspect in culprits:
            self._alone[suspect] = self._alone.get(suspect, 0) + 1
            if self._alone[suspect] >= FAILURES_FOR_CONVICTION:
                self.forget(suspect)
                return suspect
        return None


def _halves(group: list[Request]) -> list[list[Request]]:
    middle = (len(group) + 1) // 2
    return [half for half in (group[:middle], group[middle:]) if half]
