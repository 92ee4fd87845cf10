"""Biases and grids for kernels that round twice.

LiteRT's fixed-point kernels, which also run all INT4 convolutions, scale a sum to `y = sum · M` in
steps of the output's grid and round it twice: to a multiple of q, M < q <= 2 · M, halves up, then
to a whole number, halves away from zero. A y less than q / 2 under a half lands on the half first
and is rounded up then. Training rounds once.

Behind a ReLU every y that counts is positive, and this is one rounding at thresholds q / 2 lower:
`early` says by how many accumulator steps, for the bias to make up for. Elsewhere the kernel's
output is counted from the grid's lowest code (`from_lowest`), so that it is positive, too, and an
ADD of a constant behind the kernel brings it back. A convolution of ±1 by ±α has few sums,
`unit · k` with whole k, but the same ones in every image: `away_from_ties` moves its bias to where
no sum comes near a half.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qat.grid import Grid

# Codes of an int32 bias, as many again are the products'; and of an int64 one, whose sums the
# kernels multiply as 47-bit numbers.
LARGEST_BIAS, LARGEST_WIDE_BIAS = 2**30, 2**46
# How many consecutive biases there are to choose from, and how far they spread at most, in steps of
# the output's grid.
_MOST_BIASES, _FARTHEST = 64, 1 / 8
# What float32 loses in training's sums and in XNNPACK's kernels, in steps of the output's grid.
_FLOAT_ERROR = 2.0**-12
# Steps of the accumulator, in steps of the output's grid, below which the second rounding is left
# as it is: it moves less than this share of the codes, by one.
_NEGLIGIBLE = 2.0**-11


def largest_bias(step: np.ndarray, output_step: float, *, wide: bool) -> np.ndarray:
    """Where a bias's code is cut: a kernel's sums, and their multiples, fit their registers.

    Args:
        step: of the accumulator, per channel. wide: for sums of 64 bits.
    """
    cap = LARGEST_WIDE_BIAS if wide else LARGEST_BIAS
    return np.floor(np.minimum(cap, 2.0**30 * output_step / step))


def from_lowest(step: np.ndarray, grid: Grid) -> Grid:
    """The grid that a kernel that rounds twice, with no ReLU fused in, writes its output on.

    Of the same scale, with the lowest code as its zero point; or the output's own grid, if that
    has no negative numbers, is of 16 bits (whose kernels round once), or is of 8 and the steps are
    negligible.

    Args:
        step: of the accumulator, one per channel, float64.
        grid: of the output, NumPy.
    """
    free = grid.qmin > -128  # the ADD takes the place of the MAXIMUM that clamps
    coarse = np.max(step) > _NEGLIGIBLE * float(grid.scale)
    if grid.qmin < -128 or grid.zero_point == grid.qmin or not (free or coarse):
        return grid
    return dataclasses.replace(grid, zero_point=np.float32(grid.qmin))


def early(step: np.ndarray, grid: Grid, *, rectified: bool = False) -> np.ndarray:
    """By how many accumulator steps a kernel that rounds twice reaches every code early.

    `q / (2 · M)`, M = step / grid's scale, q = 2^e of `M = m · 2^e`, 1/2 <= m < 1: within (1/2, 1].
    0 for M >= 1/2 and for 16 bits, where the kernel rounds once, and where negative numbers count,
    which it reaches early on both sides of zero.

    Args:
        step: of the accumulator, one per channel, float64.
        grid: that the kernel writes on, NumPy.
        rectified: a ReLU is fused in, so that negative numbers do not count.
    """
    if grid.qmin < -128 or not (rectified or grid.zero_point == grid.qmin):
        return np.zeros_like(step)
    fraction, exponent = np.frexp(step / float(grid.scale))
    return np.where((exponent < 0) & (fraction > 0), 0.5 / np.maximum(fraction, 0.5), 0.0)


def second_rounding(step: np.ndarray, output_step: float) -> np.ndarray:
    """q / 2 in real numbers: how far from 0 a kernel that rounds twice reaches every code early.

    0 for M >= 1/2. Args as `early`'s; output_step: the output's scale.
    """
    _, exponent = np.frexp(step / output_step)
    return np.where(exponent < 0, np.ldexp(0.5, exponent) * output_step, 0.0)


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
