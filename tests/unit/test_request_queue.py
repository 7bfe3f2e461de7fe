"""The founding document's queue tests: FCFS operations, prepend, factory."""

import numpy as np
import pytest

from core_proc.request import Request
from core_proc.request_queue import FCFSQueue, PriorityQueue, create_request_queue
from protocol.sampling_params import TokenParams


def request(number: int, arrival_ns: int, priority: int = 0) -> Request:
    return Request(key=number.to_bytes(16, "big"), child=0, params=TokenParams(max_tokens=1), seed=0, priority=priority,
                   arrival_ns=arrival_ns, prompt_len=1, max_total_tokens=2, stop_ids=frozenset(), root_hash=b"",
                   token_ids=np.array([1], np.int32))


def filled(queue, *requests):
    for one in requests:
        queue.push(one)
    return queue


def test_fcfs_queue_operations():
    first, second, third = request(1, 10), request(2, 20), request(3, 30)
    queue = filled(FCFSQueue(), second, third, first)    # arrival counts, not the order of pushing
    assert len(queue) == 3
    assert list(queue) == [first, second, third]
    assert queue.peek() is first and len(queue) == 3
    assert queue.pop() is first
    queue.remove(third)
    assert list(queue) == [second]
    assert queue.pop() is second
    assert len(queue) == 0
    for operation in (queue.pop, queue.peek):
        with pytest.raises(IndexError):
            operation()
    with pytest.raises(ValueError):
        queue.remove(first)


def test_fcfs_ignores_priority():
    late, early = request(1, 20, priority=-5), request(2, 10, priority=5)
    assert list(filled(FCFSQueue(), late, early)) == [early, late]


def test_queue_prepend():
    """A preempted request goes back to its place in the total order, before all that came later."""
    for queue in (FCFSQueue(), PriorityQueue()):
        oldest, preempted, newest = request(1, 10), request(2, 20), request(3, 30)
        filled(queue, oldest, preempted)
        assert queue.pop() is oldest and queue.pop() is preempted
        queue.push(newest)
        queue.prepend(preempted)
        assert list(queue) == [preempted, newest]
        queue.prepend(oldest)
        assert list(queue) == [oldest, preempted, newest]


def test_priority_queue_operations():
    low, high, high_later = request(1, 10, priority=3), request(2, 20, priority=-1), request(3, 30, priority=-1)
    queue = filled(PriorityQueue(), low, high_later, high)
    assert list(queue) == [high, high_later, low]
    queue.remove(high_later)
    assert [queue.pop(), queue.pop()] == [high, low]


def test_equal_arrivals_have_one_order():
    a, b = request(1, 10), request(2, 10)
    assert list(filled(FCFSQueue(), a, b)) == list(filled(FCFSQueue(), b, a)) == [a, b]


def test_iteration_allows_changes():
    queue = filled(FCFSQueue(), *(request(i, i) for i in range(5)))
    for one in queue:
        queue.remove(one)
    assert len(queue) == 0


def test_queue_factory():
    assert type(create_request_queue("fcfs")) is FCFSQueue
    assert type(create_request_queue("priority")) is PriorityQueue
    with pytest.raises(ValueError, match="scheduling_policy: was 'lifo'; allowed: fcfs, priority"):
        create_request_queue("lifo")
