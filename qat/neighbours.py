"""The grids that an operator of a quantized model reads and writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
import tf_keras

from qat import configs
from qat.canonical import Call
from qat.grid import Grid
from qat.layers import FakeQuantize, ReplacedBySign
from qat.operator_layers import Affine, ChannelScale
from qat.quantizers import GridQuantizer

layers = tf_keras.layers
# What may stand between a kernel and the quantizer of its operator's output.
_FUSED = (
    Affine,
    ChannelScale,
    layers.Activation,
    layers.BatchNormalization,
    layers.Concatenate,
    layers.Dropout,
    layers.Maximum,
    layers.Minimum,
    layers.ReLU,
    ReplacedBySign,
)


def source_of(tensor: Any, producer: dict[int, Call]) -> tuple[FakeQuantize | None, float]:
    """Whose grid a kernel reads, and the product of the Rescalings between; None in float."""
    gain = 1.0
    while id(tensor) in producer:
        call = producer[id(tensor)]
        if isinstance(call.layer, FakeQuantize):
            return call.layer, gain
        if isinstance(call.layer, layers.Rescaling):
            gain *= float(call.layer.scale)
        elif configs.kernels(getattr(call.layer, "layer", call.layer)):
            return None, gain
        tensor = call.inputs[0]
    return None, gain


@dataclasses.dataclass(frozen=True)
class Output:
    """The grid of an operator's output, and whether a ReLU is fused in."""

    grid: Grid
    rectified: bool


def output_of(call: Call, readers: dict[int, list[Call | None]]) -> Output | None:
    """Of the operator that the call is a part of; None in float."""
    if getattr(call.layer, "_output_quantizers", None):  # the layer's own config has one
        (quantizer,), weights = call.layer._output_quantizers, call.layer._output_quantizer_vars
        activation = call.layer.layer.activation
        return Output(grid_of(quantizer, weights), activation is not tf_keras.activations.linear)
    following, rectified = readers[id(call.output)], False
    while len(following) == 1 and following[0] is not None:
        layer = following[0].layer
        if isinstance(layer, FakeQuantize):
            return Output(grid_of(layer.quantizer, layer.quantizer_weights), rectified)
        if not isinstance(layer, _FUSED):
            return None
        rectified |= isinstance(layer, layers.Activation | layers.ReLU)
        following = readers[id(following[0].output)]
    return None


def grid_of(quantizer: GridQuantizer, weights: dict[str, Any]) -> Grid:
    """Of an activation quantizer with these weights, NumPy."""
    with tf.device("/CPU:0"):
        return quantizer.grid(weights).numpy()
