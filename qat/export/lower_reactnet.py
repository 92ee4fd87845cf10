"""RSign and RPReLU → GREATER_EQUAL's thresholds, PRELU, and a 1×1 DEPTHWISE_CONV_2D for a shift."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from qat.export.builder import Builder, Stored
from qat.export.graph import ExportError
from qat.export.linear import Linear
from qat.export.lower_linear import lower_affine, variable
from qat.export.pending import Elementwise
from qat.layers import FakeQuantize, QuantizedPReLU
from qat.reactnet import LearnedShift, LearnedSlope


def sign_thresholds(layer: FakeQuantize, x: Stored) -> np.ndarray:
    """The lowest code of x that becomes +1, one or per channel; qmax + 1 where none does.

    The quantizer is asked for the sign of every code, so that ties fall as in training.

    Raises:
        ExportError: x is float; a threshold that is NaN or infinite.
    """
    if x.grid is None:
        raise ExportError(f"{layer.name!r}: the sign of a float tensor; quantize its producer")
    for weight in layer.quantizer_weights.values():
        variable(layer, weight.name.split(":")[0].split("/")[-1])
    with tf.device("/CPU:0"):
        codes = tf.range(x.grid.qmin, x.grid.qmax + 1, dtype=tf.float32)
        reals = (x.grid.dequantize(codes) * x.gain)[:, None]
        signs = layer.quantizer.codes(reals, layer.quantizer_weights).numpy()
    return x.grid.qmin + (signs < 0).sum(axis=0)


def slopes(layer: LearnedSlope | QuantizedPReLU) -> str:
    """Name of the variable that holds a layer's slopes."""
    return "slope" if isinstance(layer, LearnedSlope) else "alpha"


def lower_slopes(
    builder: Builder, layer: LearnedSlope | QuantizedPReLU, inputs: list[Stored], shape
) -> Elementwise:
    """PRELU with the layer's int8 slopes.

    Raises:
        ExportError: a float input; slopes that are NaN or infinite.
    """
    if inputs[0].grid is None:
        raise ExportError(f"{layer.name!r}: PReLU of a float tensor; quantize its producer")
    with tf.device("/CPU:0"):
        value = tf.constant(variable(layer, slopes(layer)))
        codes = layer.quantizer.codes(value, {}).numpy()
        scale = layer.quantizer.grid({}, value).numpy().scale
    slope = builder.constant(
        f"{layer.name}/slope",
        codes.reshape([1] * (len(shape) - 1 - codes.ndim) + list(codes.shape)),
        "int8",
        scale=scale.reshape(1),
        zero_point=np.zeros(1, np.int64),
    )
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(inputs),
        extra=(slope,),
        operator="PRELU",
        version=1,
        options=lambda fused: None,
    )


def lower_shift(builder: Builder, layer: LearnedShift, x: Stored) -> Linear:
    """`1 · x + b` per channel, b in int32.

    Raises:
        ExportError: shifts that are NaN or infinite.
    """
    shift = variable(layer, "shift")
    return lower_affine(builder, layer.name, x, 1.0, shift, integer=x.grid is not None)
