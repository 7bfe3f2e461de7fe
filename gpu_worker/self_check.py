"""Whether equal rows give equal bits here, whatever stands beside them: asked at start.

Called once by ``startup.py``, with the loaded model.  Libraries choose kernels by the machine
and by the number of rows, so the promise "same request, same tokens" is put to the test where
it has to hold: every shape and kind of weight in use, and attention, on rows of widely differing
scale (on ordinary rows a wrong kernel may show once in thousands).  Sums of integers have to be
exact up to the largest: some instructions saturate.  The verdict is remembered in the cache
directory: only the first start of an arithmetic pays for it.  What was not looked at, or did not
hold, is never claimed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.spec import LoadedModel, ModelSpec, RowProduct
from gpu_worker.models.weights import write_atomically
from gpu_worker.quantization.rows import GROUP
from gpu_worker.row_buckets import RowBuckets
from protocol.cache_dir import cache_dir
from protocol.codec import BLOCK_SIZE_TOKENS

VERSION = 2                                   # of what is checked; another one forgets all verdicts
NUM_ROWS = 64
ROW_COUNTS = (1, 2, 3, 5, 64, 150, 512)       # real rows of a product: 4, 8, 64, 160 and 512 once padded
HEAD_BATCHES = 16                             # of each size: its weights are many, and read anew for each
PROMPT_LOGPROB_ROWS = 64                      # rows that the head meets, however few requests may run
PROMPT_TOKENS = 300                           # keys of the longest query: more than one segment of 256
CHUNKS = (1, 70, 16, 110, 64, 33, 1, 1, 1, 1, 1, 1)   # the same prompt in other pieces
NEIGHBOURS = ((0, 40), (199, 1), (0, 1), (0, 130))    # (computed, new) tokens of the requests beside it
SEED = 20
INTEGER_INPUTS, INTEGER_OUTPUTS = 1024, 40    # 1,024 · 127 · 128 < 2^24: sums are exact in float32
LARGEST_INPUT = 127
TYPES_OF_BITS = {2: torch.int16, 4: torch.int32}


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the check found."""

    bit_exact: bool
    reasons: list[str]          # why not; one sentence each


def self_check(model: LoadedModel, buckets: RowBuckets, fingerprint: str, max_num_seqs: int) -> Verdict:
    """The verdict on the arithmetic that ``fingerprint`` stands for, remembered or new."""
    spec = model.spec
    if not spec.supports_bit_exact:
        return Verdict(False, [f"not promised for {spec.dtype} by the {spec.backend} backend on this device"])
    most_head_rows = buckets.bucket(max(max_num_seqs, PROMPT_LOGPROB_ROWS))
    name = "\0".join((str(VERSION), fingerprint, str(most_head_rows)))
    memo = cache_dir() / "self_check" / hashlib.sha256(name.encode()).hexdigest()
    verdict = _remembered(memo)
    if verdict is None:
        verdict = _checked(model, buckets, most_head_rows)
        write_atomically(memo, msgspec.json.encode(verdict).decode())
    return verdict


def _remembered(memo: Path) -> Verdict | None:
    """None for a verdict that is not there, or that cannot be read."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(memo.read_bytes(), type=Verdict)
    return None


@torch.inference_mode()
def _checked(model: LoadedModel, buckets: RowBuckets, most_head_rows: int) -> Verdict:
    reasons = []
    for product in _different(model.linears()):
        reasons += product_faults(product, [buckets.bucket(count) for count in ROW_COUNTS])
    head_sizes = [rows for rows in map(buckets.bucket, ROW_COUNTS) if rows <= most_head_rows]
    reasons += product_faults(model.head(), head_sizes, most_batches=HEAD_BATCHES)
    for product in {product.kind: product for product in (*model.linears(), model.head()) if product.integers}.values():
        reasons += integer_faults(product)
    reasons += attention_faults(model.attention, model.spec, buckets)
    if model.spec.backend != "decoder":
        reasons.append(f"not promised by the {model.spec.backend} backend, whose other operators are not checked")
    return Verdict(not reasons, reasons)


def _different(products: list[RowProduct]) -> list[RowProduct]:
    """One product of each shape, type and kind."""
    return list({(product.out_features, product.in_features, product.input_dtype, product.kind): product for product in products}.values())


def product_faults(product: RowProduct, sizes: list[int], most_batches: int = NUM_ROWS) -> list[str]:
    """A sentence for each number of rows in ``sizes`` at which a row's bits are not those it has among 64.

    ``most_batches`` of 16 still hold every row from 4 rows on.
    """
    rows = _heavy_tailed((NUM_ROWS, product.in_features)).to(product.input_dtype)
    others = _heavy_tailed((max(sizes), product.in_features), SEED + 1).to(product.input_dtype)
    others[::3] = float("nan")
    expected = product(rows)
    found = []
    for size in dict.fromkeys(sizes):
        batches = _split(size) if size < NUM_ROWS else _placed(size)
        wrong = 0
        for source, place in batches[:most_batches]:
            batch = others[:size].clone()
            batch[place] = rows[source]
            wrong += int((_bits(product(batch)[place]) != _bits(expected[source])).any(-1).sum())
        if wrong:
            found.append(f"rows of {product.in_features} x {product.out_features} weights ({product.input_dtype}): "
                         f"{wrong} differ in batches of {size}")
    return found


def integer_faults(product: RowProduct) -> list[str]:
    """A sentence where a product of the largest integers is not their exact sum: what every quantized arithmetic begins with."""
    weights = _up_to_the_ends(*product.integers, INTEGER_OUTPUTS, SEED)
    rows = _up_to_the_ends(-LARGEST_INPUT, LARGEST_INPUT, NUM_ROWS, SEED + 1)
    rows[3:, ::GROUP] = LARGEST_INPUT        # whatever shares a scale has it at 1
    found = product.of_integers(weights)(rows.to(product.input_dtype))
    wrong = int((found != (rows.double() @ weights.double().t()).to(found.dtype)).sum())
    return [f"sums of the largest integers ({product.kind}): {wrong} of {found.numel()} are not exact"] if wrong else []


def _up_to_the_ends(least: int, largest: int, count: int, seed: int) -> Tensor:
    """int64 [count, INTEGER_INPUTS]: all the largest, all the least, the two in turn, the two at random, any at random."""
    generator = torch.Generator().manual_seed(seed)
    ends, shape = torch.tensor([least, largest]), (count // 2, INTEGER_INPUTS)
    either = ends[torch.randint(2, shape, generator=generator)]
    either[0], either[1], either[2] = largest, least, ends.repeat(INTEGER_INPUTS // 2)
    return torch.cat((either, torch.randint(least, largest + 1, shape, generator=generator)))


def _split(size: int) -> list[tuple[Tensor, Tensor]]:
    """All rows in batches of ``size``, the last filled up with the first rows: [(rows, their places)]."""
    return [((torch.arange(size) + first) % NUM_ROWS, torch.arange(size)) for first in range(0, NUM_ROWS, size)]


def _placed(size: int) -> list[tuple[Tensor, Tensor]]:
    """All rows at the beginning, about the middle and the end of a larger batch, in another order."""
    source = torch.arange(NUM_ROWS).roll(5)
    return [(source, torch.arange(first, first + NUM_ROWS)) for first in sorted({0, (size - NUM_ROWS) // 2 | 1, size - NUM_ROWS})
            if first + NUM_ROWS <= size]


def attention_faults(attention: AttentionBackend, spec: ModelSpec, buckets: RowBuckets) -> list[str]:
    """A sentence for each kind of layer and each circumstance in which a token's bits change."""
    found = []
    for layer in dict.fromkeys(dataclasses.replace(layer, index=0) for layer in spec.layers):
        alone = _Trial(attention, spec, layer, buckets, neighbours=())
        beside = _Trial(attention, spec, layer, buckets, neighbours=NEIGHBOURS)
        expected = _bits(alone.attended((PROMPT_TOKENS,)))
        results = {"in chunks": alone.attended(CHUNKS), "among others": beside.attended((PROMPT_TOKENS,)),
                   "in chunks among others": beside.attended(CHUNKS)}
        for circumstance, result in results.items():
            wrong = int((_bits(result) != expected).any(-1).sum())
            if wrong:
                found.append(f"attention of {layer.num_heads} heads of {layer.head_dim} ({spec.dtype}): "
                             f"{wrong} tokens differ {circumstance}")
    return found


class _Trial:
    """One prompt in one layer's attention, with requests before and behind it in each step."""

    def __init__(self, attention: AttentionBackend, spec: ModelSpec, layer: AttentionLayer, buckets: RowBuckets,
                 neighbours: tuple[tuple[int, int], ...]) -> None:
        self._attention, self._layer, self._buckets = attention, layer, buckets
        self._spec = dataclasses.replace(spec, layers=(layer,))
        self._neighbours = neighbours
        heads = layer.num_heads + 2 * layer.num_kv_heads
        self._prompt = _heavy_tailed((PROMPT_TOKENS, heads, layer.head_dim)).to(spec.dtype)
        most = self._buckets.bucket(PROMPT_TOKENS + sum(new for _computed, new in neighbours))
        self._filler = _heavy_tailed((most, heads, layer.head_dim), SEED + 1).to(spec.dtype)

    def attended(self, chunks: tuple[int, ...]) -> Tensor:
        """[PROMPT_TOKENS, num_heads * head_dim]: the prompt's output, computed piece by piece."""
        blocks_each = -(-PROMPT_TOKENS // BLOCK_SIZE_TOKENS)
        num_rows = len(self._neighbours) + 1
        kv = KVCache(self._spec, blocks_each * num_rows, self._spec.kv_dtype, torch.device("cpu"))
        kv.fill_with_nan()          # what was never written is never read
        table = np.arange(blocks_each * num_rows, dtype=np.int32)[::-1].reshape(blocks_each, num_rows).T   # apart, descending
        place, begin, outputs = num_rows // 2, 0, []
        for count in chunks:
            rows = [*self._neighbours[:place], (begin, count), *self._neighbours[place:]]
            first = sum(new for _computed, new in rows[:place])
            outputs.append(self._step(kv, table, rows, first, self._prompt[begin:begin + count]))
            begin += count
        return torch.cat(outputs)

    def _step(self, kv: KVCache, table: np.ndarray, rows: list[tuple[int, int]], first: int, prompt: Tensor) -> Tensor:
        """Rows of (computed, new) tokens; the output of the tokens from ``first`` on, which are the prompt's."""
        lens = np.array(rows, dtype=np.int32)
        seq_lens, ends = lens.sum(axis=1, dtype=np.int32), np.cumsum(lens[:, 1])
        num_tokens = int(ends[-1])
        num_padded = self._buckets.bucket(num_tokens)
        slots = np.full(num_padded, -1, dtype=np.int64)
        for row, (computed, new) in enumerate(rows):
            positions = np.arange(computed, computed + new)
            slots[ends[row] - new:ends[row]] = table[row, positions // BLOCK_SIZE_TOKENS] * BLOCK_SIZE_TOKENS + positions % BLOCK_SIZE_TOKENS
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)), seq_lens=torch.from_numpy(seq_lens),
            block_table=torch.from_numpy(np.ascontiguousarray(table)), slot_mapping=torch.from_numpy(slots),
            query_lens_host=lens[:, 1], seq_lens_host=seq_lens, num_tokens=num_tokens)
        tokens = self._filler[:num_padded].clone()
        tokens[first:first + len(prompt)] = prompt
        layer = self._layer
        query, key, value = tokens.split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), dim=1)
        return self._attention.begin(metadata, kv).attend(layer, query, key, value)[first:first + len(prompt)]


def _heavy_tailed(shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """float32; numbers of one row differ by up to 2 ** 17 in scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-8, 9, shape, generator=generator)


def _bits(values: Tensor) -> Tensor:
    """The values as integers: equal where the bits are, not-a-number included."""
    return values.contiguous().view(TYPES_OF_BITS[values.dtype.itemsize])
