"""What the SDK makes of the engine's messages, and of its user's input."""

from __future__ import annotations

import math

import pytest

from frontend.client_session import MAX_OPEN_CHILDREN, Batch, ClientSession
from frontend.errors import EngineDead, RequestFailed
from frontend.outputs import RequestOutput, unpack_logprobs
from frontend.prompts import (
    chat_job, conversations, labels, make_jobs, one_job, prompt_list, raw_job, stream_options, turn_job, with_params,
)
from frontend_fakes import ids, resolved, rows, text_of
from protocol.codec import i32_bytes
from protocol.messages import (
    AbortStream, AcceptedStream, Connect, Delta, Error, Generate, OutputKind, StreamMetrics, Usage, Welcome,
    from_sdk, to_sdk,
)
from protocol.sampling_params import BadRequest, RequestOutputKind, SamplingParams
from protocol.steps import LogprobRows

GREEDY = SamplingParams(temperature=0)


class Engine:
    """The other end of a ``ClientSession``."""

    def __init__(self, seed: int | None = None) -> None:
        self.session = ClientSession(seed)
        connect, = self.sent()
        assert isinstance(connect, Connect)
        self.say(Welcome(1, "model", 100, 128, True, "fp"))

    def sent(self) -> list:
        frames = [from_sdk.decode(frame) for frame in self.session.outbox]
        self.session.outbox.clear()
        return frames

    def say(self, message: object) -> None:
        self.session.receive(to_sdk.encode(message))

    def accept(self, message: Generate) -> None:
        self.say(AcceptedStream(message.key, i32_bytes([1, 2, 3]), 5, resolved(message), 10, "fp"))

    def delta(self, key: bytes, tokens: list[int], *, index: int = 0, at: int = 0, finish: str | None = None,
              end: bool | None = None, **fields) -> None:
        usage = Usage(3, at + len(tokens), 2) if (finish is not None if end is None else end) else None
        self.say(Delta(key, index, at, i32_bytes(tokens), at, "".join(map(text_of, tokens)),
                       finish_reason=finish, usage=usage, **fields))


def jobs_of(*prompts, params=GREEDY) -> list:
    return with_params(make_jobs(prompts, raw_job), params, SamplingParams())


def test_a_stream_yields_deltas_and_fills_its_output() -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of("hi")[0], streams=True, stream_interval=4)
    message, = engine.sent()
    assert (message.text, message.output_kind, message.stream_interval) == ("hi", OutputKind.DELTA, 4)
    engine.accept(message)
    engine.delta(message.key, [1, 2])
    engine.delta(message.key, [3], at=2, finish="length", metrics=StreamMetrics(10.0, 0.5, 1.0, 13.0, 2))
    assert [(d.text, d.token_ids, d.finish_reason) for d in request.deltas] == [
        ("ab", [1, 2], None), ("c", [3], "length")]
    output = request.output
    assert (output.prompt, output.prompt_token_ids) == ("hi", [1, 2, 3])
    assert output.finished and output.num_cached_tokens == 2
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("abc", [1, 2, 3])
    assert output.outputs[0].logprobs is None and output.outputs[0].cumulative_logprob is None
    metrics = output.metrics
    assert (metrics.queue_time_s, metrics.time_to_first_token_s, metrics.num_preemptions) == (0.5, 1.0, 2)
    assert metrics.mean_inter_token_time_s == 1.0 and len(metrics.inter_token_times_s) == 1
    assert engine.session.num_open == 0


def streamed(kind: RequestOutputKind | None) -> tuple[Generate, list, RequestOutput]:
    """What is asked of the engine, what the stream yields, and its output in the end; two continuations of 3 and 1 tokens."""
    engine = Engine()
    job = one_job(raw_job, "hi", SamplingParams(n=2, logprobs=0, output_kind=kind), SamplingParams(), 0)
    request = engine.session.submit(job, streams=True)
    message, = engine.sent()
    engine.accept(message)

    def delta(tokens: list[int], **fields: object) -> None:
        packed = LogprobRows(1, i32_bytes(tokens), rows(tokens, 1)[1].tobytes(), i32_bytes([1] * len(tokens)))
        engine.delta(message.key, tokens, logprobs=packed, **fields)

    delta([1, 2])
    delta([9], index=1, finish="stop", end=False)
    delta([3], at=2, finish="length")
    return message, list(request.deltas), request.output


def test_a_stream_yields_what_its_output_kind_says() -> None:
    message, deltas, whole = streamed(None)
    assert message.output_kind is OutputKind.DELTA
    assert [(d.index, d.text, d.token_ids, len(d.logprobs), d.finish_reason) for d in deltas] == [
        (0, "ab", [1, 2], 2, None), (1, "i", [9], 1, "stop"), (0, "c", [3], 1, "length")]
    assert streamed(RequestOutputKind.DELTA)[1] == deltas

    message, growing, output = streamed(RequestOutputKind.CUMULATIVE)
    assert message.output_kind is OutputKind.DELTA
    assert [(d.index, d.text, d.token_ids, len(d.logprobs), d.finish_reason) for d in growing] == [
        (0, "ab", [1, 2], 2, None), (1, "i", [9], 1, "stop"), (0, "abc", [1, 2, 3], 3, "length")]

    message, final, last_output = streamed(RequestOutputKind.FINAL_ONLY)
    assert message.output_kind is OutputKind.FINAL
    assert final == growing[1:]                                # one of each continuation, though it came in pieces
    for each in (output, last_output):
        assert each.outputs == whole.outputs and each.finished


@pytest.mark.parametrize("kind", [None, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_the_whole_is_sent_once_whatever_was_asked(kind: RequestOutputKind | None) -> None:
    engine = Engine()
    Batch(engine.session, jobs_of("a", params=SamplingParams(output_kind=kind)))
    message, = engine.sent()
    assert message.output_kind is OutputKind.FINAL


def test_logprobs_have_ranks_texts_and_a_sum_in_fp64() -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of([1], params=SamplingParams(logprobs=2))[0], streams=False)
    message, = engine.sent()
    engine.accept(message)
    total = 0.0
    for at, tokens in ((0, [5, 6]), (2, [7])):
        ids_, values, ranks = rows(tokens, 3)
        packed = LogprobRows(3, ids_.tobytes(), values.tobytes(), ranks.tobytes())
        engine.delta(message.key, tokens, at=at, finish="stop" if at else None, logprobs=packed,
                     logprob_texts=[text_of(i) for i in ids_.ravel().tolist()])
        for value in values[:, 0].tolist():
            total += value
    completion = request.output.outputs[0]
    assert completion.cumulative_logprob == total and len(completion.logprobs) == 3
    first = completion.logprobs[0]
    assert list(first) == [5, 1, 2]                           # the token itself first
    assert [(p.rank, p.decoded_token) for p in first.values()] == [(6, "e"), (1, "a"), (2, "b")]


def test_logprob_of_a_token_that_is_among_the_best_is_there_once() -> None:
    packed = LogprobRows(4, i32_bytes([7, 9, 7, -1]), rows([0], 4)[1].tobytes(), i32_bytes([2]))
    row, = unpack_logprobs(packed, None)
    assert list(row) == [7, 9] and (row[7].rank, row[9].rank) == (2, 1) and row[7].decoded_token is None


def test_prompt_logprobs_begin_with_none() -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of("x", params=SamplingParams(prompt_logprobs=0))[0], streams=False)
    message, = engine.sent()
    engine.accept(message)
    for token in (2, 3):
        engine.delta(message.key, [], prompt_logprobs=LogprobRows(1, *(c.tobytes() for c in rows([token], 1))))
    engine.delta(message.key, [4], finish="length")
    assert request.output.prompt_logprobs[0] is None
    assert [list(row) for row in request.output.prompt_logprobs[1:]] == [[2], [3]]


def test_n_ends_with_the_last_child() -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of("x", params=SamplingParams(n=2))[0], streams=False)
    key = engine.sent()[0].key
    engine.delta(key, [1], index=1, finish="stop", end=False)
    assert not request.ended
    engine.delta(key, [2], index=0, finish="length")
    assert request.ended and [o.text for o in request.output.outputs] == ["b", "a"]
    assert [o.finish_reason for o in request.output.outputs] == ["length", "stop"]


def test_a_missing_delta_is_an_error_not_a_hole() -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of("x")[0], streams=True)
    key = engine.sent()[0].key
    engine.delta(key, [1])
    engine.delta(key, [3], at=2)
    assert request.ended and isinstance(request.error, RequestFailed)
    assert request.output.outputs[0].text == "a"


def test_abort_ends_here_at_once_and_tells_the_engine() -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of("x")[0], streams=True)
    key = engine.sent()[0].key
    engine.delta(key, [1])
    engine.session.abort(request)
    abort, = engine.sent()
    assert isinstance(abort, AbortStream) and abort.key == key
    assert (request.output.outputs[0].text, request.output.outputs[0].finish_reason) == ("a", "abort")
    engine.delta(key, [2], at=1, finish="abort")              # what was under way
    engine.session.abort(request)
    assert request.output.outputs[0].text == "a" and engine.sent() == []


def test_batch_gives_results_in_input_order() -> None:
    engine, finished = Engine(), []
    batch = Batch(engine.session, jobs_of("a", "b", "c"), on_finish=lambda o: finished.append(o.prompt))
    messages = engine.sent()
    assert [m.output_kind for m in messages] == [OutputKind.FINAL] * 3
    for i in (2, 0, 1):
        assert not batch.done
        engine.delta(messages[i].key, [i + 1], finish="length")
        batch.settle()
    assert batch.done and finished == ["c", "a", "b"]
    assert [o.outputs[0].token_ids for o in batch.outputs()] == [[1], [2], [3]]
    assert [o.request_id for o in batch.outputs()] == ["0", "1", "2"]


def test_batch_keeps_a_bounded_number_open() -> None:
    engine = Engine()
    count = MAX_OPEN_CHILDREN // 16 + 3
    batch = Batch(engine.session, jobs_of(*["x"] * count, params=SamplingParams(n=16)))
    messages = engine.sent()
    assert len(messages) == MAX_OPEN_CHILDREN // 16
    engine.delta(messages[5].key, [1], finish="length")
    batch.settle()
    assert len(engine.sent()) == 1 and not batch.done


def test_batch_names_the_bad_prompt_and_aborts_the_others() -> None:
    engine = Engine()
    batch = Batch(engine.session, jobs_of("a", "b", "c"))
    messages = engine.sent()
    engine.say(Error(messages[1].key, None, "context_length_exceeded", "max_tokens", "too long"))
    with pytest.raises(BadRequest, match=r"max_tokens: too long \(prompts\[1\]\)") as caught:
        batch.settle()
    assert caught.value.code == "context_length_exceeded"
    batch.abort()
    assert [m.key for m in engine.sent()] == [messages[0].key, messages[2].key]
    assert engine.session.num_open == 0


@pytest.mark.parametrize(("code", "field", "kind"), [
    ("engine_lost", "", EngineDead), ("shutdown", "", EngineDead), ("row_error", "", RequestFailed),
    ("memory", "", RequestFailed), ("convicted", "", RequestFailed), ("queue_full", "", RequestFailed),
    ("invalid_value", "top_p", BadRequest)])
def test_errors_have_types(code: str, field: str, kind: type[Exception]) -> None:
    engine = Engine()
    request = engine.session.submit(jobs_of("x")[0], streams=True)
    engine.say(Error(engine.sent()[0].key, 0, code, field, "why"))
    assert request.ended and isinstance(request.error, kind) and "why" in str(request.error)


def test_death_of_the_engine_ends_everything() -> None:
    engine = Engine()
    requests = [engine.session.submit(job, streams=True) for job in jobs_of("a", "b")]
    engine.session.die(EngineDead("gone"))
    assert all(r.ended and isinstance(r.error, EngineDead) for r in requests)
    assert isinstance(engine.session.fatal, EngineDead)


def test_a_seeded_client_repeats_itself() -> None:
    def seeds(seed: int | None) -> list[int | None]:
        engine = Engine(seed)
        for job in jobs_of("a", "b"):
            engine.session.submit(job, streams=True)
        return [m.seed for m in engine.sent()]

    assert seeds(3) == seeds(3) != seeds(4) and len(set(seeds(3))) == 2
    assert seeds(None) == [None, None]


def test_a_requests_own_seed_is_kept_and_wraps_to_64_bits() -> None:
    engine = Engine(seed=3)
    for seed in (11, -1):
        engine.session.submit(jobs_of("x", params=SamplingParams(seed=seed))[0], streams=True)
    assert [m.seed for m in engine.sent()] == [11, 2**64 - 1]


def test_prompts_may_be_text_ids_or_dicts() -> None:
    assert prompt_list("text") == ["text"] and prompt_list([1, 2]) == [[1, 2]]
    assert prompt_list([[1], "a"]) == [[1], "a"] and prompt_list([]) == []
    assert raw_job("t").text == "t" and ids(raw_job([1, 2]).token_ids) == [1, 2]
    job = raw_job({"prompt_token_ids": [3], "cache_salt": "s"})
    assert ids(job.token_ids) == [3] and job.cache_salt == b"s"


def test_a_string_is_a_user_turn_where_there_is_a_chat_template() -> None:
    turn = turn_job("hi", True)
    assert turn.text is None and [(m.role, m.content) for m in turn.messages] == [("user", "hi")]
    assert turn_job("hi", False).text == "hi" and turn_job([1], True).messages is None
    assert chat_job("hi").messages == turn.messages and turn.prompt == "hi"


def test_one_conversation_or_several() -> None:
    one = [{"role": "user", "content": "a"}]
    assert conversations(one) == [one] and conversations([one, one]) == [one, one] and conversations("a") == ["a"]


@pytest.mark.parametrize(("make", "field"), [
    (lambda: prompt_list(5), "prompts"),
    (lambda: make_jobs(["a", 5], raw_job), "prompt"),
    (lambda: make_jobs([[1, -1]], raw_job), "prompt"),
    (lambda: make_jobs([[2**31]], raw_job), "prompt"),
    (lambda: make_jobs([[1, True]], raw_job), "prompt"),
    (lambda: make_jobs([{"text": "x"}], raw_job), "prompt"),
    (lambda: make_jobs([{"prompt": [1]}], raw_job), "prompt"),
    (lambda: make_jobs([{"prompt_token_ids": "x"}], raw_job), "prompt_token_ids"),
    (lambda: make_jobs([{"prompt": "x", "cache_salt": ""}], raw_job), "cache_salt"),
    (lambda: chat_job([]), "messages"),
    (lambda: chat_job([{"role": "user"}]), "messages"),
    (lambda: chat_job([{"role": "user", "content": 3}]), "messages"),
    (lambda: with_params(make_jobs(["a", "b"], raw_job), [GREEDY], GREEDY), "params"),
    (lambda: with_params(make_jobs(["a"], raw_job), {"n": 1}, GREEDY), "params"),
    (lambda: with_params(make_jobs(["a"], raw_job), None, GREEDY, [1, 2]), "priority"),
    (lambda: with_params(make_jobs(["a"], raw_job), None, GREEDY, 2**31), "priority"),
    (lambda: one_job(raw_job, "a", [GREEDY], GREEDY, 0), "params"),
    (lambda: jobs_of("a", params=SamplingParams(output_kind=RequestOutputKind.DELTA)), "output_kind"),
    (lambda: stream_options(2, None, RequestOutputKind.FINAL_ONLY), "stream_interval"),
    (lambda: labels(["x"], 2), "request_ids"),
    (lambda: labels(["x", "x"], 2), "request_ids"),
    (lambda: labels(["x", 5], 2), "request_ids"),
    (lambda: make_jobs(["a\ud800"], raw_job), "prompt"),
    (lambda: make_jobs([{"prompt": "x", "cache_salt": "\udfff"}], raw_job), "cache_salt"),
    (lambda: chat_job("\ud800"), "messages"),
    (lambda: chat_job([{"role": "user", "content": "\ud800"}]), "messages"),
    (lambda: turn_job("\ud800", True), "messages"),
    *((lambda value=value: stream_options(value, None), "stream_interval") for value in (0, -1, 1.0, "5", True, None, 2**20 + 1)),
    *((lambda value=value: stream_options(1, value), "request_id") for value in ("", 5, b"x")),
    *((lambda value=value: ClientSession(value), "seed") for value in ("x", 1.5, True, 2**64)),
])
def test_bad_input_is_refused_before_anything_is_sent(make, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        make()
    assert caught.value.field == field and "allowed" in str(caught.value)


def test_stream_options_are_what_the_session_takes() -> None:
    engine = Engine()
    engine.session.submit(jobs_of("a")[0], streams=True, **stream_options(7, "mine"))
    message, = engine.sent()
    assert message.stream_interval == 7 and engine.session.find("mine") is not None
    assert stream_options(2**20, None) == {"stream_interval": 2**20, "request_id": None}


def test_changed_params_are_checked_again_and_named_by_place() -> None:
    params = SamplingParams()
    params.temperature = math.nan
    with pytest.raises(BadRequest, match=r"temperature: .*prompts\[1\]"):
        with_params(make_jobs(["a", "b"], raw_job), [GREEDY, params], GREEDY)
