"""What a user may give as prompts and parameters, and the jobs that become of it.

Called by the SDK before anything is sent: a wrong type is one BadRequest naming the
prompt's place in the list, and nothing has been started.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import msgspec

from protocol.codec import MAX_STREAM_INTERVAL_TOKENS, i32_bytes
from protocol.messages import ChatMessage
from protocol.sampling_params import BadRequest, RequestOutputKind, SamplingParams, WireParams, check_text, to_wire

Prompt = str | list[int] | dict[str, Any]       # text, token ids, or vLLM's dict of either
Messages = list[dict[str, str]]                 # one conversation


class Job(msgspec.Struct):
    """One request before it has a key."""

    prompt: str | None                   # as the user wrote it, for RequestOutput
    text: str | None = None
    token_ids: bytes | None = None       # i32[n]
    messages: list[ChatMessage] | None = None
    cache_salt: bytes | None = None
    params: WireParams | None = None
    seed: int | None = None
    priority: int = 0
    output_kind: RequestOutputKind | None = None     # None: as the call has it


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, (str, dict)) or _is_ids(prompts):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise BadRequest("prompts", f"was {type(prompts).__name__}; allowed: a string, a list of token ids,"
                         " or a list of these")
    return list(prompts)


def raw_job(prompt: Prompt) -> Job:
    """``prompt`` as it stands: special tokens are parsed, no chat template."""
    if isinstance(prompt, dict):
        return _from_dict(prompt)
    if isinstance(prompt, str):
        check_text("prompt", prompt)
        return Job(prompt, text=prompt)
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, (list, tuple)):
        return Job(None, token_ids=_ids(prompt))
    raise BadRequest("prompt", f"was {type(prompt).__name__}; allowed: a string or a list of token ids")


def turn_job(prompt: Prompt, has_chat_template: bool) -> Job:
    """A string is one user turn through the model's chat template, where it has one."""
    return chat_job(prompt) if isinstance(prompt, str) and has_chat_template else raw_job(prompt)


def chat_job(messages: Messages | str) -> Job:
    """One conversation; a string is one user turn."""
    if isinstance(messages, str):
        check_text("messages", messages)
        return Job(messages, messages=[ChatMessage("user", messages)])
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRequest("messages", "was empty or no list; allowed: a list of {'role': …, 'content': …}")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"} or not all(
                isinstance(part, str) for part in message.values()):
            raise BadRequest("messages", f"message {i} was {message!r}; allowed: a dict with the strings"
                             " 'role' and 'content'")
        for part in message.values():
            check_text("messages", part)
        turns.append(ChatMessage(message["role"], message["content"]))
    return Job(None, messages=turns)


def conversations(messages: Messages | Sequence[Messages] | str) -> list[Messages | str]:
    """One conversation or several, as a list."""
    if isinstance(messages, str) or not messages or isinstance(messages[0], dict):
        return [messages]
    return list(messages)


def with_params(
    jobs: list[Job], params: SamplingParams | Sequence[SamplingParams] | None,
    default: SamplingParams, priority: int | Sequence[int] = 0, streams: bool = False,
) -> list[Job]:
    """Give each job its parameters: one for all, or one per prompt."""
    if isinstance(params, (list, tuple)) and len(params) != len(jobs):
        raise BadRequest("params", f"{len(params)} were given for {len(jobs)} prompts;"
                         " allowed: one for all, or one per prompt")
    if isinstance(priority, (list, tuple)) and len(priority) != len(jobs):
        raise BadRequest("priority", f"{len(priority)} were given for {len(jobs)} prompts; allowed: one for all,"
                         " or one per prompt")
    for i, job in enumerate(jobs):
        own = params[i] if isinstance(params, (list, tuple)) else params
        own = default if own is None else own
        if not isinstance(own, SamplingParams):
            raise BadRequest("params", f"was {type(own).__name__}; allowed: SamplingParams")
        try:
            job.params = to_wire(own)
        except BadRequest as error:
            raise at_index(error, i, len(jobs)) from None
        if own.output_kind is RequestOutputKind.DELTA and not streams:
            raise at_index(BadRequest("output_kind", "was DELTA in a call that returns the whole; allowed: CUMULATIVE or FINAL_ONLY,"
                                      " or a stream"), i, len(jobs))
        job.output_kind = own.output_kind
        job.seed = None if own.seed is None else own.seed % 2**64
        job.priority = _priority(priority[i] if isinstance(priority, (list, tuple)) else priority)
    return jobs


def make_jobs(prompts: Sequence[Any], make: Any) -> list[Job]:
    """``make`` over ``prompts``; an error names the place."""
    jobs = []
    for i, prompt in enumerate(prompts):
        try:
            jobs.append(make(prompt))
        except BadRequest as error:
            raise at_index(error, i, len(prompts)) from None
    return jobs


def one_job(make: Any, prompt: Any, params: SamplingParams | None, default: SamplingParams, priority: int) -> Job:
    """The single job of a stream."""
    if isinstance(params, (list, tuple)):
        raise BadRequest("params", "was a list; allowed for one prompt: SamplingParams")
    return with_params([make(prompt)], params, default, priority, streams=True)[0]


def labels(request_ids: Sequence[str] | None, count: int) -> list[str] | None:
    """The caller's own request ids, one per prompt, each once."""
    if request_ids is None:
        return None
    if len(request_ids) != count:
        raise BadRequest("request_ids", f"{len(request_ids)} were given for {count} prompts; allowed: one per prompt")
    for label in request_ids:
        _check_label("request_ids", label)
    if len(set(request_ids)) != count:
        raise BadRequest("request_ids", "contains one twice; allowed: each once")
    return list(request_ids)


def stream_options(stream_interval: int, request_id: str | None, output_kind: RequestOutputKind | None = None) -> dict[str, Any]:
    """The keywords of ``ClientSession.submit`` that a user may choose."""
    if isinstance(stream_interval, bool) or not isinstance(stream_interval, int) or not 1 <= stream_interval <= MAX_STREAM_INTERVAL_TOKENS:
        raise BadRequest("stream_interval", f"was {stream_interval!r}; allowed: a number of tokens in [1, {MAX_STREAM_INTERVAL_TOKENS}]")
    if output_kind is RequestOutputKind.FINAL_ONLY and stream_interval != 1:
        raise BadRequest("stream_interval", f"was {stream_interval} beside output_kind FINAL_ONLY; allowed: 1, or another output_kind")
    if request_id is not None:
        _check_label("request_id", request_id)
    return {"stream_interval": stream_interval, "request_id": request_id}


def at_index(error: BadRequest, index: int, count: int) -> BadRequest:
    """The same error, saying which of several prompts it is about."""
    if count == 1:
        return error
    return BadRequest(error.field, f"{error.message} (prompts[{index}])", error.code)


def _from_dict(prompt: dict[str, Any]) -> Job:
    unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
        raise BadRequest("prompt", f"was a dict with {sorted(prompt)}; allowed: 'prompt' or"
                         " 'prompt_token_ids', and 'cache_salt'")
    kind = "prompt" if "prompt" in prompt else "prompt_token_ids"
    if isinstance(prompt[kind], dict) or isinstance(prompt[kind], str) != (kind == "prompt"):
        raise BadRequest(kind, f"was {type(prompt[kind]).__name__}; allowed:"
                         f" {'a string' if kind == 'prompt' else 'a list of token ids'}")
    job = raw_job(prompt[kind])
    if "cache_salt" in prompt:
        if not isinstance(prompt["cache_salt"], str) or not prompt["cache_salt"]:
            raise BadRequest("cache_salt", f"was {prompt['cache_salt']!r}; allowed: a non-empty string")
        check_text("cache_salt", prompt["cache_salt"])
        job.cache_salt = prompt["cache_salt"].encode()
    return job


def _is_ids(prompts: Any) -> bool:
    """A list of integers is one prompt of token ids (an empty list is no prompts)."""
    return isinstance(prompts, (list, tuple)) and bool(prompts) and isinstance(prompts[0], Integral)


def _ids(ids: Sequence[int]) -> bytes:
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < 2**31:
            raise BadRequest("prompt", f"contains {value!r}; allowed: token ids, integers from 0")
    return i32_bytes(list(ids))


def _check_label(field: str, label: Any) -> None:
    if not isinstance(label, str) or not label:
        raise BadRequest(field, f"{label!r} was given; allowed: non-empty strings")


def _priority(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise BadRequest("priority", f"was {value!r}; allowed: an integer of 32 bits, lower runs first")
    return value
