"""Biases that keep every sum of a 1-bit kernel away from rounding ties.

A convolution of ±1 by ±α has few sums: `unit · k`, whole k. In steps of the output's grid the
result is `y(k) = (unit · k + b) · M`. LiteRT's fixed-point kernels, which also run all INT4
convolutions, round it twice: to a multiple of q, M <= q <= 2 · M, then to a whole number. Where
y(k) lies within q / 2 of a half, the first rounding can land on the half, and the second goes to
the wrong side: for this k in every image. Training rounds once. A bias a few accumulator steps away
has no such k.
"""

from __future__ import annotations

import numpy as np

from qat.grid import Grid

# How many consecutive biases there are to choose from, and how far they spread at most, in steps of
# the output's grid.
_MOST_BIASES, _FARTHEST = 64, 1 / 8
# What float32 loses in training's sums and in XNNPACK's kernels, in steps of the output's grid.
_FLOAT_ERROR = 2.0**-12


def away_from_ties(
    bias: np.ndarray, multiplier: np.ndarray, sums: np.ndarray, grid: Grid
) -> np.ndarray:
    """The nearest biases for which all kernels round all sums alike.

    The nearest b with `|y - floor(y) - 1/2| >= M + 2^-12` for all `y = (sum + b) · M` between the
    grid's lowest and highest code; where there is none, the b with the greatest such distance. The
    choice is among the 64 biases (less, where they spread over 1/8 output step) of the block that
    the given one lies in, so that a second call finds the same.

    Args:
        bias: whole numbers of accumulator steps, one per channel; not finite ones stay.
        multiplier: M, accumulator step / output step, per channel.
        sums: all that the accumulator can hold before the bias is added.
        grid: of the output, NumPy.
    """
    found, most = bias.copy(), np.full(bias.shape, -np.inf)
    needed = multiplier + _FLOAT_ERROR
    block = np.clip(np.floor(_FARTHEST / multiplier), 1, _MOST_BIASES)
    place = bias % block
    for shift in sorted(range(1 - _MOST_BIASES, _MOST_BIASES), key=abs):
        moved = place + shift
        left = np.flatnonzero((most < needed) & (moved >= 0) & (moved < block))
        distance = _distance(bias[left] + shift, multiplier[left], sums, grid)
        better = distance > most[left]
        found[left[better]] = bias[left[better]] + shift
        most[left[better]] = distance[better]
    return found


def _distance(bias: np.ndarray, multiplier: np.ndarray, sums: np.ndarray, grid: Grid) -> np.ndarray:
    """Per channel, the least distance from a half of any output that is not clipped."""
    y = (sums[:, None] + bias) * multiplier
    distance = np.abs(y - np.floor(y) - 0.5)
    codes = y + grid.zero_point
    distance[(codes < grid.qmin) | (codes > grid.qmax)] = 0.5
    return distance.min(axis=0)
