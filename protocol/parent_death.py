"""A child that ends with its parent, however that ends.

Used by the worker, by the children that fetch and convert models, and by what these start.
Imports nothing that takes time.
"""

from __future__ import annotations

import ctypes
import os
import signal

EXIT_PEER_LOST = 70
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """SIGKILL when the parent's main thread ends: for a process that may be busy for long."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_PEER_LOST)
