"""Layers that stand for TensorFlow's operators → slices, transpositions, paddings, resizing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.linear import Linear
from qat.export.lower_linear import lower_affine
from qat.export.lower_shape import reducer_options
from qat.export.pending import Elementwise
from qat.operator_layers import MatMul, Pad, ReduceMax, ReduceMean, Slice

layers = tf_keras.layers
Shape = tuple[int, ...]


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
    return builder.moved(
        inputs[0], layer.name, shape, "STRIDED_SLICE", options=options, constants=constants
    )


def _pad(builder: Builder, layer: Pad, inputs: list[Stored], shape: Shape) -> Stored:
    constants = {"padding": [[0, 0], *layer.paddings]}
    return builder.moved(
        inputs[0],
        layer.name,
        shape,
        "PAD",
        options=schema.PadOptionsT(),
        constants=constants,
    )


def _reduce_max(builder: Builder, layer: ReduceMax, inputs: list[Stored], shape: Shape) -> Stored:
    constants, options = {"axes": layer.axes}, reducer_options(layer)
    return builder.moved(
        inputs[0], layer.name, shape, "REDUCE_MAX", options=options, constants=constants
    )


def _reduce_mean(builder: Builder, layer: ReduceMean, inputs: list[Stored], shape: Shape):
    axes = builder.constant(f"{layer.name}/axes", np.asarray(layer.axes, np.int32), "int32")
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(inputs),
        extra=(axes,),
        operator="MEAN",
        options=lambda fused: reducer_options(layer),
    )


def _matmul(builder: Builder, layer: MatMul, inputs: list[Stored], shape: Shape):
    options = schema.BatchMatMulOptionsT()
    options.adjX, options.adjY = False, layer.transpose_b
    wide = any(value.tensor.dtype == "int16" for value in inputs)
    return Elementwise(
        name=layer.name,
        shape=shape,
        inputs=tuple(inputs),
        operator="BATCH_MATMUL",
        version=3 if wide else 2,
        options=lambda fused: options,
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
    MatMul: _matmul,
    Pad: _pad,
    ReduceMax: _reduce_max,
    ReduceMean: _reduce_mean,
    Slice: _slice,
}
