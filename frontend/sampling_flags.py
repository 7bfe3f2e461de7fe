"""Command line flags of the sampling parameters, derived from ``SamplingParams``.

Used by ``cli``: name, type, default and help of each flag come from the struct's fields.
"""

from __future__ import annotations

import argparse
import types
import typing
from typing import Annotated, Any

import msgspec

from protocol.sampling_params import DEFAULTS, SamplingParams


def add_sampling_arguments(parser: argparse.ArgumentParser, *, leave_out: set[str], **defaults: Any) -> None:
    """One flag per field but ``leave_out``; ``defaults`` replace the struct's own."""
    group = parser.add_argument_group("sampling", "names and meanings are vLLM's; the model's own values are those"
                                      " of its generation_config.json")
    hints = typing.get_type_hints(SamplingParams, include_extras=True)
    for info in msgspec.structs.fields(SamplingParams):
        if info.name in leave_out:
            continue
        text, kinds = _describe(hints[info.name])
        default = defaults.get(info.name, info.default)
        if info.name in DEFAULTS:
            default_text = f"the model's own, else {DEFAULTS[info.name]}"
        else:
            default_text = "none" if default is None else str(default)
        shown = f" (default: {default_text})"
        options: dict[str, Any] = {"default": default, "help": (text + shown).replace("%", "%%")}
        group.add_argument("--" + info.name.replace("_", "-"), **options, **_argument(kinds))


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The parameters that the flags say.  Raises BadRequest."""
    names = [info.name for info in msgspec.structs.fields(SamplingParams)]
    return SamplingParams(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def _describe(hint: Any) -> tuple[str, set[Any]]:
    """Help text and possible types of a field."""
    inner, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    text = next((extra.description for extra in extras if getattr(extra, "description", None)), "")
    union = typing.get_origin(inner) in (types.UnionType, typing.Union)
    return text, set(typing.get_args(inner) if union else (inner,)) - {type(None)}


def _argument(kinds: set[Any]) -> dict[str, Any]:
    """How argparse reads a value of one of ``kinds``."""
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if list[str] in kinds:
        return {"action": "append", "metavar": "TEXT"}
    if list[int] in kinds:
        return {"type": _ids, "metavar": "ID,…"}
    if dict[int, float] in kinds:
        return {"type": _bias, "metavar": "ID=VALUE,…"}
    kind = float if float in kinds else int
    return {"type": kind, "metavar": kind.__name__.upper()}


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"was {text!r}; allowed: token ids with commas between") from None


def _bias(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token): float(value) for token, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"was {text!r}; allowed: id=value with commas between") from None
