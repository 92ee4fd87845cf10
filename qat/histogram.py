"""Histograms of float32 tensors whose bins are fixed beforehand: one pass, any range.

A bin holds the values that share their sign, exponent and first 6 bits of mantissa, so that it is
1/64 to 1/128 of its values wide, near zero as well as at an outlier. Inside a bin values are taken
as spread evenly; the least and the greatest value of all are kept as they are.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import tensorflow as tf

_MANTISSA_BITS = 6
_DROPPED_BITS = 23 - _MANTISSA_BITS
NUM_BINS = 2 ** (1 + 8 + _MANTISSA_BITS)
# Magnitudes per sign: the first exponent holds zero and subnormals, the last infinity and NaN.
_PER_SIGN = NUM_BINS // 2
_PER_EXPONENT = 2**_MANTISSA_BITS
# Elements of the largest array that an error's computation makes.
_LARGEST_ARRAY = 2**19


def bin_counts(x: tf.Tensor) -> tf.Tensor:
    """The number of values of x in each bin, int32 (NUM_BINS,)."""
    pattern = tf.bitcast(tf.reshape(tf.cast(x, tf.float32), [-1]), tf.uint32)
    bins = tf.cast(tf.bitwise.right_shift(pattern, tf.constant(_DROPPED_BITS, tf.uint32)), tf.int32)
    return tf.math.bincount(bins, minlength=NUM_BINS, maxlength=NUM_BINS)


def holds_only_numbers(counts: np.ndarray) -> bool:
    """Whether no value that was counted is infinite or NaN."""
    last = counts.reshape(2, _PER_SIGN)[:, -_PER_EXPONENT:]
    return not last.any()


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The bins that hold something, in ascending order; all arrays float64 (bins,).

    Attributes:
        lows, highs: the ends of each bin; equal where it holds one value only.
        counts: values in each bin.
    """

    lows: np.ndarray
    highs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, minimum: float, maximum: float) -> Histogram:
        """From sums of `bin_counts`, and the least and greatest of the finite values counted."""
        lows, highs, order = _bins()
        counts = counts[order]
        filled = counts > 0
        return cls(
            lows=np.clip(lows[filled], minimum, maximum),
            highs=np.clip(highs[filled], minimum, maximum),
            counts=counts[filled].astype(np.float64),
        )

    @property
    def minimum(self) -> float:
        """The least value."""
        return float(self.lows[0])

    @property
    def maximum(self) -> float:
        """The greatest value."""
        return float(self.highs[-1])

    def quantile(self, share: float) -> float:
        """The value that the given share (0 to 1) of all values does not exceed."""
        after = np.cumsum(self.counts)
        wanted = share * after[-1]
        index = min(int(np.searchsorted(after, wanted)), len(after) - 1)
        inside = 1.0 - (after[index] - wanted) / self.counts[index]
        low, high = self.lows[index], self.highs[index]
        return float(low + (high - low) * np.clip(inside, 0.0, 1.0))

    def mean_squared_error(
        self, scale: np.ndarray, lowest: np.ndarray, highest: np.ndarray
    ) -> np.ndarray:
        """Mean of `(x - q(x))²` for each of several uniform grids that hold 0, float64 (grids,).

        q rounds x to a multiple of `scale` between `lowest` and `highest`. The integral over a bin
        is taken in closed form, see `_integral`.

        Args:
            scale, lowest, highest: (grids,).
        """
        grids = np.stack([np.asarray(v, np.float64) for v in (scale, lowest, highest)])
        rows = max(1, _LARGEST_ARRAY // len(self.counts))
        parts = [
            self._squared_errors(*grids[:, i : i + rows, None]) @ self.counts
            for i in range(0, grids.shape[1], rows)
        ]
        return np.concatenate(parts) / self.counts.sum()

    def _squared_errors(self, scale, lowest, highest) -> np.ndarray:
        """Mean squared error inside each bin, (grids, bins)."""
        width = self.highs - self.lows
        ends = [_integral(x, scale, lowest, highest) for x in (self.lows, self.highs)]
        errors = (ends[1] - ends[0]) / np.where(width > 0, width, 1.0)
        points = self.lows[width == 0]
        rounded = np.rint(np.clip(points, lowest, highest) / scale) * scale
        errors[:, width == 0] = np.square(points - rounded)
        return errors


def _integral(x, scale, lowest, highest) -> np.ndarray:
    """`∫ (t - q(t))² dt` from 0 to x.

    Each step of the grid adds scale³/12, the way from the nearest grid point r³/3; so does the way
    beyond an end of the grid.
    """
    inside = np.clip(x, lowest, highest)
    steps = inside / scale
    whole = np.rint(steps)
    rest = steps - whole
    return _cube(scale) * (whole / 12.0 + _cube(rest) / 3.0) + _cube(x - inside) / 3.0


def _cube(x) -> np.ndarray:
    return x * x * x  # NumPy's x**3 calls pow, which takes ten times as long


@functools.cache
def _bins() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lows, highs, index in `bin_counts`) of all bins of finite numbers, in ascending order.

    Zero and the subnormals, which kernels flush to zero, are one value: 0.
    """
    index = np.arange(_PER_SIGN - _PER_EXPONENT + 1, dtype=np.uint32)
    edges = (index << np.uint32(_DROPPED_BITS)).view(np.float32).astype(np.float64)
    edges[-1] = float(np.finfo(np.float32).max)
    edges[:_PER_EXPONENT] = 0.0
    lows, highs = edges[:-1], edges[1:].copy()
    highs[_PER_EXPONENT - 1] = 0.0
    positive = np.arange(len(lows))
    return (
        np.concatenate([-highs[::-1], lows]),
        np.concatenate([-lows[::-1], highs]),
        np.concatenate([positive[::-1] + _PER_SIGN, positive]),
    )
