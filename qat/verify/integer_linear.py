"""Convolutions, FULLY_CONNECTED and BATCH_MATMUL on integers.

Products are summed in float64, where whole numbers below 2^53 are exact, so that BLAS does the
work. After tflite/kernels/internal/reference/integer_ops/{conv, depthwise_conv, transpose_conv,
fully_connected}.h, batch_matmul.h and the Prepare functions of the kernels of the same names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qat.verify.arithmetic import (
    multiply,
    multiply_wide,
    quantize_multiplier,
    round_away,
    to_int32,
    wrap32,
)
from qat.verify.integer_call import Call, Value
from qat.verify.integer_windows import axes


@dataclasses.dataclass(frozen=True)
class _Operands:
    """Input, kernel and bias of a linear operator, checked.

    Attributes:
        channels: of the output. wide: whether the accumulator has 64 bits.
    """

    x: Value
    kernel: Value
    bias: Value | None
    channels: int
    wide: bool

    def real_multiplier(self, call: Call) -> np.ndarray:
        """`s_x · s_w / s_y` per channel, float64."""
        scales = self.kernel.tensor.scales.astype(np.float64)
        return np.float64(self.x.scale) * scales / np.float64(call.output.scale)

    def accumulator(self, products: np.ndarray) -> np.ndarray:
        """Whole float64 sums [..., channels] plus bias, as the kernel's register keeps them."""
        total = products.astype(np.int64)
        if self.bias is not None:
            total = total + self.bias.codes.reshape(-1).astype(np.int64)
        return total if self.wide else wrap32(total)


def _operands(call: Call, values: tuple, channel_axis: int, *kernel_types: str) -> _Operands:
    x, kernel, bias = values
    dtype = call.require_types("int8", "int16", values=(x,))
    call.require(
        kernel.dtype in kernel_types,
        f"has an {kernel.dtype} kernel; with {dtype} activations it runs {', '.join(kernel_types)}",
    )
    channels = kernel.shape[channel_axis]
    call.require(
        len(kernel.tensor.scales) in (1, channels),
        f"has {len(kernel.tensor.scales)} kernel scales for {channels} channels",
    )
    wide = dtype == "int16" and not _narrow_bias(call)
    if bias is not None:
        wanted = "int64" if wide else "int32"
        call.require(
            bias.dtype == wanted,
            f"has an {bias.dtype} bias, which the kernel would read as {wanted}",
        )
        call.require(bias.codes.size == channels, f"has {bias.codes.size} biases, not {channels}")
        call.require(not np.any(bias.tensor.zero_points), "has a bias zero point that is not 0")
    if dtype == "int16":
        zero = x.tensor.zero_point == 0 and call.output.zero_point == 0
        call.require(zero, "has a zero point that is not 0 on an int16 tensor")
    return _Operands(x, kernel, bias, channels, wide)


def _narrow_bias(call: Call) -> bool:
    kind = getattr(call.operator.options, "quantizedBiasType", 0)
    return kind == schema.TensorType.INT32


def _require_symmetric_kernel(call: Call, kernel: Value) -> None:
    call.require(not np.any(kernel.tensor.zero_points), "has a kernel zero point that is not 0")


def _rescaled(call: Call, operands: _Operands, products: np.ndarray) -> np.ndarray:
    """The output codes of a convolution."""
    multiplier, shift = quantize_multiplier(operands.real_multiplier(call))
    rescale = multiply_wide if operands.wide else multiply
    codes = rescale(operands.accumulator(products), multiplier, shift) + call.output.zero_point
    return call.clamp(codes, call.option("fusedActivationFunction"))


def _require_images(call: Call, *values: Value) -> None:
    for value in values:
        call.require(
            len(value.shape) == 4 and min(value.shape) > 0, f"reads a tensor of shape {value.shape}"
        )


def conv_2d(call: Call) -> np.ndarray:
    """Kernel [out, h, w, in / groups], per channel or per tensor, strided and dilated."""
    operands = _operands(call, call.arguments(3), 0, "int8", "int4")
    x, kernel = operands.x, operands.kernel
    _require_images(call, x, kernel)
    _require_symmetric_kernel(call, kernel)
    depth = kernel.shape[3]
    groups = x.shape[3] // depth
    fits = groups * depth == x.shape[3] and operands.channels % max(groups, 1) == 0
    call.require(
        fits, f"has kernel shape {kernel.shape} on {x.shape[3]} channels, which is no grouping"
    )
    rows, columns = axes(call, x.shape, kernel.shape[1:3], dilated=True)
    # Groups in front, so that one matrix product per kernel tap serves them all.
    pixels = _grouped(x.centered().astype(np.float64), groups)
    weights = kernel.codes.reshape(groups, -1, *kernel.shape[1:]).astype(np.float64)
    weights = weights.transpose(2, 3, 0, 4, 1)
    shape = (groups, x.shape[0], rows.out, columns.out, operands.channels // groups)
    sums = np.zeros(call.require_size(shape))
    for row, y_out, y_in in rows.taps():
        for column, x_out, x_in in columns.taps():
            patch = pixels[:, :, y_in, x_in]
            product = patch.reshape(groups, -1, depth) @ weights[row, column]
            sums[:, :, y_out, x_out] += product.reshape(*patch.shape[:-1], -1)
    return _rescaled(call, operands, _ungrouped(sums))


def _grouped(pixels: np.ndarray, groups: int) -> np.ndarray:
    """[batch, h, w, groups · depth] → [groups, batch, h, w, depth]."""
    split = pixels.reshape(*pixels.shape[:3], groups, -1)
    return np.ascontiguousarray(np.moveaxis(split, 3, 0))


def _ungrouped(sums: np.ndarray) -> np.ndarray:
    return np.moveaxis(sums, 0, 3).reshape(*sums.shape[1:4], -1)


def depthwise_conv_2d(call: Call) -> np.ndarray:
    """Kernel [1, h, w, in · multiplier]; int4 kernels only with int8 activations.

    With int16 activations the kernel would read packed int4 as int8.
    """
    values = call.arguments(2, 3)
    kernel_types = ("int8",) if values[0].dtype == "int16" else ("int8", "int4")
    operands = _operands(call, values, -1, *kernel_types)
    x, kernel = operands.x, operands.kernel
    _require_images(call, x, kernel)
    _require_symmetric_kernel(call, kernel)
    fits = kernel.shape[0] == 1 and operands.channels % x.shape[3] == 0
    call.require(fits, f"has kernel shape {kernel.shape} on {x.shape[3]} channels")
    rows, columns = axes(call, x.shape, kernel.shape[1:3], dilated=True)
    shape = (x.shape[0], rows.out, columns.out, operands.channels)
    sums = np.zeros(call.require_size(shape))
    multiplier = operands.channels // x.shape[3]
    pixels = np.repeat(x.centered().astype(np.float64), multiplier, axis=3)
    weights = kernel.codes[0].astype(np.float64)
    for row, y_out, y_in in rows.taps():
        for column, x_out, x_in in columns.taps():
            sums[:, y_out, x_out] += pixels[:, y_in, x_in] * weights[row, column]
    return _rescaled(call, operands, sums)


def transpose_conv(call: Call) -> np.ndarray:
    """Kernel [out, h, w, in]; the first input is the output's shape.

    The batch of the data wins over the one in that shape.
    """
    shape, kernel, x, bias = call.arguments(3, 4)
    operands = _operands(call, (x, kernel, bias), 0, "int8")
    _require_images(call, x, kernel)
    _require_symmetric_kernel(call, kernel)
    wanted = call.constant(shape, "int32")
    call.require(len(wanted) == 4 and min(wanted) > 0, f"has the output shape {wanted}")
    fits = kernel.shape[3] == x.shape[3] and wanted[3] == operands.channels
    call.require(fits, f"has kernel shape {kernel.shape}, output {wanted}, input {x.shape}")
    # It is the adjoint of the convolution that reads the output and writes the input.
    rows, columns = axes(call, tuple(wanted), kernel.shape[1:3])
    fits = (rows.out, columns.out) == x.shape[1:3]
    call.require(fits, f"has input {x.shape}, which does not belong to output {wanted}")
    sums = np.zeros(call.require_size((x.shape[0], *wanted[1:])))
    pixels = x.centered().astype(np.float64)
    weights = kernel.codes.transpose(1, 2, 3, 0).astype(np.float64)
    for row, y_in, y_out in rows.taps():
        for column, x_in, x_out in columns.taps():
            sums[:, y_out, x_out] += pixels[:, y_in, x_in] @ weights[row, column]
    return _rescaled(call, operands, sums)


def fully_connected(call: Call) -> np.ndarray:
    """Kernel [out, in]; rescaled in float64, unlike a convolution.

    int8 and int4 kernels with int8 or int16 activations, int2 kernels with int8.
    """
    values = call.arguments(2, 3)
    kernel_types = ("int8", "int4") if values[0].dtype == "int16" else ("int8", "int4", "int2")
    call.require(len(values[1].shape) == 2, f"has kernel shape {values[1].shape}")
    operands = _operands(call, values, 0, *kernel_types)
    call.require(call.option("weightsFormat") == 0, "has shuffled weights")
    x, kernel = operands.x, operands.kernel
    units, depth = kernel.shape
    keeps = bool(call.option("keepNumDims"))
    fits = depth > 0 and math.prod(x.shape) % depth == 0
    fits = fits and (not keeps or x.shape[-1:] == (depth,))
    call.require(fits, f"has kernel shape {kernel.shape} on an input of shape {x.shape}")
    per_channel = len(kernel.tensor.scales) > 1
    if per_channel or kernel.dtype != "int8":
        _require_symmetric_kernel(call, kernel)
    weights = kernel.codes if per_channel else kernel.centered()
    batch = x.centered().astype(np.float64).reshape(-1, depth)
    call.require_size((len(batch), units))
    total = operands.accumulator(batch @ weights.T.astype(np.float64))
    real = round_away(total.astype(np.float64) * operands.real_multiplier(call))
    codes = to_int32(real) + call.output.zero_point
    codes = call.clamp(codes, call.option("fusedActivationFunction"))
    return codes.reshape(*x.shape[:-1], units) if keeps else codes


def batch_matmul(call: Call) -> np.ndarray:
    """`a · b` of the last two dimensions, either transposed; both operands are activations."""
    a, b = call.arguments(2)
    dtype = call.require_types("int8", "int16", values=(a, b))
    ranks = len(a.shape) == len(b.shape) >= 2
    call.require(ranks, f"multiplies the shapes {a.shape} and {b.shape}")
    one, other = (value.centered().astype(np.float64) for value in (a, b))
    one = np.swapaxes(one, -1, -2) if call.option("adjX") else one
    other = np.swapaxes(other, -1, -2) if call.option("adjY") else other
    fits = one.shape[-1] == other.shape[-2] and one.shape[:-2] == other.shape[:-2]
    call.require(fits, f"multiplies the shapes {a.shape} and {b.shape}")
    call.require_size((*one.shape[:-1], other.shape[-1]))
    total = (one @ other).astype(np.int64)
    # The kernel multiplies the scales in float32.
    real = np.float64(np.float32(a.scale * b.scale)) / np.float64(call.output.scale)
    multiplier, shift = quantize_multiplier(real)
    if dtype == "int16":
        codes = multiply_wide(total, multiplier, shift)
    else:
        codes = multiply(wrap32(total), multiplier, shift)
    return call.clamp(codes + call.output.zero_point)


KERNELS: dict[str, Callable[[Call], np.ndarray]] = {
    "BATCH_MATMUL": batch_matmul,
    "CONV_2D": conv_2d,
    "DEPTHWISE_CONV_2D": depthwise_conv_2d,
    "FULLY_CONNECTED": fully_connected,
    "TRANSPOSE_CONV": transpose_conv,
}
