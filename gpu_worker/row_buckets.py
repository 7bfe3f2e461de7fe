"""How many rows a matrix product runs on: real rows padded up to a bucket.

The runner pads the tokens of a forward and the rows of lm_head with it.  Two things hang
on it: a row's bits must not depend on how many rows run beside it (matrix libraries take
other kernels below 4 rows), and a batch size never seen before costs a kernel compilation.
"""

from __future__ import annotations

from dataclasses import dataclass


def bucket(num_rows: int) -> int:
    """4, 8, multiples of 8 up to 64, of 32 up to 512, of 128 above."""
    if num_rows <= 4:
        return 4
    if num_rows <= 64:
        return _round_up(num_rows, 8)
    if num_rows <= 512:
        return _round_up(num_rows, 32)
    return _round_up(num_rows, 128)


@dataclass(frozen=True, slots=True)
class RowBuckets:
    """The padding rule as a collaborator.

    ``enabled=False`` runs every product on its real rows: only the test that shows what the
    padding is for does that.
    """

    enabled: bool = True

    def bucket(self, num_rows: int) -> int:
        return bucket(num_rows) if self.enabled else num_rows


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
