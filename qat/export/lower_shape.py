"""Keras layers without kernels → their operators: pools, shapes, arithmetic, activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.graph import ExportError
from qat.export.lower_linear import PADDING
from qat.export.lower_reactnet import lower_slope
from qat.export.pending import Concat, Elementwise, Pending
from qat.layers import ReplacedBySign
from qat.reactnet import LearnedSlope
from qat.roles import activation_name

layers = tf_keras.layers
Value = Stored | Pending
Shape = tuple[int, ...]


def _identity(builder, layer, inputs, shape):
    return inputs[0]


def _reshape(builder, layer, inputs, shape):
    return builder.reshape(inputs[0], shape, layer.name)


def _with_fusion(options, fused):
    options.fusedActivationFunction = fused
    if hasattr(options, "potScaleInt16"):
        options.potScaleInt16 = False  # the schema's default asks for power-of-two scales
    return options


def _binary_operator(operator: str, make_options: Callable[[], object]):
    def lower(builder, layer, inputs, shape):
        return Elementwise(
            name=layer.name,
            shape=shape,
            inputs=tuple(inputs),
            operator=operator,
            options=lambda fused: _with_fusion(make_options(), fused),
            fuses=True,
        )

    return lower


def _concatenate(builder, layer, inputs, shape):
    axis = layer.axis % len(shape)
    return Concat(name=layer.name, shape=shape, inputs=tuple(inputs), axis=axis)


def _pool(operator: str):
    def lower(builder: Builder, layer, inputs: list[Stored], shape: Shape) -> Stored:
        x, keras_shape = inputs[0], shape
        if len(shape) == 3:  # a 1-D pool is a 2-D one on an image of height 1
            x = builder.reshape(x, (1, 1, *x.shape[1:]), f"{layer.name}/image")
            shape = (1, 1, *shape[1:])
        options = schema.Pool2DOptionsT()
        options.padding = PADDING[layer.padding]
        options.strideH, options.strideW = (1, *layer.strides)[-2:]
        options.filterHeight, options.filterWidth = (1, *layer.pool_size)[-2:]
        options.fusedActivationFunction = schema.ActivationFunctionType.NONE
        output = builder.activation(layer.name, shape, x.grid)
        builder.operator(operator, 1 if x.grid is None else 2, [x.tensor], output, options)
        stored = Stored(output, x.grid, x.gain)
        return builder.reshape(stored, keras_shape, f"{layer.name}/reshape")

    return lower


def _reduction_axes(builder: Builder, layer, rank: int):
    axes = np.arange(1, rank - 1, dtype=np.int32)
    return builder.constant(f"{layer.name}/axes", axes, "int32")


def _reducer_options(layer):
    options = schema.ReducerOptionsT()
    options.keepDims = bool(layer.keepdims)
    return options


def _global_average(builder, layer, inputs, shape):
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(inputs),
        extra=(_reduction_axes(builder, layer, len(inputs[0].shape)),),
        operator="MEAN",
        options=lambda fused: _reducer_options(layer),
    )


def _global_max(builder, layer, inputs, shape):
    x = inputs[0]
    axes = _reduction_axes(builder, layer, len(x.shape))
    output = builder.activation(layer.name, shape, x.grid)
    version = 1 if x.grid is None else 2
    builder.operator("REDUCE_MAX", version, [x.tensor, axes], output, _reducer_options(layer))
    return Stored(output, x.grid, x.gain)


def _zero_padding(builder, layer, inputs, shape):
    x = inputs[0]
    pads = layer.padding if len(shape) == 4 else [layer.padding]
    pads = np.asarray([(0, 0), *pads, (0, 0)], np.int32)
    constant = builder.constant(f"{layer.name}/padding", pads, "int32")
    output = builder.activation(layer.name, shape, x.grid)
    version = 1 if x.grid is None else 2
    builder.operator("PAD", version, [x.tensor, constant], output, schema.PadOptionsT())
    return Stored(output, x.grid, x.gain)


def softmax_options(fused: int) -> schema.SoftmaxOptionsT:
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    return options


_ACTIVATION_OPERATORS = {
    "relu": ("RELU", lambda fused: None),
    "relu6": ("RELU6", lambda fused: None),
    "softmax": ("SOFTMAX", softmax_options),
    "sigmoid": ("LOGISTIC", lambda fused: None),
    "tanh": ("TANH", lambda fused: None),
}


def _activation(builder, layer, inputs, shape):
    name, x = activation_name(layer), inputs[0]
    if name == "linear":
        return x
    if isinstance(x, Pending):
        return x.with_activation(name)
    if name not in _ACTIVATION_OPERATORS:  # a layer kept in float may compute anything
        raise ExportError(
            f"layer {layer.name!r} computes {name!r}, which has no TFLite operator here; legal: "
            f"{', '.join(_ACTIVATION_OPERATORS)}"
        )
    operator, options = _ACTIVATION_OPERATORS[name]
    return Elementwise(
        name=layer.name, shape=shape, inputs=(x,), operator=operator, options=options
    )


LOWERINGS: dict[type, Callable[[Builder, layers.Layer, list[Value], Shape], Value]] = {
    layers.Activation: _activation,
    layers.ReLU: _activation,
    layers.Softmax: _activation,
    ReplacedBySign: _identity,
    LearnedSlope: lower_slope,
    layers.Dropout: _identity,
    layers.SpatialDropout1D: _identity,
    layers.SpatialDropout2D: _identity,
    layers.GaussianNoise: _identity,
    layers.GaussianDropout: _identity,
    layers.Flatten: _reshape,
    layers.Reshape: _reshape,
    layers.MaxPooling1D: _pool("MAX_POOL_2D"),
    layers.MaxPooling2D: _pool("MAX_POOL_2D"),
    layers.AveragePooling1D: _pool("AVERAGE_POOL_2D"),
    layers.AveragePooling2D: _pool("AVERAGE_POOL_2D"),
    layers.GlobalAveragePooling1D: _global_average,
    layers.GlobalAveragePooling2D: _global_average,
    layers.GlobalMaxPooling1D: _global_max,
    layers.GlobalMaxPooling2D: _global_max,
    layers.ZeroPadding1D: _zero_padding,
    layers.ZeroPadding2D: _zero_padding,
    layers.Concatenate: _concatenate,
    layers.Add: _binary_operator("ADD", schema.AddOptionsT),
    layers.Subtract: _binary_operator("SUB", schema.SubOptionsT),
    layers.Multiply: _binary_operator("MUL", schema.MulOptionsT),
}


def takes_pending(layer: layers.Layer) -> bool:
    """Whether the layer takes operators that still wait for a grid; else its inputs must be stored.

    Raises:
        UnsupportedLayerError: as `activation_name`.
    """
    if isinstance(layer, layers.Activation | layers.ReLU):
        return activation_name(layer) in ("linear", "relu", "relu6")
    return isinstance(layer, layers.Concatenate | layers.Dropout)
