"""Activation layers → a fused ReLU, the curve's own operator, or a table of 256 codes.

| at 8 bits | operators |
|---|---|
| ReLU, also with a bound | fused, or RELU; MINIMUM where the grid reaches beyond the bound |
| sigmoid, tanh, softmax, ELU, GELU, exp, hard swish, leaky ReLU, PReLU | TFLite's own |
| every other function of one number | CAST, ADD and GATHER: a table of what training computes |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.graph import ExportError, Tensor, activation_dtype
from qat.export.lower_float import lower_float
from qat.export.lower_linear import variable
from qat.export.lower_operators import lower_hard_sigmoid
from qat.export.lower_reactnet import lower_slopes
from qat.export.pending import Elementwise, Pending
from qat.layers import QuantizedPReLU
from qat.operator_layers import Buckets
from qat.reactnet import LearnedSlope
from qat.roles import activation_name, relu_bound

layers = tf_keras.layers
Shape = tuple[int, ...]


def softmax_options(fused: int) -> schema.SoftmaxOptionsT:
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    return options


def _none(layer: layers.Layer) -> None:
    return None


def _gelu_options(layer: layers.Layer) -> schema.GeluOptionsT:
    options = schema.GeluOptionsT()
    options.approximate = False  # tf_keras.activations.gelu's default
    return options


def _leaky_options(layer: layers.Layer) -> schema.LeakyReluOptionsT:
    options = schema.LeakyReluOptionsT()
    options.alpha = leaky_slope(layer)
    return options


# For a function's name, its operator, the version that runs int8, and the options of a layer.
_OPERATORS: dict[str, tuple[str, int, Callable[[layers.Layer], Any]]] = {
    "relu": ("RELU", 2, _none),
    "relu6": ("RELU6", 2, _none),
    "softmax": ("SOFTMAX", 2, softmax_options),
    "sigmoid": ("LOGISTIC", 2, _none),
    "tanh": ("TANH", 2, _none),
    "elu": ("ELU", 1, _none),
    "gelu": ("GELU", 2, _gelu_options),
    "exponential": ("EXP", 2, _none),
    "hard_swish": ("HARD_SWISH", 1, _none),
    "leaky_relu": ("LEAKY_RELU", 2, _leaky_options),
}

# tflite-micro has no int8 GELU and EXP; LiteRT's reference kernels, which it must equal, no ELU.
_NOT_ON_MICRO = ("elu", "exponential", "gelu")


def leaky_slope(layer: layers.Layer) -> float:
    """The slope of a leaky ReLU below zero: a layer's own, or what its function does to -1."""
    for name in ("alpha", "negative_slope"):
        if hasattr(layer, name):
            return float(getattr(layer, name))
    return -float(layer.activation(tf.constant(-1.0)))


def lower_activation(builder: Builder, layer, inputs, shape: Shape) -> Stored | Pending:
    """The layer's operator, fused into the one in front where that waits for a ReLU."""
    name, x = activation_name(layer), inputs[0]
    if name == "linear":
        return x
    bound = relu_bound(layer) if name == "relu" else None
    if isinstance(x, Pending):
        if name in ("relu", "relu6") and x.fuses_activation():
            return x.with_activation(name, bound)
        x = x.emit(builder, x.name, None)
    if name == "hard_sigmoid6":
        return lower_hard_sigmoid(builder, layer.name, x)
    if name not in _OPERATORS or not _has_kernel(builder, layer, name):
        return lower_pointwise(builder, layer, [x], shape)
    operator, version, options = _OPERATORS[name]
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=(x,),
        operator=operator,
        version=version,
        options=lambda fused: options(layer),
        bound=bound,
    )


def _has_kernel(builder: Builder, layer: layers.Layer, name: str) -> bool:
    """Whether the target's kernels compute the function, of this layer's options, in int8."""
    if builder.target.arena and name in _NOT_ON_MICRO:
        return False
    return name != "elu" or float(getattr(layer, "alpha", 1.0)) == 1.0


def lower_pointwise(builder: Builder, layer, inputs, shape: Shape) -> Lookup:
    """A function of one number, as a table of its values."""
    return Lookup(name=layer.name, shape=shape, x=inputs[0], layer=layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(Pending):
    """The output's code for each of the input's 256, as training rounds it; float32 otherwise.

    Attributes:
        x: the tensor read. layer: computes the function.
    """

    x: Stored
    layer: layers.Layer

    def fuses_activation(self) -> bool:
        return False

    def emit(self, builder, name, grid):
        if grid is None or self.x.grid is None:
            output = lower_float(builder, self.name, self.layer, [self.x])
            return output if grid is None else builder.to_grid(output, grid, name)
        if activation_dtype(grid) != "int8" or self.x.tensor.dtype != "int8":
            raise ExportError(
                f"{self.name!r} is a table of 8-bit codes and cannot have 16; leave it in float32 "
                "by a recipe rule with keep_float"
            )
        table = on_table(builder, f"{name}/table", self._codes(grid), grid)
        index = builder.row_numbers(self.x.tensor, 128, name)
        output = builder.activation(name, self.shape, grid)
        builder.operator("GATHER", 2, [table, index], output, schema.GatherOptionsT())
        return Stored(output, grid)

    def _codes(self, grid) -> np.ndarray:
        with tf.device("/CPU:0"):
            codes = tf.range(-128, 128, dtype=tf.float32)
            reals = tf.reshape(self.x.grid.dequantize(codes) * self.x.gain, self._one_each())
            values = tf.reshape(self.layer(reals), [-1])
            return grid.quantize(values).numpy()

    def _one_each(self) -> list[int]:
        return [-1, *[1] * (len(self.shape) - 1)]


def on_table(builder: Builder, name: str, codes: np.ndarray, grid) -> Tensor:
    """A constant of codes on an activation's grid."""
    return builder.constant(
        name,
        codes,
        activation_dtype(grid),
        scale=np.asarray(grid.scale, np.float32).reshape(1),
        zero_point=np.asarray(grid.zero_point, np.int64).reshape(1),
    )


def _lower_prelu(builder, layer: layers.PReLU, inputs, shape: Shape) -> Elementwise:
    """PReLU in float32."""
    alpha = builder.constant(f"{layer.name}/slope", variable(layer, "alpha"), "float32")
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(builder.to_float(x, layer.name) for x in inputs),
        extra=(alpha,),
        operator="PRELU",
        version=1,
        options=lambda fused: None,
    )


LOWERINGS = {
    **dict.fromkeys((layers.Activation, layers.ReLU, layers.Softmax), lower_activation),
    **dict.fromkeys((layers.LeakyReLU, layers.ELU, layers.ThresholdedReLU), lower_activation),
    layers.PReLU: _lower_prelu,
    Buckets: lower_pointwise,
    LearnedSlope: lower_slopes,
    QuantizedPReLU: lower_slopes,
}
