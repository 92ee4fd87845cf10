"""TFMOT's own schemes on the same float weights, its network prepared as TFMOT needs it."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

# The only way to its n-bit scheme: TFMOT's public names leave it out.
from tensorflow_model_optimization.python.core.quantization.keras.experimental.default_n_bit import (  # noqa: E501
    default_n_bit_quantize_scheme,
)

from qat.canonical import Call, calls, consumers, functional, rebuild
from qat.canonical.graph import LayerCopies
from qat.errors import QatError
from qat.train import TrainingData

keras = tfmot.quantization.keras
layers = tf_keras.layers


class PeerError(QatError):
    """A peer cannot take the network, or fails on it. One line."""


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """Training data for a network that lost its Rescaling layer: `x * scale + offset`."""

    data: TrainingData
    scale: float
    offset: float

    @property
    def steps_per_epoch(self) -> int:
        """As the data's own."""
        return self.data.steps_per_epoch

    @property
    def validation(self) -> tf.data.Dataset:
        """As the data's own, rescaled."""
        return self.of(self.data.validation)

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """As the data's own, rescaled."""
        return self.of(self.data.train_stream(start_step))

    def of(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Any batches (x, y), rescaled."""
        return batches.map(lambda x, y: (x * self.scale + self.offset, y))


def widths(recipe: str) -> tuple[int, int]:
    """(bits of weights, of activations) of "w4a8"."""
    weights, activations = re.fullmatch(r"w(\d+)a(\d+)", recipe).groups()
    return int(weights), int(activations)


def quantized(model: tf_keras.Model, recipe: str) -> tf_keras.Model:
    """TFMOT's network for "w8a8" (its default 8-bit scheme) or other widths (its n-bit scheme).

    Args:
        model: what `without_rescaling` returns.

    Raises:
        PeerError: TFMOT rejects a layer.
    """
    weight_bits, activation_bits = widths(recipe)
    try:
        if recipe == "w8a8":
            return keras.quantize_model(model)
        scheme = default_n_bit_quantize_scheme.DefaultNBitQuantizeScheme(
            num_bits_weight=weight_bits, num_bits_activation=activation_bits
        )
        return keras.quantize_apply(keras.quantize_annotate_model(model), scheme=scheme)
    except (RuntimeError, ValueError) as error:
        raise PeerError(f"TFMOT rejects {model.name}: {error}") from error


def without_rescaling(model: tf_keras.Model) -> tuple[tf_keras.Model, float, float]:
    """(a copy that takes rescaled pixels, scale, offset): TFMOT rejects Rescaling layers.

    A ReLU right behind a kernel becomes the kernel's activation: TFMOT leaves the kernel of such a
    pair in float.
    """
    model = functional(model)
    copies, merged = LayerCopies(), _merged_relus(model)
    scale, offset = 1.0, 0.0

    def visit(call: Call, args: tuple, kwargs: dict) -> Any:
        nonlocal scale, offset
        layer = call.layer
        if isinstance(layer, layers.Rescaling) and call.inputs[0] is model.inputs[0]:
            scale, offset = float(layer.scale), float(layer.offset)
            return args[0]
        if isinstance(layer, layers.ReLU) and id(call.inputs[0]) in merged:
            return args[0]
        copy = copies(layer)
        if id(call.output) in merged:
            copy.activation = tf_keras.activations.relu
        return copy(*args, **kwargs)

    rebuilt = rebuild(model, visit)
    copies.copy_weights()
    return rebuilt, scale, offset


def _merged_relus(model: tf_keras.Model) -> set[int]:
    """Ids of the tensors between a kernel without activation and a ReLU that alone reads it."""
    readers = consumers(model)
    kinds = (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)
    kernels = [call for call in calls(model) if isinstance(call.layer, kinds)]
    return {
        id(call.output)
        for call in kernels
        if call.layer.activation is tf_keras.activations.linear
        and [_is_plain_relu(reader) for reader in readers[id(call.output)]] == [True]
    }


def _is_plain_relu(call: Call | None) -> bool:
    if call is None or not isinstance(call.layer, layers.ReLU):
        return False
    config = call.layer.get_config()
    return config["max_value"] is None and not (config["negative_slope"] or config["threshold"])


def converted(model: tf_keras.Model) -> bytes:
    """The file that TensorFlow's converter makes of TFMOT's network.

    Raises:
        PeerError: it does not convert.
    """
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        with warnings.catch_warnings(action="ignore"):  # float inputs need no statistics
            return converter.convert()
    except Exception as error:  # ConverterError is an Exception, and not the only one raised
        reason = " ".join(str(error).split())[:200]
        raise PeerError(f"TensorFlow's converter refuses it: {reason}") from error
