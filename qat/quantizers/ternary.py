"""Ternary weights: a negative level, zero and a positive level.

The levels' codes reach ±7, as those of binary kernels do, and for the same reason: a fine grid for
the bias behind them. TTQ's two levels differ; the grid of INT4 holds both.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qat import ranges
from qat.grid import symmetric_grid
from qat.quantizers.base import (
    GridQuantizer,
    range_shape,
    range_variable,
    required,
    straight_through,
    trained_variable,
)
from qat.quantizers.rounding import in_float32

CONTAINER_BITS = 4
_GAINS = ("positive_gain", "negative_gain")


class _TernaryQuantizer(GridQuantizer):
    num_bits = 2
    container_bits = CONTAINER_BITS

    def __init__(self, *, channel_axes: tuple[int, ...] | None):
        self.channel_axes = None if channel_axes is None else tuple(channel_axes)

    def get_config(self) -> dict[str, Any]:
        return {"channel_axes": self.channel_axes}

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        """Over the elements that share a level, shaped as a range."""
        if self.channel_axes is None:
            return tf.reduce_sum(x)
        return tf.reduce_sum(x, ranges.reduction_axes(len(x.shape), self.channel_axes), True)

    def _level(self, x: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
        """Mean of |x| where |x| > threshold: the level nearest to those x; 0 where there are none.

        Source: TWN arXiv 1605.04711.
        """
        magnitude = tf.abs(x)
        kept = tf.cast(magnitude > threshold, tf.float32)
        return tf.math.divide_no_nan(self._sum(magnitude * kept), self._sum(kept))


@tf_keras.utils.register_keras_serializable("qat")
class TwnQuantizer(_TernaryQuantizer):
    """Weights -α, 0, α: `α·sign(w)·1[|w| > Δ]`, Δ = 0.7·mean|w|, α = mean of |w| > Δ.

    Codes ±7 and 0, scale α/7. Backward: the identity. No state: the grid follows the weights.

    Args:
        channel_axes: axes that keep Δ and α of their own; None = one for the tensor.

    Source: TWN arXiv 1605.04711 (the authors' later code takes 0.75).
    """

    method = "twn"
    code_unit = 2 ** (CONTAINER_BITS - 1) - 1

    def __init__(self, *, channel_axes: tuple[int, ...] | None = (-1,)):
        super().__init__(channel_axes=channel_axes)

    def grid(self, weights, inputs=None):
        x = in_float32(required(inputs, self))
        return symmetric_grid(self._level(x, self._threshold(x)), num_bits=CONTAINER_BITS)

    def codes(self, inputs, weights):
        return self._ternary(in_float32(inputs), self.grid(weights, inputs).qmax)

    def quantized(self, inputs, training, weights):
        x = in_float32(inputs)
        grid = self.grid(weights, x)
        values = grid.dequantize(self._ternary(x, grid.qmax))
        return tf.cast(straight_through(x, values), inputs.dtype)

    def _threshold(self, x):
        return 0.7 * ranges.mean_magnitude(x, self.channel_axes)

    def _ternary(self, x, code: int):
        return tf.where(tf.abs(x) > self._threshold(x), tf.sign(x) * float(code), 0.0)


@tf_keras.utils.register_keras_serializable("qat")
class TtqQuantizer(_TernaryQuantizer):
    """Weights -Wn, 0, Wp, both levels trained: Wp where w > t, -Wn where w < -t, t = 0.05·max|w|.

    Forward: the levels are snapped to one grid of scale `max(Wp, Wn)/7`, codes `round(Wp/scale)`, 0
    and `-round(Wn/scale)`; a level below 0 counts as 0. Backward: `dWp = Σ g` over the positives,
    `dWn = -Σ g` over the negatives, `dw = g·(Wp, 1 or Wn)`. Wp and Wn are `unit · gain`, as the
    steps of `qat.quantizers.learned`. Until the first training step both are the mean of |w| > t.

    Args:
        threshold: t / max|w|, in (0, 1).
        channel_axes: axes that keep levels and a t of their own; None = the paper's: one pair.

    Raises:
        ValueError: an illegal threshold.

    Source: TTQ arXiv 1612.01064; czhu95/ternarynet examples/Ternary-Net/ternary.py.
    """

    method = "ttq"

    def __init__(self, *, threshold: float = 0.05, channel_axes: tuple[int, ...] | None = None):
        super().__init__(channel_axes=channel_axes)
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}")
        self.threshold = threshold

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        shape = range_shape(tensor_shape, self.channel_axes)
        made = {"unit": range_variable(layer, f"{name}_unit", shape)}
        for key in _GAINS:
            made[key] = trained_variable(layer, f"{name}_{key}", shape, "ones")
        return made

    def grid(self, weights, inputs=None):
        return self._grid(*self._levels(weights, inputs))

    def codes(self, inputs, weights):
        x = in_float32(inputs)
        levels = self._levels(weights, x)
        return self._ternary(x, *levels, self._grid(*levels).scale)

    def quantized(self, inputs, training, weights):
        x = in_float32(inputs)
        if training:
            self._start(weights, tf.stop_gradient(x))

        @tf.custom_gradient
        def forward(x, positive, negative):
            is_positive, is_negative = self._signs(x)
            grid = self._grid(positive, negative)

            def gradients(upstream):
                slope = tf.where(is_positive, tf.nn.relu(positive), 1.0)
                slope = tf.where(is_negative, tf.nn.relu(negative), slope)
                above = self._sum(tf.where(is_positive, upstream, 0.0))
                below = self._sum(tf.where(is_negative, upstream, 0.0))
                return upstream * slope, above, -below

            codes = self._ternary(x, positive, negative, grid.scale)
            return grid.dequantize(codes), gradients

        return tf.cast(forward(x, *self._levels(weights, tf.stop_gradient(x))), inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "threshold": self.threshold}

    def _levels(self, weights, inputs) -> tuple[tf.Tensor, tf.Tensor]:
        """(Wp, Wn) before they are snapped."""
        unit = tf.convert_to_tensor(weights["unit"])
        if inputs is not None or not tf.reduce_any(tf.not_equal(unit, 0.0)):
            x = in_float32(required(inputs, self))
            unit = tf.where(tf.equal(unit, 0.0), self._first_level(x), unit)
        return tuple(unit * weights[key] for key in _GAINS)

    def _first_level(self, x):
        return self._level(x, self._threshold(x))

    def _start(self, weights, x) -> None:
        """Keeps the first level where there is none, which is also where all weights were 0.

        Not under a condition, where replicas could not average it; they add 0 afterwards.
        """
        missing = tf.equal(tf.convert_to_tensor(weights["unit"]), 0.0)
        weights["unit"].assign_add(tf.where(missing, self._first_level(x), 0.0))

    def _threshold(self, x):
        return self.threshold * ranges.tensor_bound(x, self.channel_axes)

    def _grid(self, positive, negative):
        return symmetric_grid(tf.maximum(positive, negative), num_bits=CONTAINER_BITS)

    def _signs(self, x) -> tuple[tf.Tensor, tf.Tensor]:
        threshold = self._threshold(x)
        return x > threshold, x < -threshold

    def _ternary(self, x, positive, negative, scale):
        is_positive, is_negative = self._signs(x)
        above, below = (tf.nn.relu(tf.round(level / scale)) for level in (positive, negative))
        return tf.where(is_positive, above, tf.where(is_negative, -below, 0.0))
