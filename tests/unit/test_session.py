"""The ledger: what a client gets, and when the core is told."""

from __future__ import annotations

import msgspec
import pytest

from frontend.session import Session, StreamOutput, core_key, mix_seed
from frontend_fakes import EOS, FakeDetokenizer, Mailbox, RecordingCore, generate, ids, resolved, rows, text_of
from protocol.codec import i32_bytes
from protocol.messages import AcceptedStream, Delta, Error, EventKind, Finish, OutputKind

ALICE, BOB = b"alice", b"bob"
PROMPT = i32_bytes([1, 2, 3, 4, 5])


class Ledger:
    """A session with fakes around it."""

    def __init__(self) -> None:
        self.core, self.box = RecordingCore(), Mailbox()
        self.session = Session(self.core, FakeDetokenizer, text_of, lambda: "fp")

    def open(self, client: bytes = ALICE, seed: int = 7, **options):
        message = generate(**options)
        return self.session.open(client, message, PROMPT, resolved(message), seed=seed,
                                 arrival_ns=1_000_000_000, request_hash=b"h")

    def out(self, stream: int, offset: int, tokens: list[int], finish: Finish = Finish.NONE, stop_token: int = -1,
            cached: int = -1, logprobs=None) -> bool:
        return self.session.output(StreamOutput(stream, offset, tokens, finish, stop_token, cached, logprobs))

    def flush(self, kind: type | None = Delta) -> list:
        self.gone = self.session.flush(self.box, 3_000_000_000)
        return self.box.take(kind)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def joined(deltas: list[Delta], index: int = 0) -> tuple[list[int], str]:
    """Tokens and text of one child, offsets checked."""
    tokens, text = [], ""
    for delta in deltas:
        if delta.index == index:
            assert (delta.token_offset, delta.char_offset) == (len(tokens), len(text))
            tokens += ids(delta.token_ids)
            text += delta.text
    return tokens, text


def test_stream_gets_its_tokens_text_and_one_end(ledger: Ledger) -> None:
    stream = ledger.open().children[0].stream
    assert ledger.flush(None) == []              # nothing before the core accepts
    ledger.session.accept(stream)
    accepted, = ledger.flush(None)
    assert isinstance(accepted, AcceptedStream)
    assert (accepted.prompt_token_ids, accepted.seed, accepted.fingerprint) == (PROMPT, 7, "fp")
    ledger.out(stream, 0, [1, 2], cached=3)
    ledger.out(stream, 2, [3])
    first = ledger.flush()
    ledger.out(stream, 3, [4], Finish.LENGTH)
    last, = ledger.flush()
    assert joined([*first, last]) == ([1, 2, 3, 4], "abcd")
    assert len(first) == 1 and first[0].usage is None
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (5, 4, 3)
    assert ledger.session.num_open == 0 and ledger.flush(None) == []


def test_first_tokens_before_accepted_still_follow_an_acceptance(ledger: Ledger) -> None:
    ledger.out(ledger.open().children[0].stream, 0, [1])
    assert [type(m) for m in ledger.flush(None)] == [AcceptedStream, Delta]


@pytest.mark.parametrize(("token", "reason", "text"), [(EOS, None, "ab"), (9, 9, "ab")])
def test_a_stop_token_is_an_id_of_the_output_but_not_text(ledger: Ledger, token: int, reason, text: str) -> None:
    stream = ledger.open(stop_token_ids=[9]).children[0].stream
    ledger.out(stream, 0, [1, 2, token], Finish.STOP, token)
    delta, = ledger.flush()
    assert (ids(delta.token_ids), delta.text, delta.finish_reason, delta.stop_reason) == (
        [1, 2, token], text, "stop", reason)


def test_include_stop_str_keeps_the_stop_tokens_text(ledger: Ledger) -> None:
    stream = ledger.open(stop_token_ids=[9], include_stop_str_in_output=True).children[0].stream
    ledger.out(stream, 0, [1, 9], Finish.STOP, 9)
    assert ledger.flush()[0].text == "ai"


def test_stop_string_ends_the_stream_here_and_aborts_it_in_the_core(ledger: Ledger) -> None:
    request = ledger.open(stop="cd", max_tokens=100)
    stream = request.children[0].stream
    ledger.out(stream, 0, [1, 3])
    deltas = ledger.flush()
    assert joined(deltas) == ([1, 3], "a")       # "c" may begin the stop string
    ledger.out(stream, 2, [4, 5, 6])             # two tokens past it
    deltas += ledger.flush()
    assert joined(deltas) == ([1, 3, 4], "a")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "cd")
    assert deltas[-1].usage.completion_tokens == 3
    assert ledger.core.aborted == [(request.key, 0)]
    assert ledger.out(stream, 5, [7], Finish.LENGTH) and ledger.flush(None) == []    # the core's later end


def test_stop_string_with_the_cores_own_end_needs_no_abort(ledger: Ledger) -> None:
    stream = ledger.open(stop="b").children[0].stream
    ledger.out(stream, 0, [1, 2, 3], Finish.LENGTH)
    delta, = ledger.flush()
    assert (ids(delta.token_ids), delta.finish_reason, delta.stop_reason) == ([1, 2], "stop", "b")
    assert ledger.core.aborted == []


def test_n_children_have_own_seeds_and_one_terminal_event(ledger: Ledger) -> None:
    request = ledger.open(n=3, prompt_logprobs=2)
    assert [child.seed for child in request.children] == [7, mix_seed(7, 1), mix_seed(7, 2)]
    assert len({child.seed for child in request.children}) == 3
    assert [child.params.prompt_logprobs for _, child in ledger.core.added] == [2, None, None]
    ledger.session.prompt_rows(request.children[0].stream, 1, *rows([2, 3, 4, 5], 3))
    for i, child in enumerate(request.children):
        ledger.out(child.stream, 0, [i + 1] * (i + 1), Finish.LENGTH, cached=32 * i)
        deltas = ledger.flush()
        assert [d.usage is not None for d in deltas] == [i == 2]
    usage = deltas[0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 6, 0)


def test_abort_hits_all_children_and_ends_with_what_there_is(ledger: Ledger) -> None:
    request = ledger.open(n=2)
    ledger.out(request.children[0].stream, 0, [1])
    ledger.session.abort(ALICE, request.key, attach_no=0)
    deltas = ledger.flush()
    assert [(d.index, ids(d.token_ids), d.finish_reason) for d in deltas] == [(0, [1], "abort"), (1, [], "abort")]
    assert deltas[-1].usage is not None and ledger.core.aborted == [(request.key, None)]
    ledger.out(request.children[1].stream, 0, [2], Finish.ABORT)
    assert ledger.flush(None) == [] and ledger.session.num_open == 0


def test_abort_of_a_stranger_or_an_older_attach_is_ignored(ledger: Ledger) -> None:
    request = ledger.open()
    ledger.session.abort(BOB, request.key, attach_no=0)
    ledger.session.abort(ALICE, request.key, attach_no=5)
    assert ledger.core.aborted == [] and ledger.session.num_open == 1


def test_clients_may_use_the_same_key(ledger: Ledger) -> None:
    mine, theirs = ledger.open(ALICE), ledger.open(BOB)
    assert mine.key == theirs.key and mine.core_key != theirs.core_key
    assert core_key(b"a", b"bk") != core_key(b"ab", b"k")


@pytest.mark.parametrize("room", range(5))
def test_a_full_queue_loses_and_repeats_nothing(ledger: Ledger, room: int) -> None:
    """Wherever the queue fills up, the client ends with the same stream."""
    stream = ledger.open(logprobs=1).children[0].stream
    ledger.box.room = room
    deltas = []
    for i, token in enumerate([1, 2, 3, 4]):
        finish = Finish.LENGTH if i == 3 else Finish.NONE
        ledger.out(stream, i, [token], finish, logprobs=rows([token], 4))
        deltas += ledger.flush()
    ledger.box.room = None
    deltas += ledger.flush()
    assert joined(deltas) == ([1, 2, 3, 4], "abcd")
    assert b"".join(d.logprobs.ids for d in deltas) == rows([1, 2, 3, 4], 2)[0].tobytes()
    assert [d.usage is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert not ledger.session.unsent and ledger.session.num_open == 0


def test_a_busy_client_delays_nobody_else(ledger: Ledger) -> None:
    mine, theirs = ledger.open(ALICE), ledger.open(BOB, key=2)
    ledger.box.busy = {ALICE}
    ledger.out(mine.children[0].stream, 0, [1])
    ledger.out(theirs.children[0].stream, 0, [2], Finish.LENGTH)
    assert [d.key for d in ledger.flush()] == [theirs.key]
    assert ledger.session.unsent


def test_a_client_that_is_gone_has_its_requests_aborted(ledger: Ledger) -> None:
    request = ledger.open()
    ledger.out(request.children[0].stream, 0, [1])
    ledger.box.gone = {ALICE}
    assert ledger.flush(None) == [] and ledger.gone == {ALICE}
    assert ledger.session.drop_client(ALICE) == 1
    assert ledger.core.aborted == [(request.key, None)]
    assert ledger.session.num_open == 0 and not ledger.session.unsent


@pytest.mark.parametrize("finish", [Finish.ROW_ERROR, Finish.MEMORY, Finish.CONVICTED])
def test_a_childs_error_is_the_one_end_of_its_request(ledger: Ledger, finish: Finish) -> None:
    request = ledger.open(n=2)
    ledger.out(request.children[1].stream, 0, [1], finish)
    messages = ledger.flush(None)
    assert [type(m) for m in messages] == [AcceptedStream, Delta, Error]
    assert (messages[-1].index, messages[-1].code) == (1, finish.name.lower())
    assert ledger.core.aborted == [(request.key, None)]     # its sibling
    ledger.out(request.children[0].stream, 0, [1], Finish.LENGTH)
    assert ledger.flush(None) == [] and ledger.session.num_open == 0


def test_losing_the_engine_is_one_typed_error_each(ledger: Ledger) -> None:
    ledger.open(ALICE, n=3)
    stream = ledger.open(BOB, key=2).children[0].stream
    ledger.out(stream, 0, [1])
    ledger.session.fail_all(Finish.ENGINE_LOST)
    errors = ledger.flush(Error)
    assert [(e.index, e.code) for e in errors] == [(None, "engine_lost")] * 2
    assert ledger.session.num_open == 0


def test_a_rejected_request_is_one_error(ledger: Ledger) -> None:
    request = ledger.open(n=2)
    ledger.session.accept(request.children[0].stream)
    ledger.session.reject(request.children[1].stream, "too_large", "max_tokens", "never fits")
    errors = ledger.flush(Error)
    assert [(e.code, e.field, e.message) for e in errors] == [("too_large", "max_tokens", "never fits")]


def test_final_is_silent_until_its_end(ledger: Ledger) -> None:
    request = ledger.open(output_kind=OutputKind.FINAL, stop="zz")
    stream = request.children[0].stream
    assert request.core_output == (OutputKind.DELTA, 4)     # stop strings must be seen
    ledger.out(stream, 0, [1, 2])
    assert ledger.flush() == []
    ledger.out(stream, 2, [3], Finish.LENGTH)
    delta, = ledger.flush()
    assert (ids(delta.token_ids), delta.text) == ([1, 2, 3], "abc")
    assert ledger.open(key=3, output_kind=OutputKind.FINAL).core_output == (OutputKind.FINAL, 1)


@pytest.mark.parametrize(("engines", "clients", "used"), [(1, 1, 1), (4, 1, 4), (4, 9, 9)])
def test_a_client_may_ask_for_rarer_deltas_than_the_engine_gives(engines: int, clients: int, used: int) -> None:
    session = Session(RecordingCore(), FakeDetokenizer, text_of, lambda: "fp", engines)
    message = msgspec.structs.replace(generate(), stream_interval=clients)
    request = session.open(ALICE, message, PROMPT, resolved(message), seed=1, arrival_ns=1, request_hash=b"")
    assert request.core_output == (OutputKind.DELTA, used)


def test_a_long_whole_answer_is_sent_in_pieces(ledger: Ledger) -> None:
    stream = ledger.open(output_kind=OutputKind.FINAL, logprobs=0, max_tokens=5000).children[0].stream
    tokens = [1 + i % 26 for i in range(2500)]
    ledger.out(stream, 0, tokens, Finish.LENGTH, logprobs=rows(tokens, 3))
    deltas = ledger.flush()
    assert joined(deltas) == (tokens, "".join(map(text_of, tokens)))
    assert len(deltas) == 3 and [d.usage is not None for d in deltas] == [False, False, True]


def test_offsets_skip_what_is_known_and_show_what_is_missing(ledger: Ledger) -> None:
    stream = ledger.open(logprobs=0).children[0].stream
    assert ledger.out(stream, 0, [1, 2], logprobs=rows([1, 2], 1))
    assert ledger.out(stream, 1, [2, 3], logprobs=rows([2, 3], 1))      # a resent beginning
    assert not ledger.out(stream, 9, [4], logprobs=rows([4], 1))        # a gap
    delta, = ledger.flush()
    assert (ids(delta.token_ids), ids(delta.logprobs.ids)) == ([1, 2, 3], [1, 2, 3])


def test_tokens_whose_prompt_logprobs_were_lost_are_asked_for_again(ledger: Ledger) -> None:
    """The core gives them no later than the first token."""
    request = ledger.open(prompt_logprobs=1, n=2)
    first, second = (child.stream for child in request.children)
    ledger.session.prompt_rows(first, 1, *rows([2, 3], 2))
    assert not ledger.out(first, 0, [9], Finish.LENGTH)
    assert ledger.out(second, 0, [9], Finish.LENGTH)     # not asked for them
    ledger.session.prompt_rows(first, 1, *rows([2, 3, 4, 5], 2))
    assert ledger.out(first, 0, [9], Finish.LENGTH)
    deltas = [delta for delta in ledger.flush() if delta.index == 0]
    assert [i for d in deltas if d.prompt_logprobs for i in ids(d.prompt_logprobs.ids)] == [2, 1, 3, 1, 4, 1, 5, 1]


def test_prompt_logprobs_arrive_once_in_order_with_their_texts(ledger: Ledger) -> None:
    request = ledger.open(prompt_logprobs=1)
    stream = request.children[0].stream
    ledger.session.prompt_rows(stream, 1, *rows([2, 3], 5))
    ledger.session.prompt_rows(stream, 2, *rows([3, 4], 5))      # begins with a row we have
    ledger.session.prompt_rows(stream, 4, *rows([5], 5))
    accepted, *deltas = ledger.flush(None)
    assert isinstance(accepted, AcceptedStream) and deltas
    ledger.out(stream, 0, [6], Finish.LENGTH)
    deltas += ledger.flush()
    found = [i for d in deltas if d.prompt_logprobs for i in ids(d.prompt_logprobs.ids)]
    assert found == rows([2, 3, 4, 5], 2)[0].ravel().tolist()
    assert [t for d in deltas for t in d.prompt_logprob_texts or ()] == [text_of(i) for i in found]


def test_metrics_count_from_arrival(ledger: Ledger) -> None:
    stream = ledger.open().children[0].stream
    ledger.session.event(stream, EventKind.ADMITTED, 1_500_000_000)
    ledger.session.event(stream, EventKind.PREEMPTED, 1_600_000_000)
    ledger.session.event(stream, EventKind.ADMITTED, 1_700_000_000)
    ledger.session.event(stream, EventKind.FIRST_TOKEN, 2_000_000_000)
    ledger.out(stream, 0, [1], Finish.LENGTH)
    metrics = ledger.flush()[0].metrics
    assert (metrics.arrival_time_s, metrics.queue_time_s, metrics.time_to_first_token_s, metrics.finished_time_s,
            metrics.num_preemptions) == (1.0, 0.5, 1.0, 3.0, 1)


def test_without_detokenizing_there_are_ids_alone(ledger: Ledger) -> None:
    stream = ledger.open(detokenize=False).children[0].stream
    ledger.out(stream, 0, [1, 2], Finish.LENGTH)
    delta, = ledger.flush()
    assert (ids(delta.token_ids), delta.text) == ([1, 2], "")


def test_a_stream_that_cannot_be_detokenized_fails_alone(ledger: Ledger) -> None:
    bad, good = ledger.open(ALICE).children[0], ledger.open(BOB, key=2).children[0]
    ledger.out(bad.stream, 0, [1])
    ledger.out(bad.stream, 1, [2**21])           # no letter
    ledger.out(good.stream, 0, [1], Finish.LENGTH)
    error, = (m for m in ledger.flush(None) if isinstance(m, Error))
    assert error.code == "internal" and len(ledger.core.aborted) == 1 and ledger.session.num_open == 0


def test_a_refusal_is_kept_for_a_busy_client(ledger: Ledger) -> None:
    ledger.session.refuse(ALICE, b"k" * 16, "invalid_value", "top_p", "was 3")
    ledger.box.busy = {ALICE}
    assert ledger.flush(None) == [] and ledger.session.unsent
    ledger.box.busy = set()
    error, = ledger.flush(None)
    assert (error.key, error.field) == (b"k" * 16, "top_p") and not ledger.session.unsent
