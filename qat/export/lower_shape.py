"""Keras layers without kernels → their operators: pools, paddings, arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.lower_linear import PADDING, padded
from qat.export.pending import Concat, Elementwise, Pending
from qat.layers import ReplacedBySign
from qat.operator_layers import AUGMENTATION, FoldedAway

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
        window, strides = (1, *layer.pool_size)[-2:], (1, *layer.strides)[-2:]
        options = pool_options(PADDING[layer.padding], window, strides)
        output = builder.activation(layer.name, shape, x.grid)
        builder.operator(operator, 1 if x.grid is None else 2, [x.tensor], output, options)
        stored = Stored(output, x.grid, x.gain)
        return builder.reshape(stored, keras_shape, f"{layer.name}/reshape")

    return lower


def pool_options(padding: int, window: Sequence[int], strides: Sequence[int]):
    """Options of MAX_POOL_2D and AVERAGE_POOL_2D; sizes are (rows, columns)."""
    options = schema.Pool2DOptionsT()
    options.padding = padding
    options.strideH, options.strideW = strides
    options.filterHeight, options.filterWidth = window
    options.fusedActivationFunction = schema.ActivationFunctionType.NONE
    return options


def _reduction_axes(rank: int) -> np.ndarray:
    return np.arange(1, rank - 1, dtype=np.int32)


def reducer_options(layer: layers.Layer) -> schema.ReducerOptionsT:
    """Of a layer with `keepdims`."""
    options = schema.ReducerOptionsT()
    options.keepDims = bool(layer.keepdims)
    return options


def _global_average(builder, layer, inputs, shape):
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(inputs),
        extra=(
            builder.constant(f"{layer.name}/axes", _reduction_axes(len(inputs[0].shape)), "int32"),
        ),
        operator="MEAN",
        options=lambda fused: reducer_options(layer),
    )


def _global_max(builder, layer, inputs, shape):
    options = reducer_options(layer)
    axes = {"axes": _reduction_axes(len(inputs[0].shape))}
    return builder.moved(
        inputs[0], layer.name, shape, "REDUCE_MAX", options=options, constants=axes
    )


def _zero_padding(builder, layer, inputs, shape):
    pads = [layer.padding] if len(shape) == 3 else layer.padding
    return padded(builder, inputs[0], [(0, 0), *pads, (0, 0)], layer.name)


LOWERINGS: dict[type, Callable[[Builder, layers.Layer, list[Value], Shape], Value]] = {
    ReplacedBySign: _identity,
    FoldedAway: _identity,
    **dict.fromkeys(AUGMENTATION, _identity),
    layers.Dropout: _identity,
    layers.SpatialDropout1D: _identity,
    layers.SpatialDropout2D: _identity,
    layers.GaussianNoise: _identity,
    layers.GaussianDropout: _identity,
    layers.SpatialDropout3D: _identity,
    layers.AlphaDropout: _identity,
    layers.ActivityRegularization: _identity,
    layers.Identity: _identity,
    layers.Flatten: _reshape,
    layers.Reshape: _reshape,
    layers.MaxPooling1D: _pool("MAX_POOL_2D"),
    layers.MaxPooling2D: _pool("MAX_POOL_2D"),
    layers.AveragePooling1D: _pool("AVERAGE_POOL_2D"),
    layers.AveragePooling2D: _pool("AVERAGE_POOL_2D"),
    layers.GlobalAveragePooling1D: _global_average,
    layers.GlobalAveragePooling2D: _global_average,
    layers.GlobalAveragePooling3D: _global_average,
    layers.GlobalMaxPooling1D: _global_max,
    layers.GlobalMaxPooling2D: _global_max,
    layers.GlobalMaxPooling3D: _global_max,
    layers.ZeroPadding1D: _zero_padding,
    layers.ZeroPadding2D: _zero_padding,
    layers.ZeroPadding3D: _zero_padding,
    layers.Concatenate: _concatenate,
    layers.Add: _binary_operator("ADD", schema.AddOptionsT),
    layers.Subtract: _binary_operator("SUB", schema.SubOptionsT),
    layers.Multiply: _binary_operator("MUL", schema.MulOptionsT),
}
