"""One prompt through a model in one step, without rows, plans or sampling: its logits.

Used by tests that compare models with one another.
"""

from __future__ import annotations

import numpy as np
import torch

from gpu_worker.attention.interface import AttentionMetadata
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.spec import LoadedModel
from gpu_worker.row_buckets import bucket
from protocol.codec import BLOCK_SIZE_TOKENS


@torch.inference_mode()
def logits_of(model: LoadedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [len(token_ids), vocab_size]."""
    count, padded = len(token_ids), bucket(len(token_ids))
    blocks = -(-count // BLOCK_SIZE_TOKENS)
    lens = np.array([count], dtype=np.int32)
    slots = torch.cat((torch.arange(count), torch.full((padded - count,), -1)))
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, count], dtype=torch.int32), seq_lens=torch.from_numpy(lens),
        block_table=torch.arange(blocks, dtype=torch.int32)[None], slot_mapping=slots, query_lens_host=lens, seq_lens_host=lens,
        num_tokens=count)
    kv = KVCache(model.spec, blocks, model.spec.kv_dtype, torch.device("cpu"))
    ids = torch.tensor(token_ids + [0] * (padded - count))
    positions = torch.cat((torch.arange(count), torch.zeros(padded - count, dtype=torch.int64)))
    return model.compute_logits(model.forward(ids, positions, metadata, kv))[:count]
