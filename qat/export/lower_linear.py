"""Keras layers with kernels → CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV, FULLY_CONNECTED."""

from __future__ import annotations

from typing import Any

import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat import configs
from qat.export.builder import Builder, Stored
from qat.export.freeze import FrozenKernel
from qat.export.graph import ExportError
from qat.export.linear import Linear
from qat.operator_layers import Affine, ChannelScale

layers = tf_keras.layers
AFFINE_CODE = 127  # of kernels of one multiplier a channel: biases are as fine as int8 allows
OPERATORS = {
    layers.Conv1D: "CONV_2D",
    layers.Conv2D: "CONV_2D",
    layers.Conv1DTranspose: "TRANSPOSE_CONV",
    layers.Conv2DTranspose: "TRANSPOSE_CONV",
    layers.DepthwiseConv1D: "DEPTHWISE_CONV_2D",
    layers.DepthwiseConv2D: "DEPTHWISE_CONV_2D",
    layers.Dense: "FULLY_CONNECTED",
}
# Layers that are `multiplier · x + offset` per channel.
AFFINE = (layers.BatchNormalization, Affine, ChannelScale)
PADDING = {"same": schema.Padding.SAME, "valid": schema.Padding.VALID}


def lower_linear(
    builder: Builder,
    layer: layers.Layer,
    x: Stored,
    shape: tuple[int, ...],
    frozen: FrozenKernel | None,
) -> Linear:
    """The layer's operator, before batch norm and ReLU fuse into it.

    Args:
        x: the tensor that the layer reads.
        shape: of its output, batch 1.
        frozen: the kernel's integers; None = the kernel stays in float.

    Raises:
        ExportError: options that the operator lacks.
    """
    ((attribute, axes),) = configs.kernels(layer).items()
    kernel = frozen.codes if frozen else variable(layer, attribute)
    channel_shape = [n if a - kernel.ndim in axes else 1 for a, n in enumerate(kernel.shape)]
    channels = int(np.prod(channel_shape))
    scale = None
    if frozen is not None:
        scale = np.broadcast_to(frozen.scale, channel_shape).reshape(-1).astype(np.float64)
    common = {
        "name": layer.name,
        "operator": OPERATORS[type(layer)],
        "x": x,
        "shape": shape,
        "scale": scale,
        "bits": frozen.bits if frozen else 32,
        "unit": frozen.unit if frozen else 1,
        "bias": variable(layer, "bias").astype(float) if layer.use_bias else np.zeros(channels),
    }
    return _LOWERINGS[type(layer)](builder, layer, kernel, common)


def variable(layer: layers.Layer, name: str) -> np.ndarray:
    """A variable of the layer by its own name.

    Not `getattr`: a TFMOT wrapper leaves a symbolic tensor in the attribute.

    Raises:
        ExportError: no such variable, or values that are NaN or infinite.
    """
    for candidate in layer.variables:
        if candidate.name.split(":")[0].split("/")[-1] == name:
            value = candidate.numpy()
            if not np.isfinite(value).all():
                raise ExportError(
                    f"layer {layer.name!r} has NaN or infinite {name}; training diverged: lower "
                    "the learning rate and train again"
                )
            return value
    raise ExportError(f"layer {layer.name!r} ({type(layer).__name__}) has no variable {name!r}")


def _convolution_options(layer, options: Any, fused: int) -> Any:
    strides, dilation = (1, *layer.strides)[-2:], (1, *layer.dilation_rate)[-2:]
    options.padding = PADDING["valid" if layer.padding == "causal" else layer.padding]
    options.strideH, options.strideW = strides
    options.dilationHFactor, options.dilationWFactor = dilation
    options.fusedActivationFunction = fused
    return options


def _conv2d(builder, layer, kernel, common):
    shape = common["shape"]
    if len(shape) > 4:  # more axes in front, e.g. time, are more images

        def as_images(shape):
            return (int(np.prod(shape[:-3])), *shape[-3:])

        images = builder.reshape(common["x"], as_images(common["x"].shape), f"{layer.name}/images")
        common = {**common, "x": images, "shape": as_images(shape), "reshape_to": shape}
    return Linear(
        kernel=kernel.transpose(3, 0, 1, 2),
        channel_axis=0,
        options=lambda fused: _convolution_options(layer, schema.Conv2DOptionsT(), fused),
        **common,
    )


def _conv1d(builder, layer, kernel, common):
    return Linear(
        kernel=kernel.transpose(2, 0, 1)[:, None],
        channel_axis=0,
        options=lambda fused: _convolution_options(layer, schema.Conv2DOptionsT(), fused),
        **_on_a_row(builder, layer, common),
    )


def _on_a_row(builder, layer, common) -> dict[str, Any]:
    """A 1-D operator is a 2-D one on an image of height 1; causal ones get their past of zeros."""
    x, keras_shape = common["x"], common["shape"]
    if layer.padding == "causal":
        past = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        x = padded(builder, x, [(0, 0), (past, 0), (0, 0)], f"{layer.name}/past")
    return {
        **common,
        "x": builder.reshape(x, (1, 1, *x.shape[1:]), f"{layer.name}/image"),
        "shape": (1, 1, *keras_shape[1:]),
        "reshape_to": keras_shape,
    }


def padded(builder: Builder, x: Stored, pads: list[tuple[int, int]], name: str) -> Stored:
    """The tensor with zeros (before, after) each of its axes."""
    constant = builder.constant(f"{name}/padding", np.asarray(pads, np.int32), "int32")
    shape = tuple(size + sum(pad) for size, pad in zip(x.shape, pads, strict=True))
    output = builder.activation(name, shape, x.grid)
    version = 1 if x.grid is None else 2
    builder.operator("PAD", version, [x.tensor, constant], output, schema.PadOptionsT())
    return Stored(output, x.grid, x.gain)


def _depthwise1d(builder, layer, kernel, common):
    return _depthwise(builder, layer, kernel[None], _on_a_row(builder, layer, common))


def _transposed1d(builder, layer, kernel, common):
    return _transposed(builder, layer, kernel[None], _on_a_row(builder, layer, common))


def _depthwise(builder, layer, kernel, common):
    height, width, depth, multiplier = kernel.shape

    def options(fused):
        made = _convolution_options(layer, schema.DepthwiseConv2DOptionsT(), fused)
        made.depthMultiplier = multiplier
        return made

    return Linear(
        kernel=kernel.reshape(1, height, width, depth * multiplier),
        channel_axis=3,
        options=options,
        **common,
    )


def _transposed(builder, layer, kernel, common):

    def options(fused):
        made = schema.TransposeConvOptionsT()
        made.padding = PADDING[layer.padding]
        made.strideH, made.strideW = (1, *layer.strides)[-2:]
        made.fusedActivationFunction = fused
        return made

    shape = np.asarray(common["shape"], np.int32)
    return Linear(
        kernel=kernel.transpose(2, 0, 1, 3),
        channel_axis=0,
        options=options,
        leading=(builder.constant(f"{layer.name}/output_shape", shape, "int32"),),
        **common,
    )


def _dense(builder, layer, kernel, common):
    if builder.target.dense == "CONV_2D":
        return _dense_convolution(builder, layer, kernel, common)

    def options(fused):
        made = schema.FullyConnectedOptionsT()
        made.fusedActivationFunction = fused
        made.keepNumDims = len(common["shape"]) > 2
        return made

    return Linear(kernel=kernel.T, channel_axis=0, options=options, **common)


def _dense_convolution(builder, layer, kernel, common):
    """A dense layer is a 1×1 convolution on an image of height 1."""
    keras_shape, depth = common["shape"], kernel.shape[0]
    width = int(np.prod(keras_shape[1:-1]))
    common |= {
        "operator": "CONV_2D",
        "x": builder.reshape(common["x"], (1, 1, width, depth), f"{layer.name}/image"),
        "shape": (1, 1, width, kernel.shape[1]),
    }
    return Linear(
        kernel=kernel.T[:, None, None],
        channel_axis=0,
        options=lambda fused: _unit_options(schema.Conv2DOptionsT(), fused),
        reshape_to=keras_shape,
        **common,
    )


def _unit_options(options: Any, fused: int) -> Any:
    """Of a 1×1 convolution, depthwise or not."""
    options.padding = schema.Padding.VALID
    options.strideH = options.strideW = 1
    options.dilationHFactor = options.dilationWFactor = 1
    options.fusedActivationFunction = fused
    return options


_LOWERINGS = {
    layers.Conv1D: _conv1d,
    layers.Conv2D: _conv2d,
    layers.Conv1DTranspose: _transposed1d,
    layers.Conv2DTranspose: _transposed,
    layers.DepthwiseConv1D: _depthwise1d,
    layers.DepthwiseConv2D: _depthwise,
    layers.Dense: _dense,
}


def lower_affine(
    builder: Builder,
    name: str,
    x: Stored,
    multiplier: np.ndarray,
    offset: np.ndarray,
    *,
    integer: bool,
) -> Linear:
    """`multiplier · x + offset` per channel as a 1×1 DEPTHWISE_CONV_2D.

    The kernel's codes are ±127 (0 for a multiplier of 0) with a scale of their own per channel,
    so the multiplier is exact and the output is rounded once.
    """
    channels = x.shape[-1]
    multiplier = np.broadcast_to(multiplier, [channels]).astype(float)
    keras_shape, image = x.shape, (1, 1, int(np.prod(x.shape[1:-1])), channels)
    if len(keras_shape) == 4:
        image = keras_shape

    def options(fused):
        made = _unit_options(schema.DepthwiseConv2DOptionsT(), fused)
        made.depthMultiplier = 1
        return made

    kernel = AFFINE_CODE * np.sign(multiplier) if integer else multiplier
    return Linear(
        name=name,
        x=builder.reshape(x, image, f"{name}/image"),
        shape=image,
        operator="DEPTHWISE_CONV_2D",
        kernel=kernel.reshape(1, 1, 1, channels),
        channel_axis=3,
        scale=np.abs(multiplier) / AFFINE_CODE if integer else None,
        bits=8,
        bias=np.broadcast_to(offset, [channels]).astype(float),
        options=options,
        reshape_to=keras_shape if image != keras_shape else None,
    )


def affine_of(layer: layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, offset) of one of AFFINE, float64, one number or one per channel.

    Batch normalization: `γ/√(σ² + ε)` and `β - μ·multiplier`.
    """
    if isinstance(layer, Affine):
        return np.asarray(layer.multiplier, float), np.asarray(layer.offset, float)
    if isinstance(layer, ChannelScale):
        return variable(layer, "gamma").astype(float), np.asarray(0.0)
    mean, variance = (
        variable(layer, name).astype(float) for name in ("moving_mean", "moving_variance")
    )
    gamma = variable(layer, "gamma").astype(float) if layer.scale else np.ones_like(mean)
    beta = variable(layer, "beta").astype(float) if layer.center else np.zeros_like(mean)
    multiplier = gamma / np.sqrt(variance + layer.epsilon)
    return multiplier, beta - mean * multiplier
