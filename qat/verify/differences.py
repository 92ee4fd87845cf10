"""How far two arrays of codes are apart."""

from __future__ import annotations

import dataclasses

import numpy as np

FARTHEST = 8  # of a histogram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """`second - first` in steps of the grid.

    Attributes:
        codes: how many were compared.
        different: how many differ.
        largest: the largest difference, without its sign.
        histogram: how many differ by -8, -7, … 8; the ends count what lies beyond them too.
    """

    codes: int
    different: int
    largest: int
    histogram: list[int]

    @property
    def share(self) -> float:
        """Of the codes, how many differ."""
        return self.different / self.codes


def difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compares whole numbers of one shape."""
    apart = second.astype(np.int64) - first.astype(np.int64)
    clipped = np.clip(apart, -FARTHEST, FARTHEST) + FARTHEST
    return Difference(
        codes=apart.size,
        different=int(np.count_nonzero(apart)),
        largest=int(np.abs(apart).max(initial=0)),
        histogram=np.bincount(clipped.reshape(-1), minlength=2 * FARTHEST + 1).tolist(),
    )
