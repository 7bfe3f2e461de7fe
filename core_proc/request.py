"""One child request as the core sees it, from Add until its frontend has seen its end.

Moved between waiting, running and finished by ``LiveRequests`` alone.  While it runs, its
numbers live in ``RequestRows`` under its ``req_idx`` and the fields marked (*) are stale.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from core_proc.block_hash import chain_hash
from core_proc.logprob_store import LogprobStore
from protocol.messages import Finish
from protocol.sampling_params import TokenParams

if TYPE_CHECKING:
    from core_proc.channel import Channel

NEVER = 2**31 - 1        # emit_at of a stream that speaks only at its end


class RequestStatus(enum.IntEnum):
    """WAITING ↔ RUNNING → FINISHED, or WAITING → FINISHED."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(eq=False, slots=True)
class Request:
    """Identity, what was asked for, and what is known so far."""

    key: bytes
    child: int
    params: TokenParams
    seed: int
    priority: int
    arrival_ns: int
    prompt_len: int                   # tokens
    max_total_tokens: int             # prompt + output, never more
    stop_ids: frozenset[int]          # eos and stop ids
    root_hash: bytes
    token_ids: np.ndarray             # (*) i32[num_tokens]: prompt, then output

    # Delivery: whose stream this is, and how it wants its tokens.
    channel: Channel | None = None
    stream: int = -1
    attach_no: int = 0
    stream_interval: int = 1          # tokens; NEVER: all at the end
    sent_tokens: int = 0              # (*) of token_ids, prompt counted, already in Outputs
    emit_at: int = 0                  # (*) num_tokens at which the next Outputs is due
    logprobs: LogprobStore | None = None
    prompt_logprobs: LogprobStore | None = None

    # Scheduling.
    order: tuple = ()                 # place in the one total order of live requests
    status: RequestStatus = RequestStatus.WAITING
    req_idx: int = -1                 # row while running
    serial: int = 0                   # of its newest admission, unique in this core
    num_in_flight: int = 0            # (*) samples scheduled, not yet reported
    steps_in_flight: int = 0          # (*) plans that hold it, not yet reported
    num_computed_highest: int = 0     # (*) most tokens ever applied: passing it is progress
    num_cached_tokens: int = -1       # known tokens that its first admission hit; -1: not admitted yet
    finish: Finish = Finish.NONE
    stop_token: int = -1              # the eos or stop id that ended it
    _block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Known tokens; only while not running."""
        return len(self.token_ids)

    @property
    def min_total_tokens(self) -> int:
        """No eos or stop id ends it with fewer."""
        return self.prompt_len + self.params.min_tokens

    @property
    def reads_prefix_hits(self) -> bool:
        """Logprobs of prompt tokens need their logits, so their K/V must be computed here."""
        return self.params.prompt_logprobs is None

    def block_hash(self, index: int, token_ids: np.ndarray, block_size: int) -> bytes:
        """Hash of full block ``index``; ``token_ids``: its known tokens, wherever they live now."""
        hashes = self._block_hashes
        while len(hashes) <= index:
            start = len(hashes) * block_size
            previous = hashes[-1] if hashes else self.root_hash
            hashes.append(chain_hash(previous, token_ids[start:start + block_size].tobytes()))
        return hashes[index]

    def hashes_from(self, index: int) -> list[bytes]:
        """Those computed so far, from block ``index`` on."""
        return self._block_hashes[index:]
