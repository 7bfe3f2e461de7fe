"""The loop of a child: one JSON object a line in on stdin, one answer a line out on stdout.

Runs under a peer's own Python, so it uses the standard library alone.  A request names a
method of the served object in ``op``; the other fields are its arguments.  What libraries
print goes to stderr, which the parent keeps as a log.  The end of stdin is the parent's end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any


PR_SET_PDEATHSIG = 1


def serve(served: Any) -> None:
    """Answer until stdin ends; an exception is an answer too."""
    # a parent that was killed leaves us stopped, where we see no end of stdin
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)                # processes that the peer starts must not hold our stdin
    os.close(null)
    for line in requests:
        fields = json.loads(line)
        try:
            answer = getattr(served, fields.pop("op"))(**fields)
        except Exception as error:  # whatever it is, the parent must hear of it and name it in the report
            answer = {"error": f"{type(error).__name__}: {error}"}
            print(answer["error"], file=sys.stderr, flush=True)
        print(json.dumps(answer), file=answers, flush=True)
