"""Keras layers that the quantizer puts into a model."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qat.prelu import early_weight, prelu
from qat.quantizers import GridQuantizer, LastValueQuantizer

# Less than half the distance of two averages of up to 2,000 codes, more than float32 gets wrong.
_NUDGE = 2.0**-12


@tf_keras.utils.register_keras_serializable("qat")
class ReplacedBySign(tf_keras.layers.Layer):
    """The identity, in the place of a ReLU whose readers take the sign of its input instead.

    Args:
        replaced: class name of the layer that stood here.
    """

    def __init__(self, replaced: str, **kwargs):
        super().__init__(**kwargs)
        self.replaced = replaced

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "replaced": self.replaced}


@tf_keras.utils.register_keras_serializable("qat")
class QuantizedPReLU(tf_keras.layers.PReLU):
    """PReLU with the slopes of the file: on the symmetric 8-bit grid of their largest magnitude.

    One scale for all of them, as TFLite's PRELU has it. Backward: straight through the rounding.
    """

    replaced = "PReLU"

    def build(self, input_shape):
        super().build(input_shape)
        self.quantizer = LastValueQuantizer(num_bits=8, symmetric=True)
        self.early = early_weight(self)

    def call(self, inputs):
        slope = self.quantizer(tf.convert_to_tensor(self.alpha), False, {})
        return prelu(inputs, slope, self.early)

    @classmethod
    def made_of(cls, layer: tf_keras.layers.PReLU) -> QuantizedPReLU:
        """The same layer, built, with the same slopes and name."""
        made = cls.from_config(layer.get_config())
        made.trainable = layer.trainable
        made.build((None, *layer.alpha.shape))
        made.alpha.assign(layer.alpha)
        return made


@tf_keras.utils.register_keras_serializable("qat")
class FakeQuantize(tf_keras.layers.Layer):
    """Fake-quantizes the tensor that flows through it.

    Called twice it gives two tensors one grid; `observe=False` keeps a call's data out of the
    range, for a tensor that lives on another's grid. `averages=True` rounds halves away from code
    0, as LiteRT's average pooling does with the averages of codes.

    Args:
        quantizer: a `GridQuantizer`.
    """

    def __init__(self, quantizer: GridQuantizer, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(quantizer, GridQuantizer):
            raise ValueError(
                f"FakeQuantize {self.name!r} needs a qat.quantizers quantizer, got {quantizer!r}"
            )
        self.quantizer = quantizer

    def build(self, input_shape):
        self.quantizer_weights = self.quantizer.build(input_shape, "output", self)
        super().build(input_shape)

    def call(self, inputs, training=None, observe: bool = True, averages: bool = False):
        logits = getattr(inputs, "_keras_logits", None)
        if averages:
            inputs = self._away_from_halves(inputs)
        if tf.is_tensor(training):
            outputs = tf.cond(
                tf.cast(training, tf.bool),
                lambda: self.quantizer(inputs, observe, weights=self.quantizer_weights),
                lambda: self.quantizer(inputs, False, weights=self.quantizer_weights),
            )
        else:
            observes = bool(training) and observe
            outputs = self.quantizer(inputs, observes, weights=self.quantizer_weights)
        if logits is not None:
            # Keras's losses go by the logits of a softmax or sigmoid, as of the float model. A
            # probability that is rounded to 0 has no gradient.
            outputs._keras_logits = tf.cast(logits, tf.float32)
        return outputs

    def _away_from_halves(self, inputs):
        """`x + s · 2^-12 · sign(x + z·s)`: ties leave the half, nothing else crosses one."""
        grid = self.quantizer.grid(self.quantizer_weights, tf.stop_gradient(inputs))
        from_code_0 = tf.sign(tf.cast(inputs, tf.float32) + grid.zero_point * grid.scale)
        nudge = tf.stop_gradient(grid.scale * _NUDGE * from_code_0)
        return inputs + tf.cast(nudge, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        quantizer = tf_keras.utils.legacy.serialize_keras_object(self.quantizer)
        return {**super().get_config(), "quantizer": quantizer}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FakeQuantize:
        config = dict(config)
        quantizer = tf_keras.utils.legacy.deserialize_keras_object(config.pop("quantizer"))
        return cls(quantizer, **config)
