"""Where a grid's range comes from: reductions of a tensor, running averages, searches."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from qat.grid import Grid, affine_grid, symmetric_grid
from qat.histogram import Histogram

# A search tries bounds down to 2^-10 of the largest magnitude, evenly in their logarithm: an
# outlier may lie a thousand times above the rest.
_OCTAVES = 10.0
_NUM_BOUNDS = 128
# Of each end, where both ends of a range are searched for: 17² pairs.
_NUM_BOUNDS_OF_A_PAIR = 17
# Then twice more, between the neighbours of the best.
_NUM_NEAR = 9
_ROUNDS_NEAR = 2
# Elements of the largest tensor that a search makes: bounds are tried in pieces.
_LARGEST_TENSOR = 2**22


def reduction_axes(rank: int, channel_axes: tuple[int, ...] | None) -> list[int]:
    """Axes that share one range: all of them, or all but the channel axes (negative or not)."""
    kept = {axis % rank for axis in channel_axes or ()}
    return [axis for axis in range(rank) if axis not in kept]


def tensor_range(
    x: tf.Tensor, channel_axes: tuple[int, ...] | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Least and greatest value of x, float32; kept dimensions of size 1 when per channel.

    Per tensor the result is a scalar. Per channel it broadcasts against x.
    """
    x = tf.cast(x, tf.float32)
    if channel_axes is None:
        return tf.reduce_min(x), tf.reduce_max(x)
    axes = reduction_axes(x.shape.rank, channel_axes)
    return tf.reduce_min(x, axes, keepdims=True), tf.reduce_max(x, axes, keepdims=True)


def tensor_bound(x: tf.Tensor, channel_axes: tuple[int, ...] | None = None) -> tf.Tensor:
    """Greatest magnitude of x, shaped as `tensor_range`."""
    minimum, maximum = tensor_range(x, channel_axes)
    return tf.maximum(-minimum, maximum)


def mean_magnitude(x: tf.Tensor, channel_axes: tuple[int, ...] | None = None) -> tf.Tensor:
    """Mean of |x|, shaped as `tensor_range` (the XNOR-Net scale, arXiv 1603.05279)."""
    magnitude = tf.abs(tf.cast(x, tf.float32))
    if channel_axes is None:
        return tf.reduce_mean(magnitude)
    return tf.reduce_mean(magnitude, reduction_axes(x.shape.rank, channel_axes), keepdims=True)


def moving_average(average: tf.Tensor, value: tf.Tensor, decay: float) -> tf.Tensor:
    """One step of an exponential moving average from 0: `decay·average + (1-decay)·value`.

    Divide by the same average of the constant 1 to remove the start's bias
    (Adam's debiasing, arXiv 1412.6980, section 3).
    """
    return decay * average + (1.0 - decay) * value


def mse_bound(
    x: tf.Tensor,
    channel_axes: tuple[int, ...] | None = None,
    *,
    num_bits: int,
    narrow_range: bool = True,
) -> tf.Tensor:
    """The bound whose symmetric grid has the least mean squared error on x, as `tensor_bound`.

    `argmin_b mean (x - q_b(x))²` over 128 bounds b <= max|x|, then over bounds near the best;
    never worse than the bound max|x|. All channels are searched at once.

    Args:
        num_bits, narrow_range: of the grid, see `symmetric_grid`.
    """
    x = tf.cast(x, tf.float32)
    largest = tensor_bound(x, channel_axes)
    axes = [1 + axis for axis in reduction_axes(x.shape.rank, channel_axes)]
    kept = largest.shape if channel_axes is not None else [1] * x.shape.rank

    def errors(bounds: np.ndarray) -> np.ndarray:
        # The grid's rounding written with fewer operations, in steps; its zero point is 0.
        grid = symmetric_grid(tf.constant(bounds), num_bits=num_bits, narrow_range=narrow_range)
        scale = tf.reshape(grid.scale, [-1, *kept])
        steps = x[None] / scale
        codes = tf.clip_by_value(tf.round(steps), float(grid.qmin), float(grid.qmax))
        noise = tf.reduce_mean(tf.math.squared_difference(codes, steps), axes, keepdims=True)
        return tf.reshape(noise * tf.square(scale), bounds.shape).numpy()

    largest = best = largest.numpy()
    at_once = max(1, _LARGEST_TENSOR // max(1, x.shape.num_elements()))
    for shares in _rounds(_NUM_BOUNDS):
        shares = shares.astype(np.float32).reshape(-1, *[1] * best.ndim)
        bounds = np.minimum(shares * best, largest)
        pieces = [errors(bounds[i : i + at_once]) for i in range(0, len(bounds), at_once)]
        index = np.concatenate(pieces).argmin(0)
        best = np.take_along_axis(bounds, index[None], 0)[0]
    return tf.constant(best)


def mse_range(
    histogram: Histogram, *, num_bits: int, symmetric: bool = False
) -> tuple[float, float]:
    """(minimum, maximum) whose grid has the least mean squared error on the histogram's values.

    `argmin mean (x - q(x))²`: over 128 clippings of the one end that is not 0, or of both ends of a
    symmetric range; over 17² pairs where values lie on both sides of 0. Then near the best.

    Args:
        num_bits, symmetric: of the grid, see `affine_grid` and `symmetric_grid`.
    """
    least, greatest = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if symmetric:
        least, greatest = 0.0, max(-least, greatest)

    def errors(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        grid = _grid(low, high, num_bits, symmetric)
        return histogram.mean_squared_error(
            *np.broadcast_arrays(grid.scale, grid.lowest, grid.highest)
        )

    low, high = least, greatest
    for shares in _rounds(_NUM_BOUNDS_OF_A_PAIR if least < 0 < greatest else _NUM_BOUNDS):
        lows = np.unique(np.maximum(low * shares, least))
        highs = np.unique(np.minimum(high * shares, greatest))[::-1]
        pairs = [array.ravel() for array in np.meshgrid(lows, highs, indexing="ij")]
        index = np.argmin(errors(*pairs))
        low, high = pairs[0][index], pairs[1][index]
    return float(-high if symmetric else low), float(high)


def _grid(low: np.ndarray, high: np.ndarray, num_bits: int, symmetric: bool) -> Grid:
    if symmetric:
        return symmetric_grid(tf.constant(high, tf.float32), num_bits=num_bits)
    low, high = tf.constant(low, tf.float32), tf.constant(high, tf.float32)
    return affine_grid(low, high, num_bits=num_bits)


def _rounds(count: int) -> list[np.ndarray]:
    """For each round of a search, the shares of the best bound so far that it tries.

    Largest first in the first round, the best so far first in those that follow: it wins a tie.
    """
    spacing = _OCTAVES / (count - 1)
    rounds = [2.0 ** (-spacing * np.arange(count))]
    nearness = sorted(np.linspace(-1.0, 1.0, _NUM_NEAR), key=abs)
    for _ in range(_ROUNDS_NEAR):
        rounds.append(2.0 ** (spacing * np.array(nearness)))
        spacing *= 2.0 / (_NUM_NEAR - 1)
    return rounds
