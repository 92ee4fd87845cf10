"""Uniform min-max quantizers: the tensor's own range, a running range, or a fixed one."""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf
import tf_keras

from qat import ranges
from qat.grid import Grid, affine_grid, symmetric_grid
from qat.quantizers.base import (
    GridQuantizer,
    over_replicas,
    range_shape,
    range_variable,
    required,
)
from qat.quantizers.behind_relu import relu_in_front
from qat.quantizers.rounding import Backward, fake_quantize, in_float32

LEGAL_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


class UniformQuantizer(GridQuantizer):
    """Base of the uniform quantizers: turns a range into a grid, and rounds to it.

    Args:
        num_bits: 1 to 8, or 16 (always symmetric).
        symmetric: zero point 0 (weights, 16-bit tensors); else affine over [min, max] with 0.
        narrow_range: symmetric grids only, leaves the lowest code unused.
        channel_axes: axes that keep a range of their own, e.g. (-1,) for a convolution kernel,
            (-2, -1) for a depthwise one; None = one range for the tensor.
        backward, strength: the tensor's gradient, see `qat.quantizers.rounding`.

    Raises:
        ValueError: illegal `num_bits`, 1 or 16 bits with the wrong symmetry, or `backward`.
    """

    method = "minmax"
    clips = True

    def __init__(
        self,
        *,
        num_bits: int = 8,
        symmetric: bool = False,
        narrow_range: bool = True,
        channel_axes: tuple[int, ...] | None = None,
        backward: str = "ste",
        strength: float | None = None,
    ):
        if num_bits not in LEGAL_BITS:
            raise ValueError(f"num_bits must be one of {LEGAL_BITS}, got {num_bits!r}")
        if symmetric and num_bits == 1:
            symmetric_grid(tf.constant(1.0), num_bits=1)
        if not symmetric and num_bits == 16:
            raise ValueError("16-bit grids are symmetric in TFLite: pass symmetric=True")
        self.num_bits = num_bits
        self.symmetric = symmetric
        self.narrow_range = narrow_range
        self.channel_axes = None if channel_axes is None else tuple(channel_axes)
        self.backward = Backward(rule=backward, strength=strength)

    @abc.abstractmethod
    def range(
        self, weights: dict[str, Any], inputs: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(minimum, maximum) that the grid covers now, float32."""

    def grid(self, weights: dict[str, Any], inputs: tf.Tensor | None = None) -> Grid:
        minimum, maximum = self.range(weights, inputs)
        if self.symmetric:
            bound = tf.maximum(-minimum, maximum)
            return symmetric_grid(bound, num_bits=self.num_bits, narrow_range=self.narrow_range)
        return affine_grid(minimum, maximum, num_bits=self.num_bits)

    def quantized(self, inputs, training, weights):
        return self._on(self.grid(weights, tf.stop_gradient(in_float32(inputs))), inputs)

    def _on(self, grid: Grid, inputs: tf.Tensor) -> tf.Tensor:
        return fake_quantize(inputs, grid, clipped=self.clips, backward=self.backward)

    def get_config(self) -> dict[str, Any]:
        return {
            "num_bits": self.num_bits,
            "symmetric": self.symmetric,
            "narrow_range": self.narrow_range,
            "channel_axes": self.channel_axes,
            "backward": self.backward.rule,
            "strength": self.backward.strength,
        }


@tf_keras.utils.register_keras_serializable("qat")
class LastValueQuantizer(UniformQuantizer):
    """Min-max over the tensor as it is now; the choice for weights.

    Keeps no state, so the grid can never lag behind the weights that an optimizer, a checkpoint
    or `set_weights` has just changed. Options as `UniformQuantizer`.
    """

    clips = False

    def range(self, weights, inputs):
        return ranges.tensor_range(required(inputs, self), self.channel_axes)


@tf_keras.utils.register_keras_serializable("qat")
class MovingAverageQuantizer(UniformQuantizer):
    """Min-max over a debiased exponential moving average of batch ranges; for activations.

    `a ← decay·a + (1-decay)·batch`, range `a / (1 - decay^t)`. Before the first training batch
    the range is the current batch's own, and `grid` without inputs is refused. A batch of zeros
    fits any range and changes none: that of units which no example activates would fade to 0.

    Args:
        decay: share of the past kept at each training step, in [0, 1).
        Others as `UniformQuantizer`.
    """

    def __init__(self, *, decay: float = 0.99, **options):
        super().__init__(**options)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay!r}")
        self.decay = decay

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        shape = range_shape(tensor_shape, self.channel_axes)
        return {
            "minimum": range_variable(layer, f"{name}_minimum", shape),
            "maximum": range_variable(layer, f"{name}_maximum", shape),
            "observed": range_variable(layer, f"{name}_observed", []),
        }

    def range(self, weights, inputs):
        def stored():
            share = tf.convert_to_tensor(weights["observed"])
            return weights["minimum"] / share, weights["maximum"] / share

        if inputs is None:
            if tf.executing_eagerly() and not weights["observed"] > 0:
                raise ValueError(
                    "no range was observed yet: train, or call qat.calibrate(model, dataset)"
                )
            return stored()
        return tf.cond(
            tf.convert_to_tensor(weights["observed"]) > 0,
            stored,
            lambda: ranges.tensor_range(inputs, self.channel_axes),
        )

    def set_range(self, weights, minimum, maximum):
        weights["minimum"].assign(minimum)
        weights["maximum"].assign(maximum)
        weights["observed"].assign(1.0)
        return True

    def quantized(self, inputs, training, weights):
        if not training:
            return super().quantized(inputs, training, weights)
        minimum, maximum = over_replicas(*self._batch_range(inputs))
        batch = {"minimum": minimum, "maximum": maximum, "observed": tf.constant(1.0)}
        past = {key: tf.convert_to_tensor(variable) for key, variable in weights.items()}
        # Zeros are no past, and no news.
        starts = tf.equal(self._bound(past), 0.0)
        past["observed"] = tf.where(starts, 0.0, past["observed"])
        counts = tf.logical_or(starts, tf.not_equal(self._bound(batch), 0.0))
        for key, value in batch.items():
            moved = ranges.moving_average(past[key], tf.stop_gradient(value), self.decay)
            weights[key].assign(tf.where(counts, moved, weights[key]))
        return self._on(self.grid(weights), inputs)

    def _bound(self, found: dict[str, tf.Tensor]) -> tf.Tensor:
        bound = tf.maximum(-found["minimum"], found["maximum"])
        return bound if self.channel_axes is None else tf.norm(bound, 1)

    def _batch_range(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if self.channel_axes is None and relu_in_front(inputs) is not None:
            return tf.constant(0.0), tf.reduce_max(in_float32(inputs))  # the grid holds 0 anyway
        return ranges.tensor_range(inputs, self.channel_axes)

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


@tf_keras.utils.register_keras_serializable("qat")
class FixedRangeQuantizer(UniformQuantizer):
    """Min-max over a range given once: image bytes [0, 255], softmax [0, 255/256], tanh.

    Args:
        minimum, maximum: real units, minimum < maximum.
        Others as `UniformQuantizer` (no channel axes).

    Raises:
        ValueError: an empty or non-finite range.
    """

    def __init__(self, *, minimum: float, maximum: float, **options):
        super().__init__(**options)
        if not float("-inf") < minimum < maximum < float("inf"):
            raise ValueError(f"need finite minimum < maximum, got [{minimum!r}, {maximum!r}]")
        self.minimum = float(minimum)
        self.maximum = float(maximum)

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        # Variables, because compiled graphs replace the division by a constant scale with a
        # multiplication by its rounded reciprocal, which moves some values by a code.
        ends = {"minimum": self.minimum, "maximum": self.maximum}
        return {
            key: range_variable(layer, f"{name}_{key}", [], tf_keras.initializers.Constant(end))
            for key, end in ends.items()
        }

    def range(self, weights, inputs):
        return (
            tf.convert_to_tensor(weights.get("minimum", self.minimum)),
            tf.convert_to_tensor(weights.get("maximum", self.maximum)),
        )

    def get_config(self):
        return {**super().get_config(), "minimum": self.minimum, "maximum": self.maximum}
