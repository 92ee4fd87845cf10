"""Putting the biases of a trained model on the grid that the file stores them on."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.canonical import Call, calls, consumers, functional
from qat.layers import FakeQuantize

layers = tf_keras.layers
_LARGEST_BIAS = 2**31 - 1


def settle_biases(model: tf_keras.Model) -> tf_keras.Model:
    """Rounds every bias to the int32 multiple of its scale that the file will hold.

    The file stores `round(b / S)`, S = input scale · kernel scale, of the bias b that batch
    normalization leaves. Left to the export, that rounding is the largest difference between model
    and file: where a sign or a 4-bit grid follows, it moves codes. Here the model takes it over:
    the batch norm's beta (else the layer's own bias) changes by at most S / 2. Call it when
    training is over; a second call changes nothing.

    Args:
        model: quantized and calibrated; changed in place.

    Returns:
        The model.
    """
    model = functional(model)
    readers = consumers(model)
    producer = {id(call.output): call for call in calls(model)}
    for call in calls(model):
        if isinstance(call.layer, QuantizeWrapper) and call.layer._weight_vars:
            scale = _input_scale(call.inputs[0], producer)
            following = readers[id(call.output)]
            alone = len(following) == 1 and following[0] is not None
            if scale is not None:
                _settle(call, scale, following[0].layer if alone else None)
    return model


def _input_scale(tensor: Any, producer: dict[int, Call]) -> float | None:
    """The scale of the grid that a kernel reads, Rescalings included; None in float."""
    gain = 1.0
    while id(tensor) in producer:
        call = producer[id(tensor)]
        if isinstance(call.layer, FakeQuantize):
            with tf.device("/CPU:0"):
                grid = call.layer.quantizer.grid(call.layer.quantizer_weights)
            return float(grid.scale) * gain
        if isinstance(call.layer, layers.Rescaling):
            gain *= float(call.layer.scale)
        elif configs.kernels(getattr(call.layer, "layer", call.layer)):
            return None
        tensor = call.inputs[0]
    return None


def _settle(call: Call, x_scale: float, reader: layers.Layer | None) -> None:
    layer = call.layer.layer
    ((weight, quantizer, weights),) = call.layer._weight_vars
    with tf.device("/CPU:0"):
        scale = quantizer.grid(weights, tf.convert_to_tensor(weight)).numpy().scale
    step = x_scale * np.broadcast_to(scale, _channel_shape(layer, weight)).reshape(-1).astype(float)
    own = layer.bias.numpy().astype(float) if layer.use_bias else 0.0
    if isinstance(reader, layers.BatchNormalization) and reader.center:
        deviation = np.sqrt(reader.moving_variance.numpy().astype(float) + reader.epsilon)
        multiplier = (reader.gamma.numpy().astype(float) if reader.scale else 1.0) / deviation
        rest = (own - reader.moving_mean.numpy()) * multiplier
        _round(reader.beta, rest, step * np.abs(multiplier))
    elif layer.use_bias and not isinstance(reader, layers.BatchNormalization):
        _round(layer.bias, 0.0, step)


def _channel_shape(layer: layers.Layer, weight: tf.Variable) -> list[int]:
    ((_, axes),) = configs.kernels(layer).items()
    rank = len(weight.shape)
    return [size if axis - rank in axes else 1 for axis, size in enumerate(weight.shape)]


def _round(variable: tf.Variable, rest: np.ndarray | float, step: np.ndarray) -> None:
    """Changes the variable so that `variable + rest` is a whole number of steps.

    Channels whose bias leaves int32 are left alone: the export raises their scale.
    """
    value = variable.numpy().astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((value + rest) / step)
    settled = np.where(np.abs(codes) < _LARGEST_BIAS, codes * step - rest, value)
    variable.assign(settled.astype(np.float32))
