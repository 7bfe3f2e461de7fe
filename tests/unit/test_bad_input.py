"""Every field of a request: what is wrong gets one clear error that names it; what is
right passes.  The same table goes through the SDK's check and through the frontend's."""

from __future__ import annotations

import math

import msgspec
import pytest

from frontend.intake import Intake, Limits, limits_of
from frontend.process import explain_reject
from frontend_fakes import EOS, VOCAB, FakeTokenizer, generate
from protocol.codec import Reject, f32_bytes, i32_bytes, i32_column
from protocol.config import EngineConfig, SchedulerConfig
from protocol.messages import ChatMessage, EngineReady, Generate, from_sdk
from protocol.sampling_params import BadRequest, RequestOutputKind, SamplingParams, WireParams, from_wire, resolve, to_wire

NAN, INF = math.nan, math.inf
BAD = {
    "n": [0, 17, -1, 1.5, True, None, "2"],
    "max_tokens": [0, -1, 2**31, 1.0, True],
    "min_tokens": [-1, 2**31, None, 17],                       # 17: over max_tokens
    "temperature": [-0.1, 2.1, NAN, INF, "1", True],
    "top_k": [-2, 2**31, 1.5, True],
    "top_p": [0, 0.0, -0.1, 1.1, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "repetition_penalty": [0, -1, 2.1, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN, None],
    "frequency_penalty": [-2.1, 2.1, NAN, None],
    "logit_bias": [{1: 101}, {1: -101}, {1: NAN}, {-1: 0}, {"1": 0}, [1], {1: True}],
    "allowed_token_ids": [[], [-1], ["a"], [1.5], 7, [True], [2**31]],
    "bad_words": [[""], [1], "word", ["\ud800"]],
    "stop": ["", [""], [1], 3, "a\udfff", ["a", "\ud800"]],
    "stop_token_ids": [[-1], ["a"], 3, [2**31]],
    "ignore_eos": [1, None, "yes"],
    "seed": [2**64, -(2**63) - 1, 1.5, True],
    "logprobs": [-1, 21, True],
    "prompt_logprobs": [-1, 21, 1.5],
    "skip_special_tokens": [None, 0],
    "include_stop_str_in_output": [None, 1],
    "detokenize": [None, 1],
    "output_kind": [0, "DELTA", True],
}
GOOD = {
    "n": [1, 16], "max_tokens": [1, 1000, None], "min_tokens": [0, 16], "temperature": [0, 2, 0.5, None],
    "top_k": [-1, 0, 5, None], "top_p": [1e-9, 1, None], "min_p": [0, 1], "repetition_penalty": [1e-9, 2],
    "presence_penalty": [-2, 2], "frequency_penalty": [-2, 2],
    "logit_bias": [{1: 100, 2: -100.0}, {}, None], "allowed_token_ids": [[0], [1, 127], None],
    "bad_words": [["word"], [], None], "stop": ["a", ["a", "bc"], [], None],
    "stop_token_ids": [[1, 2], [], None], "ignore_eos": [True], "seed": [0, -1, 2**64 - 1, None],
    "logprobs": [0, 20, None], "prompt_logprobs": [0, 20, None], "skip_special_tokens": [False],
    "include_stop_str_in_output": [True], "detokenize": [False],
    "output_kind": [*RequestOutputKind, None],
}
LIMITS = Limits(VOCAB, 100, (EOS,))
ROOMY = Limits(VOCAB, 2000, (EOS,))


def make_intake(policy: str = "fcfs") -> Intake:
    return Intake(FakeTokenizer(), None, EngineConfig(scheduler=SchedulerConfig(scheduling_policy=policy)))


def table(values: dict) -> list:
    return [pytest.param(field, value, id=f"{field}={value!r}") for field, list_ in values.items() for value in list_]


def test_the_tables_cover_every_field() -> None:
    assert set(BAD) == set(GOOD) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("field", "value"), table(BAD))
def test_a_bad_value_is_one_error_that_names_its_field(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and len(str(caught.value)) > len(field) + 10


@pytest.mark.parametrize(("field", "value", "allowed"), [
    ("stop", 3, "a string or a list of strings"), ("stop", [1], "a string or a list of strings"),
    ("bad_words", "word", "a list of strings"), ("bad_words", [1], "a list of strings")])
def test_what_is_allowed_tells_a_string_from_a_list(field: str, value: object, allowed: str) -> None:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.message == f"was {value!r}; allowed: {allowed}"


@pytest.mark.parametrize(("field", "value"), table(GOOD))
def test_a_good_value_passes_all_the_way(field: str, value: object) -> None:
    params = SamplingParams(**{field: value})
    assert getattr(params, field) == value
    frame = from_sdk.encode(Generate(b"k" * 16, "hello", None, None, to_wire(params)))
    decoded = from_sdk.decode(frame)
    prompt_ids, resolved = make_intake().prepare(decoded, ROOMY)
    assert i32_column(prompt_ids).tolist() == [8, 5, 12, 12, 15]
    assert resolved.max_tokens == (1995 if params.max_tokens is None else params.max_tokens)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)


@pytest.mark.parametrize(("params", "field"), [
    ({"stop": "a", "detokenize": False}, "stop"), ({"min_tokens": 5, "max_tokens": 4}, "min_tokens")])
def test_contradictions_are_refused(params: dict, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**params)
    assert caught.value.field == field


@pytest.mark.parametrize(("message", "field", "says"), [
    (generate(text=""), "prompt", "empty"),
    (generate(token_ids=[]), "prompt", "empty"),
    (generate(token_ids=[1, VOCAB]), "prompt", f"[0, {VOCAB})"),
    (generate(token_ids=[-1]), "prompt", "-1"),
    (generate(token_ids=[1] * 100, max_tokens=1), "prompt", "100"),
    (generate(token_ids=[1] * 100, max_tokens=None), "prompt", "max_model_len = 100"),
    (generate(stop_token_ids=[VOCAB]), "stop_token_ids", str(VOCAB)),
    (generate(allowed_token_ids=[VOCAB]), "allowed_token_ids", str(VOCAB)),
    (generate(logit_bias={VOCAB: 1}), "logit_bias", str(VOCAB)),
    (generate(max_tokens=None, min_tokens=96), "min_tokens", "room for 95"),
])
def test_what_only_the_model_can_tell_is_refused_too(message: Generate, field: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        make_intake().prepare(message, LIMITS)
    assert caught.value.field == field and says in caught.value.message


@pytest.mark.parametrize("forbids", [
    {"bad_words": ["a", "b"]}, {"stop_token_ids": [1, 2], "min_tokens": 1},
    {"bad_words": ["a"], "stop_token_ids": [2], "min_tokens": 1}])
def test_allowed_tokens_that_are_all_forbidden_are_refused(forbids: dict) -> None:
    """Else the request would be admitted, and fail at its first token with an error that names no field."""
    with pytest.raises(BadRequest) as caught:
        make_intake().prepare(generate(allowed_token_ids=[1, 2], **forbids), LIMITS)
    assert caught.value.field == "allowed_token_ids" and all(name in caught.value.message for name in ("bad_words", "min_tokens"))
    make_intake().prepare(generate(allowed_token_ids=[1, 2, 3], **forbids), LIMITS)


def test_an_end_that_is_not_waited_for_may_be_all_that_is_allowed() -> None:
    make_intake().prepare(generate(allowed_token_ids=[EOS], min_tokens=0), LIMITS)
    make_intake().prepare(generate(allowed_token_ids=[EOS], min_tokens=1, ignore_eos=True), LIMITS)
    with pytest.raises(BadRequest, match="allowed_token_ids"):
        make_intake().prepare(generate(allowed_token_ids=[EOS], min_tokens=1), LIMITS)


def test_too_long_names_the_three_numbers() -> None:
    with pytest.raises(BadRequest) as caught:
        make_intake().prepare(generate(token_ids=[1] * 60, max_tokens=41), LIMITS)
    assert caught.value.code == "context_length_exceeded" and caught.value.field == "max_tokens"
    assert all(number in caught.value.message for number in ("60", "41", "100"))
    _, params = make_intake().prepare(generate(token_ids=[1] * 60, max_tokens=40), LIMITS)
    assert params.max_tokens == 40


def replaced(**fields) -> Generate:
    return msgspec.structs.replace(generate(), **fields)


@pytest.mark.parametrize(("message", "field"), [
    (replaced(token_ids=i32_bytes([1])), "prompt"),
    (replaced(text=None), "prompt"),
    (replaced(text=None, token_ids=b"\0"), "prompt"),
    (replaced(text=None, messages=[ChatMessage("user", "hi")]), "messages"),      # a model without a template
    (replaced(have_tokens=[b""]), "have_tokens"),
    (replaced(have_chars=[0]), "have_chars"),
    (replaced(deadline_ns=1), "deadline_ns"),
    (replaced(tenant="a"), "tenant"),
    (replaced(lora_id=1), "lora_id"),
    (replaced(grammar=b"x"), "grammar"),
    (replaced(priority=1), "priority"),
])
def test_what_the_engine_cannot_do_is_refused_not_ignored(message: Generate, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        make_intake().prepare(message, LIMITS)
    assert caught.value.field == field


def test_a_tokenizer_that_knows_more_tokens_than_the_model() -> None:
    with pytest.raises(BadRequest, match=r"prompt: token id 26 is not in \[0, 10\)"):
        make_intake().prepare(replaced(text="az"), Limits(10, 100, (EOS,)))


def test_an_eos_that_the_model_cannot_produce_is_left_out() -> None:
    """Checkpoints have such: -1, or a tokenizer of more tokens than the model.  No request may suffer from it."""
    ready = EngineReady(0, 1, 1, 100, 8, 32, VOCAB, i32_bytes([EOS, VOCAB]), "fp")
    assert limits_of(ready, (-1, 5, VOCAB + 1)) == Limits(VOCAB, 100, tuple(sorted((5, EOS))))


def test_priority_is_welcome_where_it_counts() -> None:
    make_intake("priority").prepare(replaced(priority=-3), LIMITS)


# --- a client that does not use our SDK ---------------------------------------------------

HOSTILE = [
    ("n", 17), ("n", 0), ("temperature", NAN), ("temperature", -1.0), ("top_p", 0.0), ("top_p", NAN),
    ("min_p", 1.5), ("repetition_penalty", 0.0), ("presence_penalty", INF), ("frequency_penalty", NAN),
    ("logprobs", 21), ("prompt_logprobs", 10**9), ("max_tokens", 0), ("min_tokens", 2**31), ("top_k", -2),
    ("stop", ["", "a"]), ("bad_words", [""]), ("allowed_token_ids", b""), ("stop_token_ids", i32_bytes([-5])),
    ("logit_bias_values", f32_bytes([NAN])), ("logit_bias_values", f32_bytes([1e9])), ("min_tokens", 50),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE, ids=str)
def test_a_hostile_frame_is_refused_by_name(field: str, value: object) -> None:
    base = to_wire(SamplingParams(logit_bias={3: 1.0}))
    frame = from_sdk.encode(replaced(params=msgspec.structs.replace(base, **{field: value})))
    message = from_sdk.decode(frame)
    if isinstance(message, Reject):
        key, named, text = explain_reject(frame, message.reason)
        assert key == generate().key and text
    else:
        with pytest.raises(BadRequest) as caught:
            make_intake().prepare(message, LIMITS)
        named = caught.value.field
    assert named == field.removesuffix("_values")


def test_a_token_biased_twice_is_refused() -> None:
    wire = msgspec.structs.replace(to_wire(SamplingParams()), logit_bias_ids=i32_bytes([1, 1]),
                                   logit_bias_values=f32_bytes([1, 2]))
    with pytest.raises(BadRequest, match="twice"):
        resolve(wire, vocab_size=VOCAB, prompt_len=1, max_model_len=100)


def test_columns_of_different_length_are_refused() -> None:
    wire = msgspec.structs.replace(to_wire(SamplingParams()), logit_bias_ids=i32_bytes([1, 2]),
                                   logit_bias_values=f32_bytes([1]))
    with pytest.raises(BadRequest):
        make_intake().prepare(replaced(params=wire), LIMITS)


def test_the_wire_form_comes_back_as_it_was() -> None:
    params = SamplingParams(n=2, temperature=0.5, logit_bias={3: -1.0}, stop=["a"], stop_token_ids=[4],
                            allowed_token_ids=[1], bad_words=["b"], logprobs=3)
    assert to_wire(from_wire(to_wire(params))) == to_wire(params)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x91\x1e", b"\x92\x1e\xc4\x02ab", b"\xdd\xff\xff\xff\xff",
                                   b"\x91" * 3000, b"\x93\x1e\xc4\x10" + b"k" * 16 + b"\xc0"])
def test_garbage_is_a_reject_with_a_reason(frame: bytes) -> None:
    message = from_sdk.decode(frame)
    assert isinstance(message, Reject)
    key, _field, text = explain_reject(frame, message.reason)
    assert text and (key is None or len(key) == 16)


def test_resolve_prefers_the_request_then_the_model_then_the_default() -> None:
    def temperature(own: float | None, model: dict) -> float:
        wire = to_wire(SamplingParams(temperature=own))
        return resolve(wire, vocab_size=9, prompt_len=1, max_model_len=99, defaults=model).temperature

    assert temperature(0.1, {"temperature": 0.2}) == 0.1
    assert temperature(None, {"temperature": 0.2}) == 0.2
    assert temperature(None, {}) == 1.0


def test_wire_params_have_no_field_that_the_table_forgets() -> None:
    columns = {"logit_bias_ids": "logit_bias", "logit_bias_values": "logit_bias"}
    assert {columns.get(f, f) for f in WireParams.__struct_fields__} == set(BAD) - {"seed", "output_kind"}      # they cross beside them


def test_damaged_frames_never_raise() -> None:
    """Any byte changed, any byte missing: a message, or a Reject that can be explained."""
    frame = from_sdk.encode(generate(stop=["a"], logit_bias={1: 1.0}, bad_words=["b"]))
    damaged = [frame[:i] for i in range(len(frame))]
    damaged += [frame[:i] + bytes([frame[i] ^ flip]) + frame[i + 1:]
                for i in range(len(frame)) for flip in (1, 0x20, 0x80)]
    for candidate in damaged:
        message = from_sdk.decode(candidate)
        if isinstance(message, Reject):
            explain_reject(candidate, message.reason)
        elif isinstance(message, Generate):
            try:
                make_intake().prepare(message, LIMITS)
            except BadRequest as error:
                assert error.field and error.message
