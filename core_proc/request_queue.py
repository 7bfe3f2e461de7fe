"""The waiting requests in the order in which they are to be admitted.

Owned by ``LiveRequests``.  There is one total order of all live requests, chosen by the
policy; a queue always iterates in it, wherever a request comes from: ``push`` takes a new
one, ``prepend`` gives a preempted one its place back (before everything that came later).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from core_proc.request import Request

_order = attrgetter("order")


class RequestQueue(ABC):
    """Sorted by ``Request.order``, which ``order_of`` gives to each request at its arrival."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    @abstractmethod
    def order_of(self, request: Request) -> tuple:
        """The place of a request among all live ones; unique, smaller goes first."""

    def push(self, request: Request) -> None:
        """A request that has just arrived."""
        request.order = self.order_of(request)
        insort(self._requests, request, key=_order)

    def prepend(self, request: Request) -> None:
        """A preempted request, back to its place in the total order."""
        insort(self._requests, request, key=_order)

    def pop(self) -> Request:
        """Remove and return the first; IndexError if empty."""
        if not self._requests:
            raise IndexError("pop from an empty queue")
        return self._requests.pop(0)

    def peek(self) -> Request:
        """The first, left where it is; IndexError if empty."""
        if not self._requests:
            raise IndexError("peek into an empty queue")
        return self._requests[0]

    def remove(self, request: Request) -> None:
        """Take a request out of the middle; ValueError if it is not here."""
        index = bisect_left(self._requests, request.order, key=_order)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError("request is not in the queue")
        del self._requests[index]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In order; the queue may be changed meanwhile (a snapshot is walked)."""
        return iter(self._requests[:])


class FCFSQueue(RequestQueue):
    """First come, first served: by time of arrival at the frontend."""

    def order_of(self, request: Request) -> tuple:
        return (request.arrival_ns, request.key, request.child)


class PriorityQueue(RequestQueue):
    """The lower priority number first, then first come."""

    def order_of(self, request: Request) -> tuple:
        return (request.priority, request.arrival_ns, request.key, request.child)


QUEUES: dict[str, type[RequestQueue]] = {"fcfs": FCFSQueue, "priority": PriorityQueue}


def create_request_queue(policy: str) -> RequestQueue:
    """The queue of a ``scheduling_policy``; ValueError names the ones there are."""
    if policy not in QUEUES:
        raise ValueError(f"scheduling_policy: was {policy!r}; allowed: {', '.join(QUEUES)}")
    return QUEUES[policy]()
