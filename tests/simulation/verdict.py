"""Whether a stream ended as it had to."""

from __future__ import annotations

from protocol.messages import EventKind, Finish
from simulation.fake_frontend import Stream
from simulation.faults import Faults
from simulation.world import BLOCK, World

CONVICTING_FAILURES = 3


def judge(stream: Stream, world: World, faults: Faults) -> None:
    """Equal to the reference, as far as it came; no bad end without a cause."""
    if stream.refusal is not None:
        _judge_refusal(stream, world)
        return
    wish, finish = stream.wish, stream.finish
    tokens, expected = list(stream.token_ids), wish.expected()
    if finish in (Finish.STOP, Finish.LENGTH):
        assert tokens == expected, f"stream {stream.stream}: {tokens} instead of {expected}"
        stops = expected[-1] in wish.all_stop_ids and len(expected) >= wish.min_tokens
        assert (finish, stream.stop_token) == ((Finish.STOP, expected[-1]) if stops else (Finish.LENGTH, -1))
        if wish.prompt_logprobs is not None and len(wish.forced) < len(expected):
            assert stream.prompt_logprobs == wish.expected_prompt_logprobs(), "prompt logprobs"
    else:
        assert tokens == expected[:len(tokens)], "what came before the error"
        causes = {Finish.ROW_ERROR: wish.seed in faults.bad_rows, Finish.MEMORY: wish.seed in faults.no_memory,
                  Finish.CONVICTED: faults.alone[wish.seed] >= CONVICTING_FAILURES}
        assert causes.get(finish), f"{finish.name} without a cause"
    if wish.logprobs is not None:
        assert stream.logprobs == wish.expected_logprobs(tokens)[len(wish.forced):], "logprobs"
    _judge_cached(stream, world)
    if not world.loss:
        _judge_events(stream)


def _judge_refusal(stream: Stream, world: World) -> None:
    code, message = stream.refusal
    wish = stream.wish
    if code == "context_length_exceeded":
        length = len(wish.prompt) + wish.max_tokens
        assert length > world.max_model_len or -(-(length - 1) // BLOCK) > world.num_blocks, message
    elif code == "queue_full":
        assert world.config.max_num_queued_reqs < 100, message
    else:
        assert code == "conflict" and world.loss and wish.attach_no, f"{code}: {message}"    # an abort was lost


def _judge_cached(stream: Stream, world: World) -> None:
    """What it says of the prefix cache can be."""
    cached, known = stream.cached_tokens, len(stream.wish.prompt) + len(stream.wish.forced)
    if cached > 0:
        assert cached % BLOCK == 0 and (world.loss or cached < known), f"{cached} cached tokens of {known}"
        assert stream.wish.prompt_logprobs is None


def _judge_events(stream: Stream) -> None:
    """Admitted once more than preempted, unless it ended while waiting; its first token was told once."""
    events = stream.events
    assert events[EventKind.ADMITTED] - events[EventKind.PREEMPTED] in (0, 1), f"{events}"
    gained = len(stream.token_ids) > len(stream.wish.forced)
    first = 1 if gained and not stream.wish.forced else 0
    assert events[EventKind.FIRST_TOKEN] == first, f"first token told {events[EventKind.FIRST_TOKEN]} times"
