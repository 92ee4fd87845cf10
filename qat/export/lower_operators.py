"""Layers that stand for TensorFlow's operators → slices, transpositions, paddings, resizing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.graph import Tensor
from qat.export.linear import Linear
from qat.export.lower_linear import lower_affine
from qat.export.pending import Elementwise
from qat.operator_layers import Pad, ReduceMax, ReduceMean, Slice

layers = tf_keras.layers
Shape = tuple[int, ...]


def moved(
    builder: Builder,
    layer: layers.Layer,
    x: Stored,
    shape: Shape,
    operator: str,
    constants: dict[str, np.ndarray],
    options: Any,
    version: int = 2,
) -> Stored:
    """An operator that moves codes: its output lies on its input's grid.

    Args:
        constants: by name, the int32 tensors that it reads after x.
        version: of its 8-bit form; float32 is 1.
    """
    read: list[Tensor] = [
        builder.constant(f"{layer.name}/{name}", np.asarray(data, np.int32), "int32")
        for name, data in constants.items()
    ]
    output = builder.activation(layer.name, shape, x.grid)
    builder.operator(operator, 1 if x.grid is None else version, [x.tensor, *read], output, options)
    return dataclasses.replace(x, tensor=output)


def _slice(builder: Builder, layer: Slice, inputs: list[Stored], shape: Shape) -> Stored:
    """STRIDED_SLICE; the batch and open ends by masks."""
    slices = [[None, None, None], *layer.slices]
    options = schema.StridedSliceOptionsT()
    options.beginMask, options.endMask = (
        sum(1 << axis for axis, part in enumerate(slices) if part[end] is None) for end in (0, 1)
    )
    options.ellipsisMask = options.newAxisMask = options.shrinkAxisMask = 0
    begin, end = ([part[i] or 0 for part in slices] for i in (0, 1))
    strides = [part[2] or 1 for part in slices]
    constants = {"begin": begin, "end": end, "strides": strides}
    return moved(builder, layer, inputs[0], shape, "STRIDED_SLICE", constants, options)


def _pad(builder: Builder, layer: Pad, inputs: list[Stored], shape: Shape) -> Stored:
    constants = {"padding": [[0, 0], *layer.paddings]}
    return moved(builder, layer, inputs[0], shape, "PAD", constants, schema.PadOptionsT())


def _reducer_options(layer: ReduceMax | ReduceMean) -> schema.ReducerOptionsT:
    options = schema.ReducerOptionsT()
    options.keepDims = layer.keepdims
    return options


def _reduce_max(builder: Builder, layer: ReduceMax, inputs: list[Stored], shape: Shape) -> Stored:
    constants, options = {"axes": layer.axes}, _reducer_options(layer)
    return moved(builder, layer, inputs[0], shape, "REDUCE_MAX", constants, options)


def _reduce_mean(builder: Builder, layer: ReduceMean, inputs: list[Stored], shape: Shape):
    axes = builder.constant(f"{layer.name}/axes", np.asarray(layer.axes, np.int32), "int32")
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(inputs),
        extra=(axes,),
        operator="MEAN",
        options=lambda fused: _reducer_options(layer),
    )


def lower_hard_sigmoid(builder: Builder, name: str, x: Stored) -> Linear:
    """`relu6(x + 3) / 6` as x/6 + 1/2, cut off at 0 by a ReLU.

    Integers are cut off at 1 by their type: it is the highest code of the output's grid.
    """
    if x.grid is not None:
        return lower_affine(builder, name, x, 1 / 6, 1 / 2, integer=True).with_activation("relu")
    shifted = lower_affine(builder, name, x, 1.0, 3.0, integer=False).with_activation("relu6")
    bounded = shifted.emit(builder, f"{name}/relu6", None)
    return lower_affine(builder, name, bounded, 1 / 6, 0.0, integer=False)


LOWERINGS: dict[type, Callable] = {
    Pad: _pad,
    ReduceMax: _reduce_max,
    ReduceMean: _reduce_mean,
    Slice: _slice,
}
