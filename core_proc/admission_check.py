"""From a frontend's Add to a Request, or one clear refusal.

Called by ``EngineCore``.  The frontend has checked the same for its users; this is the
core's own door, since a request that can never fit would wait for ever, and a plan that names
a token out of the vocabulary would end the engine.
"""

from __future__ import annotations

import numpy as np

from core_proc.block_hash import root_hash
from core_proc.logprob_store import LogprobStore
from core_proc.request import NEVER, Request
from protocol.codec import ColumnError, i32_column
from protocol.messages import Add, OutputKind
from protocol.sampling_params import BadRequest, check_lengths, check_token_ids


TOKEN_LISTS = ("stop_token_ids", "eos_token_ids", "allowed_token_ids", "logit_bias_ids", "bad_words_ids")    # of TokenParams


def read_request(add: Add, *, vocab_size: int, max_model_len: int, num_blocks: int, block_size: int,
                 prefix_caching: bool) -> Request:
    """Raises BadRequest naming the field."""
    try:
        prompt, output = i32_column(add.prompt_ids, name="prompt_ids"), i32_column(add.output_ids, name="output_ids")
        listed = {name: i32_column(getattr(add.params, name), name=name) for name in TOKEN_LISTS if getattr(add.params, name)}
    except ColumnError as error:
        raise BadRequest("params", str(error), "bad_frame") from None
    for field in ("lora_id", "grammar", "deadline_ns"):
        if getattr(add, field) is not None:
            raise BadRequest(field, "is not supported by this engine; leave it out", "unsupported")
    check_lengths(len(prompt), add.params.max_tokens, max_model_len)
    check_token_ids("prompt", prompt, vocab_size)
    check_token_ids("output_ids", output, vocab_size)
    for name, ids in listed.items():
        check_token_ids(name, ids, vocab_size)
    most = -(-(len(prompt) + add.params.max_tokens - 1) // block_size)
    if most > num_blocks:
        raise BadRequest("max_tokens", f"the prompt has {len(prompt)} tokens and max_tokens = {add.params.max_tokens} was asked"
                         f" for, together more than the KV cache of {num_blocks * block_size} tokens holds", "context_length_exceeded")
    stop_ids = frozenset(token for name in ("stop_token_ids", "eos_token_ids") if name in listed for token in listed[name].tolist())
    return _request(add, np.concatenate([prompt, output]), len(prompt), stop_ids, prefix_caching)


def _request(add: Add, token_ids: np.ndarray, prompt_len: int, stop_ids: frozenset[int], prefix_caching: bool) -> Request:
    params = add.params
    at_end = add.output_kind is OutputKind.FINAL
    return Request(
        key=add.key, child=add.child, params=params, seed=add.seed, priority=add.priority, arrival_ns=add.arrival_ns,
        prompt_len=prompt_len, max_total_tokens=prompt_len + params.max_tokens, stop_ids=stop_ids,
        root_hash=root_hash(cache_salt=add.cache_salt, lora_id=add.lora_id, private_key=None if prefix_caching else add.key),
        token_ids=token_ids, stream=add.stream, attach_no=add.attach_no,
        stream_interval=1 if at_end else add.stream_interval, sent_tokens=len(token_ids),
        emit_at=NEVER if at_end else len(token_ids) + 1,
        logprobs=None if params.logprobs is None else LogprobStore(1 + params.logprobs, len(token_ids) - prompt_len),
        prompt_logprobs=None if params.prompt_logprobs is None or add.child else LogprobStore(1 + params.prompt_logprobs))
