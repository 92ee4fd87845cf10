"""What every quantizer here is: a TFMOT `Quantizer` that can name the integers it makes."""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from qat.grid import Grid


class GridQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """A TFMOT quantizer whose output always lies on a `Grid`.

    `weights` is the dictionary that `build` returned. `inputs` is the tensor to quantize; only
    quantizers whose range is the tensor's own need it. `method` is the quantizer's name in recipes.
    """

    method = ""

    @abc.abstractmethod
    def grid(self, weights: dict[str, Any], inputs: tf.Tensor | None = None) -> Grid:
        """The grid that the forward pass rounds to now; training and export both ask here.

        Raises:
            ValueError: the range comes from data or from `inputs`, and there was none.
        """

    def codes(self, inputs: tf.Tensor, weights: dict[str, Any]) -> tf.Tensor:
        """The integers (float32 whole numbers) that stand for `inputs` on the grid."""
        return self.grid(weights, inputs).quantize(inputs)


def in_float32(x: tf.Tensor | tf.Variable) -> tf.Tensor:
    """x as float32; a variable under mixed precision is read before Keras rounds it to 16 bits."""
    return tf.cast(getattr(x, "_variable", x), tf.float32)


def fake_quantize(x: tf.Tensor, grid: Grid, *, clipped: bool = True) -> tf.Tensor:
    """Rounds x to the grid and back, with a straight-through gradient.

    Forward `(clip(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`; backward
    `dx = g` where x lies between the reals of qmin and qmax (both included), else 0. The grid
    gets no gradient. Computed in float32, returned in x's dtype.

    Args:
        clipped: some x may lie outside. If the grid was made from x itself none does, and a
            comparison could only lose the largest one to rounding.

    Source: tensorflow/core/kernels/fake_quant_ops_functor.h (the FakeQuant kernels).
    """

    @tf.custom_gradient
    def forward(x32, scale, zero_point):
        lowest = (float(grid.qmin) - zero_point) * scale
        highest = (float(grid.qmax) - zero_point) * scale

        def backward(upstream):
            if not clipped:
                return upstream, None, None
            inside = tf.logical_and(x32 >= lowest, x32 <= highest)
            return tf.where(inside, upstream, tf.zeros_like(upstream)), None, None

        return grid.dequantize(grid.quantize(x32)), backward

    return tf.cast(forward(in_float32(x), grid.scale, grid.zero_point), x.dtype)


def range_variable(
    layer: tf_keras.layers.Layer, name: str, shape: list[int], initializer: Any = "zeros"
) -> tf.Variable:
    """A float32 variable that training updates but no optimizer does; replicas average it."""
    return layer.add_weight(
        name,
        shape=shape,
        dtype=tf.float32,
        initializer=initializer,
        trainable=False,
        experimental_autocast=False,
        synchronization=tf.VariableSynchronization.AUTO,
        aggregation=tf.VariableAggregation.MEAN,
    )
