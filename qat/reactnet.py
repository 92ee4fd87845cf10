"""ReActNet's RSign and RPReLU: what the recipe method "reactnet" puts into a binary network.

    RSign    sign(x + b_c)               reads a tensor that lies on an integer grid
    RPReLU   PReLU_c(x + b1_c) + b2_c    takes the place of the ReLU in front of signs

c = the channel; biases start at 0, slopes at 0.25. Both are built of pieces, so that there is a
quantizer wherever the file has a tensor: `RSignQuantizer` is the quantizer of the tensor that a
binary kernel reads; RPReLU is `LearnedShift`, `LearnedSlope`, `LearnedShift`. A shift is left out
where a neighbour is the same parameter: b1 where a bias or a batch normalization alone feeds the
RPReLU, b2 where RSigns alone read it (see `qat.placement`).

Source: arXiv 2003.03488; liuzechun/ReActNet, mobilenet/2_step2/reactnet.py.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qat.prelu import early_weight, prelu
from qat.quantizers import BinaryActivationQuantizer, LastValueQuantizer

METHOD = "reactnet"
FIRST_SLOPE = 0.25


def _per_channel(layer: tf_keras.layers.Layer, name: str, shape, first: float) -> tf.Variable:
    """A trained float32 number for each entry of the last axis."""
    return layer.add_weight(
        name,
        shape=[shape[-1]],
        dtype=tf.float32,
        initializer=tf_keras.initializers.Constant(first),
        trainable=True,
        experimental_autocast=False,
    )


@tf_keras.utils.register_keras_serializable("qat")
class RSignQuantizer(BinaryActivationQuantizer):
    """Activations ±1 with a learned threshold per channel: `+1 where x >= -b, else -1`.

    Backward: the surrogate's derivative at x + b, for x and, summed over all but the last axis, for
    b. Decided by comparing float32 numbers, not by their sum, which compilers may fuse with the
    multiplication in front: so a tie, x = -b, is +1 in every mode, and the export finds the lowest
    code of x's grid that becomes +1 by asking `codes` for all of them.

    Args:
        surrogate, surrogate_options: as `BinaryActivationQuantizer`; by default Bi-Real Net's.

    Source: ReActNet arXiv 2003.03488.
    """

    method = METHOD

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        return {"bias": _per_channel(layer, f"{name}_bias", tensor_shape, 0.0)}

    def codes(self, inputs, weights):
        code = float(self.grid(weights).qmax)
        return tf.where(_reaches(tf.cast(inputs, tf.float32), weights["bias"]), code, -code)

    def quantized(self, inputs, training, weights):
        x = tf.cast(inputs, tf.float32)
        differentiable = self.sign(x + weights["bias"])
        exact = tf.where(_reaches(x, weights["bias"]), 1.0, -1.0)
        return tf.cast(differentiable + tf.stop_gradient(exact - differentiable), inputs.dtype)


def _reaches(x: tf.Tensor, bias: tf.Variable) -> tf.Tensor:
    return x >= -tf.convert_to_tensor(bias)


@tf_keras.utils.register_keras_serializable("qat")
class LearnedShift(tf_keras.layers.Layer):
    """`x + b`, b a trained number for each channel (last axis) that starts at 0."""

    def build(self, input_shape):
        self.shift = _per_channel(self, "shift", input_shape, 0.0)
        super().build(input_shape)

    def call(self, inputs):
        return inputs + tf.cast(self.shift, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@tf_keras.utils.register_keras_serializable("qat")
class LearnedSlope(tf_keras.layers.Layer):
    """RPReLU's PReLU: `x where x >= 0, else a·x`, a trained per channel, on a grid of 8 bits.

    a = `slope` on the symmetric grid of its own largest magnitude, one scale for all channels: the
    int8 constant of the file. Backward: dx = g, or a·g below zero; da = Σ g·x over x below zero
    (straight through the rounding).

    Args:
        replaced: class name of the layer that stood here.
    """

    def __init__(self, replaced: str, **kwargs):
        super().__init__(**kwargs)
        self.replaced = replaced
        self.quantizer = LastValueQuantizer(num_bits=8, symmetric=True)

    def build(self, input_shape):
        self.slope = _per_channel(self, "slope", input_shape, FIRST_SLOPE)
        self.early = early_weight(self)
        super().build(input_shape)

    def call(self, inputs):
        slope = self.quantizer(tf.convert_to_tensor(self.slope), False, {})
        return prelu(inputs, slope, self.early)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "replaced": self.replaced}
