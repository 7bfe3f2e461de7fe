"""The environment that the threads of a child process are made by: ours, whatever the user's says.

Used by launch.py for each child.  The user's settings are for programs of the user's own: one that
makes idle threads spin takes a whole processor, a small stack ends the worker.
How many threads compute is ``--num-threads``.  What chooses an arithmetic (MKL_CBWR and the like)
is left as it is, and is in the fingerprint (``gpu_worker/device.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIXES = ("OMP_", "GOMP_", "KMP_")
MKL = ("MKL_NUM_THREADS", "MKL_NUM_STRIPES", "MKL_DOMAIN_NUM_THREADS", "MKL_DYNAMIC", "MKL_THREADING_LAYER")
WORKER = {"GOMP_SPINCOUNT": "1000"}    # of torch's own operations: libgomp's makes them several times slower beside other processes
OTHERS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def replaced(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's settings that the worker does not get, in the order of their names."""
    return {name: environ[name] for name in sorted(environ) if _is_about_threads(name) and environ[name] != WORKER.get(name)}


def with_own_threads(environ: Mapping[str, str], role: str) -> dict[str, str]:
    """``environ`` with our settings in place of the user's: the worker computes, the others need one thread."""
    kept = {name: value for name, value in environ.items() if not _is_about_threads(name)}
    return kept | (WORKER if role == "worker" else OTHERS)


def _is_about_threads(name: str) -> bool:
    return name.startswith(PREFIXES) or name in MKL
