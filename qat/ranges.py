"""Where a grid's range comes from: reductions of a tensor and their running averages."""

from __future__ import annotations

import tensorflow as tf


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
