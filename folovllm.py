"""FoloVLLM's public names in one place.

The packages beside this file have general names (``frontend``, ``protocol``).  Its own directory
goes first on the path while they are imported, and away again after; where the user's program has
packages of these names, ours then leave the names to them.
"""

import importlib.machinery
import platform
import sys
from pathlib import Path
from types import ModuleType

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    raise ImportError(f"FoloVLLM runs on Linux x86-64; this is {sys.platform} {platform.machine()}")

_PACKAGES = ("frontend", "protocol")
_root = str(Path(__file__).resolve().parent)


def _is_ours(place: str | None) -> bool:
    return place is not None and _root in map(str, Path(place).resolve().parents)


def _modules(package: str) -> dict[str, ModuleType]:
    """The package and all that is imported of it, by name."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}


def _has_rival(package: str) -> bool:
    """Whether the name means another package to the user's program."""
    found = importlib.machinery.PathFinder.find_spec(package)
    return found is not None and not any(map(_is_ours, found.submodule_search_locations or [found.origin]))


def _leave_name(package: str) -> None:
    """Our modules under names of their own: by these, classes find their modules when types are resolved."""
    for name, module in _modules(package).items():
        module.__name__ = own_name = f"{__name__}.{name}"
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == name:
                value.__module__ = own_name
        sys.modules[own_name] = sys.modules.pop(name)


_theirs = {name: module for package in _PACKAGES for name, module in _modules(package).items()
           if not _is_ours(getattr(module, "__file__", None))}
for _name in _theirs:
    del sys.modules[_name]
sys.path.insert(0, _root)
try:
    from frontend.client import AsyncClient, Client
    from frontend.errors import EngineDead, EngineNotRunning, RequestFailed
    from frontend.llm_engine import LLM, LLMEngine
    from frontend.outputs import CompletionOutput, RequestOutput
    from protocol.config import ConfigError, ModelConfig, SchedulerConfig
    from protocol.sampling_params import BadRequest, RequestOutputKind, SamplingParams
finally:
    sys.path.remove(_root)
    for _package in _PACKAGES:
        if any(_name.partition(".")[0] == _package for _name in _theirs) or _has_rival(_package):
            _leave_name(_package)
    sys.modules.update(_theirs)

__version__ = "0.1.0"
__all__ = [
    "AsyncClient", "BadRequest", "Client", "CompletionOutput", "ConfigError", "EngineDead", "EngineNotRunning", "LLM",
    "LLMEngine", "ModelConfig", "RequestFailed", "RequestOutput", "RequestOutputKind", "SamplingParams", "SchedulerConfig",
]
