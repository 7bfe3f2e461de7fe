"""Sampling parameters: what a user writes, what crosses the wire, and one validation.

``SamplingParams`` has vLLM's names and meanings and crosses to the frontend as
``WireParams``; ``resolve`` makes ``TokenParams`` of it, which is everything that acts on
token ids: frontend → core → worker.  A field left at None takes the model's
``generation_config`` value, then vLLM's default.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from protocol.codec import f32_bytes, f32_column, i32_bytes, i32_column

MAX_N = 16
MAX_LOGPROBS = 20
INT32_MAX = 2**31 - 1

# Filled in where neither the caller nor generation_config says anything.
DEFAULTS = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
}


def _doc(text: str) -> Meta:
    return Meta(description=text)


class BadRequest(ValueError):
    """One clear error to one caller: the field, what it was, what is allowed."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message, self.code = field, message, code


class RequestOutputKind(enum.Enum):
    """What an iterator over a request yields; vLLM's names and values."""

    CUMULATIVE = 0      # all so far, each time
    DELTA = 1           # what is new
    FINAL_ONLY = 2      # the whole, at the end


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to continue a prompt.  Names and meanings are vLLM's; the command line's sampling
    flags and their help are derived from here."""

    n: Annotated[int, _doc("number of continuations, 1 … 16")] = 1
    max_tokens: Annotated[int | None, _doc("most new tokens; None: up to max_model_len")] = 16
    min_tokens: Annotated[int, _doc("no EOS, stop id or stop string before this many new tokens")] = 0
    temperature: Annotated[float | None, _doc("0 … 2; below 1e-5 is greedy")] = None
    top_k: Annotated[int | None, _doc("keep the k best tokens; 0 or -1: all")] = None
    top_p: Annotated[float | None, _doc("keep the smallest set of best tokens with this probability, (0, 1]")] = None
    min_p: Annotated[float | None, _doc("keep tokens with at least this share of the best one's probability, [0, 1]")] = None
    repetition_penalty: Annotated[float | None, _doc("divides the logits of tokens in prompt or output, (0, 2]; 1: off")] = None
    presence_penalty: Annotated[float, _doc("taken off the logits of tokens in the output, -2 … 2")] = 0.0
    frequency_penalty: Annotated[float, _doc("the same, times how often they are there, -2 … 2")] = 0.0
    logit_bias: Annotated[dict[int, float] | None, _doc("token id → value added to its logit, -100 … 100")] = None
    allowed_token_ids: Annotated[list[int] | None, _doc("only these token ids")] = None
    bad_words: Annotated[list[str] | None, _doc("strings that must not appear")] = None
    stop: Annotated[str | list[str] | None, _doc("string or strings that end the text")] = None
    stop_token_ids: Annotated[list[int] | None, _doc("token ids that end it")] = None
    ignore_eos: Annotated[bool, _doc("EOS ends nothing")] = False
    seed: Annotated[int | None, _doc("64-bit; None: derived from the request's key")] = None
    logprobs: Annotated[int | None, _doc("report the best k logprobs of each new token, 0 … 20; None: none")] = None
    prompt_logprobs: Annotated[int | None, _doc("the same for each prompt token but the first, 0 … 20")] = None
    skip_special_tokens: Annotated[bool, _doc("leave special tokens out of the text")] = True
    include_stop_str_in_output: Annotated[bool, _doc("keep the stop string at the end of the text")] = False
    detokenize: Annotated[bool, _doc("give text, not token ids alone")] = True
    output_kind: Annotated[RequestOutputKind | None, _doc("what a stream yields; None: DELTA")] = None

    def __post_init__(self) -> None:
        validate(self)


class TokenParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Resolved parameters of one child request; lists are int32 / float32 byte columns."""

    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)]
    min_tokens: Annotated[int, Meta(ge=0, le=INT32_MAX)] = 0
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=INT32_MAX)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=2.0)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    ignore_eos: bool = False
    stop_token_ids: bytes = b""          # i32[n]; EOS ids are not among them
    logit_bias_ids: bytes = b""          # i32[n]
    logit_bias_values: bytes = b""       # f32[n]
    allowed_token_ids: bytes | None = None   # i32[n]; None: all
    bad_words_ids: bytes = b""           # i32 flat
    bad_words_lengths: bytes = b""       # i32[number of words]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    eos_token_ids: bytes = b""           # i32[n] that end this request (and wait for min_tokens)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


class WireParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``SamplingParams`` as it crosses from SDK to frontend; None still means "unset"."""

    n: Annotated[int, Meta(ge=1, le=MAX_N)]
    max_tokens: Annotated[int, Meta(ge=1, le=INT32_MAX)] | None
    min_tokens: Annotated[int, Meta(ge=0, le=INT32_MAX)]
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=2.0)] | None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)]
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)]
    logit_bias_ids: bytes
    logit_bias_values: bytes
    allowed_token_ids: bytes | None
    bad_words: list[str]
    stop: list[str]
    stop_token_ids: bytes
    ignore_eos: bool
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    detokenize: bool


def to_wire(params: SamplingParams) -> WireParams:
    """The wire form; the seed travels beside it."""
    validate(params)
    bias = params.logit_bias or {}
    return WireParams(
        n=params.n, max_tokens=params.max_tokens, min_tokens=params.min_tokens,
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
        repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias_ids=i32_bytes(list(bias)), logit_bias_values=f32_bytes(list(bias.values())),
        allowed_token_ids=None if params.allowed_token_ids is None else i32_bytes(params.allowed_token_ids),
        bad_words=list(params.bad_words or []), stop=stop_list(params),
        stop_token_ids=i32_bytes(params.stop_token_ids or []), ignore_eos=params.ignore_eos,
        logprobs=params.logprobs, prompt_logprobs=params.prompt_logprobs,
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output, detokenize=params.detokenize)


def from_wire(wire: WireParams) -> SamplingParams:
    """The user's form again: what a client sends is checked as if a user had written it."""
    bias_ids = i32_column(wire.logit_bias_ids, name="logit_bias").tolist()
    bias = dict(zip(bias_ids, f32_column(wire.logit_bias_values, len(bias_ids), "logit_bias").tolist()))
    if len(bias) < len(bias_ids):
        raise BadRequest("logit_bias", "names a token id twice; allowed: each once")
    fields = {field: getattr(wire, field) for field in WireParams.__struct_fields__
              if field not in ("logit_bias_ids", "logit_bias_values")}
    allowed = None if wire.allowed_token_ids is None else i32_column(wire.allowed_token_ids).tolist()
    return SamplingParams(**fields | {
        "logit_bias": bias, "allowed_token_ids": allowed,
        "stop_token_ids": i32_column(wire.stop_token_ids, name="stop_token_ids").tolist()})


def resolve(
    wire: WireParams, *, vocab_size: int, prompt_len: int, max_model_len: int,
    defaults: dict[str, Any] | None = None, bad_words_ids: list[list[int]] = (),
    eos_token_ids: list[int] = (),
) -> TokenParams:
    """What core and worker see of ``wire`` for a prompt of ``prompt_len`` tokens.

    ``defaults``: sampling values of the model's generation_config.  Raises BadRequest.
    """
    from_wire(wire)
    chosen = {}
    for field, fallback in DEFAULTS.items():
        value = getattr(wire, field)
        if value is None:
            value = (defaults or {}).get(field, fallback)
        chosen[field] = value
    chosen["top_k"] = max(0, chosen["top_k"])
    _check_ranges({**chosen, "n": wire.n})
    check_token_ids("stop_token_ids", i32_column(wire.stop_token_ids), vocab_size)
    bias_ids = i32_column(wire.logit_bias_ids, len(wire.logit_bias_values) // 4, "logit_bias")
    check_token_ids("logit_bias", bias_ids, vocab_size)
    if wire.allowed_token_ids is not None:
        check_token_ids("allowed_token_ids", i32_column(wire.allowed_token_ids), vocab_size)
    max_tokens = check_lengths(prompt_len, wire.max_tokens, max_model_len)
    if wire.min_tokens > max_tokens:
        raise BadRequest("min_tokens", f"was {wire.min_tokens}; the prompt of {prompt_len} tokens leaves room for"
                         f" {max_tokens} of max_model_len = {max_model_len}")
    _check_something_is_allowed(wire, bad_words_ids, eos_token_ids)
    return TokenParams(
        max_tokens=max_tokens,
        min_tokens=wire.min_tokens, presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty, ignore_eos=wire.ignore_eos,
        stop_token_ids=wire.stop_token_ids, logit_bias_ids=wire.logit_bias_ids,
        logit_bias_values=wire.logit_bias_values, allowed_token_ids=wire.allowed_token_ids,
        bad_words_ids=i32_bytes([i for word in bad_words_ids for i in word]),
        bad_words_lengths=i32_bytes([len(word) for word in bad_words_ids]),
        logprobs=wire.logprobs, prompt_logprobs=wire.prompt_logprobs,
        eos_token_ids=b"" if wire.ignore_eos else i32_bytes(eos_token_ids), **chosen)


def stop_list(params: SamplingParams) -> list[str]:
    """``stop`` as a list."""
    if params.stop is None:
        return []
    return [params.stop] if isinstance(params.stop, str) else list(params.stop)


def check_lengths(prompt_len: int, max_tokens: int | None, max_model_len: int) -> int:
    """The number of tokens that may be generated, or BadRequest naming the three numbers."""
    if prompt_len < 1:
        raise BadRequest("prompt", "was empty; at least 1 token is needed", "empty_prompt")
    room = max_model_len - prompt_len
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = "at least 1 new token" if max_tokens is None else f"max_tokens = {max_tokens}"
        raise BadRequest(
            "prompt" if room < 1 else "max_tokens",
            f"the prompt has {prompt_len} tokens and {asked} was asked for, together more than"
            f" max_model_len = {max_model_len}", "context_length_exceeded")
    return room if max_tokens is None else max_tokens


def check_token_ids(field: str, ids: Any, vocab_size: int) -> None:
    """BadRequest unless every id is in [0, vocab_size)."""
    ids = np.asarray(ids, dtype=np.int64)
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if bad.size:
        raise BadRequest(field, f"token id {bad[0]} is not in [0, {vocab_size})")


def _check_something_is_allowed(wire: WireParams, bad_words_ids: list[list[int]], eos_token_ids: list[int]) -> None:
    """BadRequest where ``allowed_token_ids`` leaves no first token."""
    if wire.allowed_token_ids is None:
        return
    forbidden = {word[0] for word in bad_words_ids if len(word) == 1}
    if wire.min_tokens > 0:
        forbidden |= {*i32_column(wire.stop_token_ids).tolist(), *(() if wire.ignore_eos else eos_token_ids)}
    if forbidden.issuperset(i32_column(wire.allowed_token_ids).tolist()):
        raise BadRequest("allowed_token_ids", "has only ids that bad_words, or min_tokens with EOS and stop_token_ids, forbid;"
                         " allowed: at least one other")


def check_text(field: str, text: str) -> None:
    """BadRequest unless UTF-8 can encode ``text``: a lone surrogate crosses no wire."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(field, f"contains {text[error.start]!r} at character {error.start}; allowed: what UTF-8 can encode") from None


# field → (low, high, low is allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "n": (1, MAX_N, True), "temperature": (0, 2, True), "top_k": (-1, INT32_MAX, True),
    "top_p": (0, 1, False), "min_p": (0, 1, True), "repetition_penalty": (0, 2, False),
    "presence_penalty": (-2, 2, True), "frequency_penalty": (-2, 2, True),
    "max_tokens": (1, INT32_MAX, True), "min_tokens": (0, INT32_MAX, True),
    "logprobs": (0, MAX_LOGPROBS, True), "prompt_logprobs": (0, MAX_LOGPROBS, True),
    "seed": (-(2**63), 2**64 - 1, True),
}
_INTEGERS = {"n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed"}
_OPTIONAL = {"max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
             "logprobs", "prompt_logprobs"}
_FLAGS = {"ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"}


def validate(params: SamplingParams) -> None:
    """BadRequest naming the first field that is wrong or contradicts another."""
    _check_ranges({field: getattr(params, field) for field in _RANGES})
    for field in _FLAGS:
        if not isinstance(getattr(params, field), bool):
            raise BadRequest(field, f"was {getattr(params, field)!r}; allowed: True or False")
    if not isinstance(params.output_kind, RequestOutputKind | None):
        raise BadRequest("output_kind", f"was {params.output_kind!r}; allowed: {', '.join(map(str, RequestOutputKind))} or None")
    for field in ("stop_token_ids", "allowed_token_ids"):
        _check_ids(field, getattr(params, field))
    _check_bias(params.logit_bias)
    _check_strings("bad_words", params.bad_words)
    _check_strings("stop", stop_list(params) if isinstance(params.stop, str) else params.stop)
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise BadRequest("allowed_token_ids", "was empty; give at least one id or None")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise BadRequest("min_tokens", f"was {params.min_tokens}; at most max_tokens = {params.max_tokens}")
    if params.stop and not params.detokenize:
        raise BadRequest("stop", "needs detokenize=True: stop strings are found in the text")


def _check_ranges(values: dict[str, Any]) -> None:
    for field, value in values.items():
        low, high, low_allowed = _RANGES[field]
        if value is None and field in _OPTIONAL:
            continue
        kind = int if field in _INTEGERS else (int, float)
        allowed = f"{'[' if low_allowed else '('}{low}, {high}]"
        if isinstance(value, bool) or not isinstance(value, kind):
            wanted = "an integer" if field in _INTEGERS else "a number"
            raise BadRequest(field, f"was {value!r}; allowed: {wanted} in {allowed}")
        if not math.isfinite(value) or not low <= value <= high or (value == low and not low_allowed):
            raise BadRequest(field, f"was {value!r}; allowed: {allowed}")


def _check_ids(field: str, ids: Any) -> None:
    if ids is None:
        return
    if not isinstance(ids, (list, tuple)):
        raise BadRequest(field, f"was {ids!r}; allowed: a list of token ids")
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INT32_MAX:
            raise BadRequest(field, f"contains {value!r}; allowed: token ids, integers from 0")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise BadRequest("logit_bias", f"was {bias!r}; allowed: a dict of token id to number")
    _check_ids("logit_bias", list(bias))
    for token, value in bias.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
            raise BadRequest("logit_bias", f"{value!r} for token {token}; allowed: [-100, 100]")


def _check_strings(field: str, strings: Any) -> None:
    if strings is None:
        return
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        allowed = "a string or a list of strings" if field == "stop" else "a list of strings"
        raise BadRequest(field, f"was {strings!r}; allowed: {allowed}")
    if any(not s for s in strings):
        raise BadRequest(field, "contains an empty string; allowed: non-empty strings")
    for text in strings:
        check_text(field, text)
