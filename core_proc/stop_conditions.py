"""When a request ends by its tokens: an eos or stop id, or its length.

Called by ``StepResults`` for whole columns, and for single requests that are not running.
"""

from __future__ import annotations

import numpy as np

from core_proc.request import Request
from core_proc.request_rows import STOP_COLUMNS, RequestRows
from protocol.messages import Finish


def check_rows(columns: RequestRows, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """u8[n] Finish of rows whose newest token, already counted, is ``tokens``."""
    known = columns.num_tokens[rows]
    finish = (known >= columns.max_total[rows]) * np.uint8(Finish.LENGTH)
    found = (columns.stop_ids.take(rows, axis=0) == tokens[:, None]).ravel().nonzero()[0].tolist()
    stops = [at // STOP_COLUMNS for at in found]
    stops += [i for i in columns.many_stops[rows].nonzero()[0].tolist() if int(tokens[i]) in columns.request[rows[i]].stop_ids]
    for i in stops:
        if known[i] >= columns.min_total[rows[i]]:
            finish[i] = Finish.STOP
    return finish


def check_request(request: Request) -> Finish:
    """The same for a request that is not running, by its last token."""
    known = request.num_tokens
    if known > request.prompt_len and known >= request.min_total_tokens and int(request.token_ids[-1]) in request.stop_ids:
        return Finish.STOP
    return Finish.LENGTH if known >= request.max_total_tokens else Finish.NONE
