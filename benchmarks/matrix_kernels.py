"""Matrix products by the own kernels: how fast they multiply, and how fast they read weights.

    python benchmarks/matrix_kernels.py

For each kind of product and each shape of the default model: 10^9 operations a second (a product
and a sum are two) by the number of rows, and for few rows GB/s of weights read.  Beside them, in
the same rounds: torch's float32 product of 2,048³ and a plain read of memory, on as many threads.
The weights of one row are those of a whole model's layers side by side, more than any cache
holds, in huge pages.  Each figure is the best of all rounds.  With ``--threads 1`` it is by the
time that the thread had a processor, so that it holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe, pressure
from gpu_worker.kernels.elementwise import Elementwise, Output
from gpu_worker.kernels.huge_pages import HugePages
from gpu_worker.kernels.library import Library
from gpu_worker.kernels.linear import ALLOWED_INPUTS, InputKind, Linear, Weight, WeightKind

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
MEMORY_BYTES = 100 << 20       # of weights that one row is multiplied by: more than a cache
FEW_ROWS = 8
HEAD_ROWS = 64                 # at most: only rows that sample have logits
PEAK = 2048


def best(seconds: float, run, minimum_s: float = 0.02) -> float:
    """The shorter of ``seconds`` and one run's time, over at least ``minimum_s``."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end_s = clock() + minimum_s
    while True:
        started_s = clock()
        run()
        now_s = clock()
        seconds = min(seconds, now_s - started_s)
        if now_s > end_s:
            return seconds


class Product:
    """One kind of product at one shape, for some numbers of rows."""

    def __init__(self, library: Library, threads: int, kind: WeightKind, form: InputKind, shape: str, counts: list[int]) -> None:
        self.name, (self.n, self.k), self.counts = f"{kind.name.lower()}, {form.name.lower()}", SHAPES[shape], counts
        self.shape, self.seconds = shape, dict.fromkeys((c for c in counts if shape != "head" or c <= HEAD_ROWS), float("inf"))
        few, many = self._weights(kind)
        elementwise = Elementwise(library, threads)
        self._runs = {}
        for count in self.seconds:
            weight = few if count <= FEW_ROWS else many
            self._runs[count] = (Linear(library, weight, threads, torch.float32), rows(elementwise, form, count, self.k), weight.n)
        self.bytes_per_output = many.panels.nbytes / many.n

    def _weights(self, kind: WeightKind) -> tuple[Weight, Weight]:
        one = Weight.from_float(kind, torch.randn(self.n, self.k))
        copies = max(1, MEMORY_BYTES // one.panels.nbytes)
        many = Weight(kind, self.n * copies, self.k, self.k, one.panels.repeat(copies, 1),
                      None if one.scales is None else one.scales.repeat(copies), None)
        return tuple(weight.moved(HugePages.for_tensors(weight.tensors().values())) for weight in (many, one))

    def measure(self) -> None:
        for count, (product, given, _) in self._runs.items():
            self.seconds[count] = best(self.seconds[count], lambda: product(given))

    def line(self) -> str:
        cells = []
        for count in self.counts:
            if count not in self.seconds:
                cells.append("–")
                continue
            outputs = self._runs[count][2]
            billions_per_s = outputs / self.seconds[count] / 1e9
            read = f" ({billions_per_s * self.bytes_per_output:.1f} GB/s)" if count <= FEW_ROWS else ""
            cells.append(f"{2 * count * self.k * billions_per_s:.0f}{read}")
        return f"| {self.name} | {self.shape} {self.n} × {self.k} | " + " | ".join(cells) + " |"


def rows(elementwise: Elementwise, form: InputKind, count: int, width: int):
    x = torch.randn(count, width)
    if form in (InputKind.FLOAT32, InputKind.BF16):
        return x if form == InputKind.FLOAT32 else x.bfloat16()
    return elementwise.quantize(x, Output.PER_TOKEN if form == InputKind.PER_TOKEN else Output.PER_GROUP)


class Machine:
    """What the same threads reach without us."""

    def __init__(self) -> None:
        self._a, self._b, self._memory = torch.randn(PEAK, PEAK), torch.randn(PEAK, PEAK), torch.zeros(MEMORY_BYTES // 8, dtype=torch.int64)
        self.product_s = self.read_s = float("inf")

    def measure(self) -> None:
        self.product_s = best(self.product_s, lambda: torch.mm(self._a, self._b))
        self.read_s = best(self.read_s, self._memory.sum)

    def lines(self) -> str:
        return (f"torch.mm float32 {PEAK}³: {2 * PEAK**3 / self.product_s / 1e9:.0f} GFLOP/s\n"
                f"plain read: {self._memory.nbytes / self.read_s / 1e9:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 64, 512], help="rows of a product")
    parser.add_argument("--kinds", nargs="+", default=[kind.name.lower() for kind in WeightKind], help="kinds of weights")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = Library.open()
    print(f"{describe()}; kernels for {library.level}, {arguments.threads} threads\n")
    print("| product | shape | " + " | ".join(f"{count} rows" for count in arguments.rows) + " |")
    print("|---" * (2 + len(arguments.rows)) + "|")
    machine = Machine()
    for kind in (WeightKind[name.upper()] for name in arguments.kinds):
        for form in ALLOWED_INPUTS[kind]:
            for shape in arguments.shapes:
                product = Product(library, arguments.threads, kind, form, shape, arguments.rows)
                for _ in range(arguments.rounds):
                    machine.measure()
                    product.measure()
                print(product.line(), flush=True)
                del product
                gc.collect()
    print(f"\n{machine.lines()}\nwaiting for a CPU: {pressure():.0f} % of the last 10 s")


if __name__ == "__main__":
    main()
