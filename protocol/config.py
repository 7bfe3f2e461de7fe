"""The settings of one engine: frozen structs, one docstring and unit per field.

Command line flags, environment twins (``FOLOVLLM_<FIELD>``), the help text and the
keywords of ``LLMEngine`` are derived from these structs, never typed twice.  launch.py
resolves them once and writes them into the run directory; every child reads that file.
"""

from __future__ import annotations

import argparse
import os
import types
import typing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.codec import BLOCK_SIZE_TOKENS, MAX_STREAM_INTERVAL_TOKENS


def _doc(text: str, **bounds: Any) -> Meta:
    return Meta(description=text, **bounds)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model, in which arithmetic, on which device."""

    model: Annotated[str, _doc("'default' (SmolLM2-135M-Instruct), a local directory, a GGUF file or a hub id", min_length=1)] = "default"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], _doc("arithmetic of the weights and of the KV cache; auto: bfloat16 where the device multiplies it fast")] = "auto"
    quantization: Annotated[Literal["none", "int8", "int4"], _doc("weights of 8 or 4 bits and int8 inputs, on a CPU; made from the checkpoint at the first start; none: weights of dtype")] | None = "none"
    kv_cache_dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8"], _doc("what K and V are stored as; int8: with a scale for each token and head; float16: on a CPU beside dtype float16 only; auto: the model's dtype")] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], _doc("where the worker runs; auto: cuda where there is one")] = "auto"
    max_model_len: Annotated[int, _doc("most tokens of prompt and output together; default: what the model allows", ge=1, le=2**24)] | None = None
    generation_config: Annotated[Literal["auto", "vllm"], _doc("auto: default sampling values from the model's generation_config.json; vllm: neutral ones")] = "auto"
    num_threads: Annotated[int, _doc("threads of the CPU worker; default: CPU affinity and cgroup quota", ge=1, le=1024)] | None = None
    seed: Annotated[int, _doc("mixed into the seed of every request that gives none; default: each request's own key alone", ge=0, le=2**63 - 1)] | None = None

    def __post_init__(self) -> None:
        if self.quantization is None:                     # as vLLM has it
            msgspec.structs.force_setattr(self, "quantization", "none")


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests share steps and KV memory."""

    max_num_seqs: Annotated[int, _doc("most requests running at once", ge=1, le=4096)] = 64
    max_num_batched_tokens: Annotated[int, _doc("token budget of a step; default: about 100 ms of work on a CPU, 2048 on CUDA", ge=1, le=2**20)] | None = None
    max_step_ms: Annotated[float, _doc("milliseconds that a step may take, and so a running request waits for its next token; fewer tokens and requests share a step", ge=1.0, le=60_000.0)] | None = None
    max_decode_steps: Annotated[int, _doc("most decode steps in one plan when nobody waits; streams get up to that many tokens at once", ge=1, le=64)] = 4
    max_plan_ms: Annotated[float, _doc("milliseconds that the decode steps of one plan may take together; a request that arrives waits for them", ge=0.0, le=60_000.0)] = 20.0
    scheduling_policy: Annotated[Literal["fcfs", "priority"], _doc("order of requests: arrival, or (priority, arrival) with the lower priority first")] = "fcfs"
    enable_prefix_caching: Annotated[bool, _doc("share the KV blocks of equal prompt beginnings")] = True
    block_size: Annotated[Literal[32], _doc("tokens of a KV block")] = BLOCK_SIZE_TOKENS
    kv_cache_memory_bytes: Annotated[int, _doc("bytes for K and V; default: what max_num_seqs full-length requests need, at most 40 % of what is available", ge=1)] | None = None
    num_kv_blocks: Annotated[int, _doc("KV blocks, instead of bytes", ge=1, le=2**31 - 1)] | None = None
    watermark: Annotated[float, _doc("share of KV blocks that an admission leaves free while others run", ge=0.0, le=0.5)] = 0.01
    window: Annotated[int, _doc("steps in flight; the second goes out when the first is about to end", ge=1, le=2)] = 2
    max_num_queued_reqs: Annotated[int, _doc("most waiting requests; more are refused", ge=1)] = 10_000
    speculative: Annotated[Literal["none", "ngram"], _doc("guess tokens that are checked in one step; ngram: by what followed the same tokens earlier in the request")] = "none"
    num_speculative_tokens: Annotated[int, _doc("most tokens guessed at once for a request", ge=1, le=64)] = 7
    prompt_lookup_max: Annotated[int, _doc("most tokens that must have stood together before", ge=1, le=32)] = 4
    prompt_lookup_min: Annotated[int, _doc("fewest tokens that must have stood together before", ge=1, le=32)] = 2

    def __post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(f"prompt_lookup_min: was {self.prompt_lookup_min}; allowed: at most prompt_lookup_max = {self.prompt_lookup_max}")


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the engine runs as a program."""

    run_dir: Annotated[str, _doc("directory of sockets, lock and progress pages, mode 0700; default: $XDG_RUNTIME_DIR/folovllm/default, else ~/.cache/folovllm/run/default", min_length=1)] | None = None
    stream_interval: Annotated[int, _doc("tokens between two deltas of a stream; clients may ask for more", ge=1, le=MAX_STREAM_INTERVAL_TOKENS)] = 1
    shutdown_timeout: Annotated[float, _doc("seconds that open streams get to finish after Ctrl-C or SIGTERM; a second signal ends them at once", ge=0.0, le=3600.0)] = 0.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _doc("least severe lines to log, on stderr")] = "warning"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything; what launch.py writes into the run directory."""

    model: ModelConfig = ModelConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    run: RunConfig = RunConfig()
    model_dir: str = ""              # resolved by launch.py: a checkpoint directory on this machine
    model_name: str = ""             # what clients see


SECTIONS: dict[str, type] = {"model": ModelConfig, "scheduler": SchedulerConfig, "run": RunConfig}


class ConfigError(ValueError):
    """A setting that cannot be; the message names the field and what is allowed."""


def fields() -> dict[str, tuple[str, Any, Any, str]]:
    """Every setting: name → (section, type, default, description)."""
    found = {}
    for section, struct in SECTIONS.items():
        hints = typing.get_type_hints(struct, include_extras=True)
        for info in msgspec.structs.fields(struct):
            hint = hints[info.name]
            found[info.name] = (section, _plain_type(hint), info.default, _description(hint))
    return found


def build(section: str, values: dict[str, Any]) -> Any:
    """A section struct from plain values; ConfigError names what is wrong."""
    try:
        return msgspec.convert(values, SECTIONS[section])
    except msgspec.ValidationError as error:
        raise ConfigError(_clear(str(error), values)) from None


def from_values(values: dict[str, Any], base: EngineConfig | None = None) -> EngineConfig:
    """``base`` with settings by name put over it; unknown names are refused."""
    base = base or EngineConfig()
    known = fields()
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such setting; allowed: {', '.join(sorted(known))}")
    sections = {}
    for section in SECTIONS:
        current = msgspec.structs.asdict(getattr(base, section))
        current |= {name: value for name, value in values.items() if known[name][0] == section}
        sections[section] = build(section, current)
    return msgspec.structs.replace(base, **sections)


def add_arguments(parser: argparse.ArgumentParser, names: list[str] | None = None) -> None:
    """One flag per setting, with its unit, its default and its environment twin."""
    for name, (_section, kind, default, text) in fields().items():
        if names is not None and name not in names:
            continue
        flag = "--" + name.replace("_", "-")
        shown = "" if default is None else f" (default: {default})"
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS,
                                   "help": f"{text}{shown} [env FOLOVLLM_{name.upper()}]".replace("%", "%%")}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), type=type(typing.get_args(kind)[0]), **options)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **options)


def from_arguments(namespace: argparse.Namespace, environ: dict[str, str] | None = None) -> EngineConfig:
    """Flags win over the environment, the environment over the defaults."""
    values = _from_environment(os.environ if environ is None else environ)
    values |= {name: getattr(namespace, name) for name in fields() if hasattr(namespace, name)}
    return from_values(values)


def to_arguments(config: EngineConfig) -> list[str]:
    """The command line that gives ``config`` back (settings that differ from the defaults)."""
    arguments = []
    for name, (section, kind, default, _text) in fields().items():
        value = getattr(getattr(config, section), name)
        if value == default:
            continue
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            arguments.append(flag if value else "--no-" + flag[2:])
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def _from_environment(environ: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, (_section, kind, _default, _text) in fields().items():
        variable = f"FOLOVLLM_{name.upper()}"
        text = environ.get(variable)
        if not text:
            continue
        try:
            values[name] = _parse(text, kind)
        except ValueError:
            allowed = "0, 1, true or false" if kind is bool else _allowed(name)
            raise ConfigError(f"{variable}: was {text!r}; allowed: {allowed}") from None
    return values


def _parse(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError(text)
        return text.lower() in ("1", "true")
    if typing.get_origin(kind) is Literal:
        return type(typing.get_args(kind)[0])(text)
    return kind(text)


def _plain_type(hint: Any) -> Any:
    """The type under Annotated and ``| None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _description(hint: Any) -> str:
    for part in (hint, *typing.get_args(hint)):
        for meta in getattr(part, "__metadata__", ()):
            if isinstance(meta, Meta) and meta.description:
                return meta.description
    return ""


def _allowed(name: str) -> str:
    """What a setting may be, in words."""
    section, kind, _default, _text = fields()[name]
    if typing.get_origin(kind) is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(kind))
    if kind is bool:
        return "True or False"
    if kind is str:
        return "a non-empty string"
    low, high = _bounds(typing.get_type_hints(SECTIONS[section], include_extras=True)[name])
    noun = "an integer" if kind is int else "a number"
    return f"{noun} from {low}" if high is None else f"{noun} in [{low}, {high}]"


def _bounds(hint: Any) -> tuple[Any, Any]:
    """The ``ge`` and ``le`` of a number's annotation."""
    for part in (hint, *typing.get_args(hint)):
        for meta in getattr(part, "__metadata__", ()):
            if isinstance(meta, Meta):
                return meta.ge, meta.le
    return None, None


def _clear(error: str, values: dict[str, Any]) -> str:
    """The field, the value that it had, and what is allowed."""
    field = error.partition(" - at `$.")[2].rstrip("`")
    return f"{field}: was {values.get(field)!r}; allowed: {_allowed(field)}" if field else error
