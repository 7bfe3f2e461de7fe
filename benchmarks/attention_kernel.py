"""The paged attention kernel in its three regimes, beside what the machine can do.

    python benchmarks/attention_kernel.py
    python benchmarks/attention_kernel.py --kv-dtype int8 --threads 1

Decode of 64 requests at a context of 174, decode of one at 4,096, prefill of one prompt of 4,096
tokens, with the shapes of SmolLM2-135M (9 heads, 3 KV heads of 64).  Layers take turns, so that K
and V come from memory as they do in a model.  GB/s are the bytes of K and V that were asked for,
GFLOP/s the products of what each query sees.  The ceilings, a sum over a large tensor and a matrix
product, are measured in the same rounds; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe, pressure
from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.kernels.library import Library
from gpu_worker.kv_cache import KV_DTYPES, KVCache
from gpu_worker.models.spec import ModelSpec

HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 32
READ_BYTES = 400 << 20
PRODUCT = 2048


class Regime:
    """Rows of (context, new tokens), in ``num_layers`` layers."""

    def __init__(self, name: str, rows: list[tuple[int, int]], num_layers: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        self.name, self.rows, self.num_layers = name, rows, num_layers
        layers = tuple(AttentionLayer(i, HEADS, KV_HEADS, DIM, DIM**-0.5) for i in range(num_layers))
        self.layers = layers
        blocks = [-(-context // BLOCK) for context, _new in rows]
        spec = ModelSpec("bench", "decoder", layers, 0, 0, 0, dtype, (), True)
        self.kv = KVCache(spec, sum(blocks), kv_dtype, torch.device("cpu"))
        self.metadata = self._metadata(blocks)
        tokens = self.metadata.num_tokens
        self.qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM).to(dtype).split((HEADS, KV_HEADS, KV_HEADS), 1)
        for layer in self.kv.layers:
            for tensor in layer.tensors():
                tensor.copy_(torch.randint(-100, 100, tensor.shape, dtype=torch.int8) if tensor.dtype == torch.int8 else torch.rand(tensor.shape))
            for scale in layer.tensors()[2:]:       # of int8; as large as a model's: of larger scores most weights would be denormal
                scale.mul_(0.01)
        pairs = sum((2 * context - new + 1) * new // 2 for context, new in rows)
        self.flops = 4 * pairs * HEADS * DIM * num_layers
        self.bytes = sum(context for context, _new in rows) * KVCache.block_bytes(spec, kv_dtype) // BLOCK

    def _metadata(self, blocks: list[int]) -> AttentionMetadata:
        order = np.random.default_rng(0).permutation(sum(blocks)).astype(np.int32)
        table = np.zeros((len(blocks), max(blocks)), np.int32)
        slots = []
        for row, (own, (context, new)) in enumerate(zip(np.split(order, np.cumsum(blocks)[:-1]), self.rows, strict=True)):
            table[row, :len(own)] = own
            positions = np.arange(context - new, context)
            slots.append(own[positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK)
        lens = np.array(self.rows, np.int32)
        starts = np.concatenate(([0], np.cumsum(lens[:, 1]))).astype(np.int32)
        return AttentionMetadata(
            query_start_loc=torch.from_numpy(starts), seq_lens=torch.from_numpy(lens[:, 0].copy()), block_table=torch.from_numpy(table),
            slot_mapping=torch.from_numpy(np.concatenate(slots)), query_lens_host=lens[:, 1], seq_lens_host=lens[:, 0], num_tokens=int(starts[-1]))

    def run(self, backend: AttentionBackend) -> None:
        step = backend.begin(self.metadata, self.kv)
        for layer in self.layers:
            step.attend(layer, *self.qkv)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the activations")
    parser.add_argument("--kv-dtype", choices=sorted(KV_DTYPES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference", action="store_true", help="also the plain-torch backend")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, kv_dtype = getattr(torch, arguments.dtype), KV_DTYPES[arguments.kv_dtype]
    regimes = [Regime("decode 64 x 174", [(174, 1)] * 64, 30, dtype, kv_dtype), Regime("decode 1 x 4096", [(4096, 1)], 30, dtype, kv_dtype),
               Regime("prefill 4096", [(4096, 4096)], 1, dtype, kv_dtype)]
    backends: list[AttentionBackend] = [CpuAttention(Library.open(), arguments.threads)]
    if arguments.reference:
        backends.append(ReferenceAttention())
    memory, factor = torch.ones(READ_BYTES // 4), torch.randn(PRODUCT, PRODUCT)
    print(f"{describe()}, {arguments.threads} threads, {backends[0].name}, activations {arguments.dtype}, K/V {arguments.kv_dtype}")
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 1):
            times.setdefault("read", []).append(seconds(memory.sum))
            times.setdefault("product", []).append(seconds(lambda: factor @ factor))
            for regime in regimes:
                for backend in backends:
                    times.setdefault(f"{regime.name}, {backend.name[:9]}", []).append(seconds(lambda: regime.run(backend)))
    middle = {name: statistics.median(found[1:]) for name, found in times.items()}
    read, product = READ_BYTES / middle["read"] / 1e9, 2 * PRODUCT**3 / middle["product"] / 1e9
    print(f"memory read {read:.1f} GB/s, float32 product {product:.0f} GFLOP/s; something waited for a CPU {pressure():.0f} % of the time\n")
    print("| | ms | GB/s | of the read | GFLOP/s | of the product |\n|---|---|---|---|---|---|")
    for regime in regimes:
        for backend in backends:
            name = f"{regime.name}, {backend.name[:9]}"
            speed, rate = regime.bytes / middle[name] / 1e9, regime.flops / middle[name] / 1e9
            print(f"| {name} | {1e3 * middle[name]:.2f} | {speed:.1f} | {speed / read:.0%} | {rate:.1f} | {rate / product:.0%} |")


if __name__ == "__main__":
    main()
