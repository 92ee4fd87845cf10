"""A kernel of the file against one of the model: layouts, scales and biases, worked out anew."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
import tf_keras

from qat.canonical import Call
from qat.grid import Grid
from qat.layers import FakeQuantize
from qat.operator_layers import Affine, ChannelScale
from qat.tflite_file import FileModel, FileOperator, FileTensor
from qat.ties import largest_bias

layers = tf_keras.layers
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose)
# Scales and biases are worked out in float64 and stored in float32.
_FLOAT32_ERROR = 1e-6
# A kernel's scale is raised only where its bias would leave half of int32.
_RAISED_BIAS = 2**29


def as_read(tensor: FileTensor, constant: FileTensor) -> FileTensor:
    """A constant with the codes and scales that it has once it is unpacked to the tensor.

    Without codes if its channels grow by different factors, or by one that int8 has no room for: no
    kernel of ours.
    """
    codes = None
    if constant.scale.shape == tensor.scale.shape and tensor.scale.all():
        factors = np.rint(constant.scale.astype(float) / tensor.scale.astype(float))
        factor = factors.max(initial=0)
        grown = factor * tensor.scale.astype(float)
        if factor <= 127 and np.allclose(constant.scale, grown, rtol=_FLOAT32_ERROR, atol=0):
            codes = constant.data.astype(int) * int(factor)
    return dataclasses.replace(
        constant, data=codes, scale=tensor.scale, zero_point=tensor.zero_point
    )


def scale_or_bias_mismatch(
    kernel: FileTensor,
    operator: FileOperator,
    step: np.ndarray,
    bias: np.ndarray,
    *,
    early: bool = False,
) -> str | None:
    """Compares a kernel's scales, and its biases in units of those.

    early: the file's bias is as much below the model's as kernels that round twice are early.
    """
    channels = len(kernel.scale)
    step, bias = np.broadcast_to(step, channels), np.broadcast_to(bias, channels)
    stored = kernel.scale.astype(float)
    codes = next(t for t in operator.inputs if t.dtype in ("int32", "int64") and len(t.scale) > 0)
    x = next(t for t in operator.inputs if t.data is None)
    raised = (stored > step) & (np.abs(codes.data) >= _RAISED_BIAS)
    raised |= step < np.finfo(np.float32).tiny
    wrong = ~raised & (np.abs(stored - step) > _FLOAT32_ERROR * step)
    if wrong.any():
        return f"{int(wrong.sum())} of {channels} scales differ"
    expected = bias / (float(x.scale[0]) * stored)
    if early:
        multiplier = float(x.scale[0]) * stored / float(operator.outputs[0].scale[0])
        power = 2.0 ** (np.floor(np.log2(multiplier)) + 1)
        expected = expected - np.where(power < 1, power / (2 * multiplier), 0)
    allowed = 0.5 + _FLOAT32_ERROR * np.abs(expected)
    if operator.outputs[0].scale.size:
        # Cut where it leaves its register and, by a whole range, the output's: no sum comes back.
        wide = codes.dtype == "int64"
        output_step = float(operator.outputs[0].scale[0])
        limit = largest_bias(float(x.scale[0]) * stored, output_step, wide=wide)
        beyond = limit * float(x.scale[0]) * stored >= 511 * (256 if wide else 1) * output_step
        cut = np.clip(np.rint(expected), -limit, limit)
        raised |= beyond & (np.abs(expected) > limit) & (np.abs(codes.data - cut) <= 1)
    if (~raised & (np.abs(codes.data - expected) > allowed)).any():
        return f"the bias {codes.name} differs"
    return None


def requantization(
    call: Call,
    readers: dict[int, list[Call | None]],
    kernel: FileTensor,
    operator: FileOperator,
    file: FileModel,
) -> tuple[float, bool, str | None]:
    """(by how much an operator's output lies above the model's, whether it reaches codes early,
    what is wrong with its way back onto the grid or None).

    Args:
        call: of the layer. readers: of each tensor of the model. kernel: as the operator reads it.
    """
    grid, rectified = _output_of(call, readers)
    moved, reason = _moved_by(operator, grid, file)
    return moved, _rounds_early(kernel, operator, grid, rectified, file.target), reason


def _output_of(call: Call, readers: dict[int, list[Call | None]]) -> tuple[Grid | None, bool]:
    """(grid of the operator's output, whether a ReLU is fused in); None = not on a grid."""
    quantizer, weights, rectified = None, {}, False
    if getattr(call.layer, "_output_quantizers", None):  # the wrapped layer's own config has one
        (quantizer,), weights = call.layer._output_quantizers, call.layer._output_quantizer_vars
        rectified = call.layer.layer.activation is not tf_keras.activations.linear
    while quantizer is None:
        rectified |= isinstance(call.layer, layers.ReLU | layers.Activation)
        following = readers[id(call.output)]
        if len(following) != 1 or following[0] is None:
            return None, rectified
        (call,) = following
        if isinstance(call.layer, FakeQuantize):
            quantizer, weights = call.layer.quantizer, call.layer.quantizer_weights
    with tf.device("/CPU:0"):
        return quantizer.grid(weights).numpy(), rectified


def _moved_by(
    operator: FileOperator, grid: Grid | None, file: FileModel
) -> tuple[float, str | None]:
    """(by how much an operator's output lies above the model's, what is wrong with that or None).

    Its codes may be counted from the lowest one, if an ADD of a constant alone reads them, and
    brings them back onto the grid.
    """
    output = operator.outputs[0]
    if grid is None or not len(output.scale) or output.zero_point[0] == grid.zero_point:
        return 0.0, None
    moved = float(grid.scale) * float(grid.zero_point - output.zero_point[0])
    readers = [op for op in file.operators if any(t.name == output.name for t in op.inputs)]
    constants = [t for op in readers for t in op.inputs if t.data is not None]
    if [op.name for op in readers] != ["ADD"] or len(constants) != 1:
        return moved, f"{output.name} has zero point {output.zero_point[0]}"
    (added,), back = constants, readers[0].outputs[0]
    same = added.scale[0] == back.scale[0] == output.scale[0] == grid.scale
    same &= output.zero_point[0] == grid.qmin and back.zero_point[0] == grid.zero_point
    steps = added.data.reshape(-1).astype(int) - added.zero_point[0]
    if not same or (steps * float(grid.scale) != -moved).any():
        return moved, f"{added.name} does not bring {output.name} back onto the grid"
    return moved, None


def _rounds_early(
    kernel: FileTensor,
    operator: FileOperator,
    grid: Grid | None,
    rectified: bool,
    target: str | None,
) -> bool:
    """Whether an operator rounds twice and none of its outputs that count is negative.

    Convolutions with packed kernels do, on tflite-micro all.
    """
    output = operator.outputs[0]
    twice = kernel.dtype in ("int2", "int4") or target == "tflm"
    if not twice or operator.name == "FULLY_CONNECTED" or grid is None or output.dtype != "int8":
        return False
    return rectified or bool(output.zero_point[0] == grid.qmin)


def channels_last(layer: layers.Layer, kernel: np.ndarray) -> np.ndarray:
    """A Keras kernel with its output channels as the last axis."""
    if isinstance(layer, _DEPTHWISE):
        return kernel.reshape(*kernel.shape[:-2], -1)
    return np.moveaxis(kernel, -2, -1) if isinstance(layer, _TRANSPOSED) else kernel


def channels_last_of_file(layer: layers.Layer, kernel: np.ndarray) -> np.ndarray:
    """A file's kernel likewise; only depthwise ones have their channels last already."""
    return kernel if isinstance(layer, _DEPTHWISE) else np.moveaxis(kernel, 0, -1)


def per_channel(layer: layers.Layer, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A quantizer's scale, per tensor or per channel, as a vector or a number."""
    spread = np.broadcast_to(scale, [1] * codes.ndim) if scale.ndim == 0 else scale
    return channels_last(layer, spread).reshape(-1).astype(float)


def values_of_codes(call: Call, grid: Grid, gain: float) -> tf.Tensor:
    """What a layer that works number by number makes of each of the 256 codes of its input."""
    reals = (np.arange(-128, 128) - grid.numpy().zero_point) * grid.numpy().scale
    column = np.reshape(reals * np.float32(gain), [-1, *[1] * (call.inputs[0].shape.rank - 1)])
    return tf.reshape(call.layer(tf.constant(column, tf.float32)), [-1])


def folded_factors(layer: layers.Layer | None) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, offset) of what folds into the kernel in front of it, float64; (1, 0) for all
    other layers."""
    if isinstance(layer, Affine):
        return np.asarray(layer.multiplier, float), np.asarray(layer.offset, float)
    if isinstance(layer, ChannelScale):
        return layer.gamma.numpy().astype(float), np.asarray(0.0)
    if not isinstance(layer, layers.BatchNormalization):
        return np.asarray(1.0), np.asarray(0.0)
    deviation = np.sqrt(layer.moving_variance.numpy().astype(float) + layer.epsilon)
    gamma = layer.gamma.numpy().astype(float) if layer.scale else 1.0
    beta = layer.beta.numpy().astype(float) if layer.center else 0.0
    return gamma / deviation, beta - layer.moving_mean.numpy() * (gamma / deviation)
