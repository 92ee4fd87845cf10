"""Windows that slide over images: their geometry, and the pools and reductions over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qat.verify.arithmetic import multiply, quantize_multiplier, wrap32
from qat.verify.integer_call import Call, Value, same_grid


@dataclasses.dataclass(frozen=True)
class Axis:
    """One dimension of a sliding window: output `y` at tap `k` reads input
    `y · stride + k · dilation - before`."""

    size: int
    window: int
    stride: int
    dilation: int
    before: int
    out: int

    def taps(self) -> Iterator[tuple[int, slice, slice]]:
        """(k, outputs, inputs) for every tap that meets the image; padding is left out."""
        first = -(-(self.before - (self.out - 1) * self.stride) // self.dilation)
        last = (self.size - 1 + self.before) // self.dilation
        for k in range(max(first, 0), min(last, self.window - 1) + 1):
            offset = k * self.dilation - self.before
            low = max(-(offset // self.stride), 0)
            high = min((self.size - 1 - offset) // self.stride, self.out - 1)
            if low <= high:
                start = low * self.stride + offset
                stop = high * self.stride + offset + 1
                yield k, slice(low, high + 1), slice(start, stop, self.stride)


def axes(
    call: Call, shape: tuple[int, ...], window: tuple[int, int], *, dilated: bool = False
) -> tuple[Axis, Axis]:
    """Rows and columns of a window on an image [batch, h, w, depth] (tflite/kernels/padding.h)."""
    strides = call.option("strideH"), call.option("strideW")
    dilations = (1, 1)
    if dilated:
        dilations = call.option("dilationHFactor"), call.option("dilationWFactor")
    sane = min(*strides, *dilations, *window) > 0
    call.require(sane, f"has window {tuple(window)}, strides {strides}, dilation {dilations}")
    return tuple(
        _axis(call, *sizes) for sizes in zip(shape[1:3], window, strides, dilations, strict=True)
    )


def _axis(call: Call, size: int, window: int, stride: int, dilation: int) -> Axis:
    effective = (window - 1) * dilation + 1
    padding = call.option("padding")
    call.require(padding in (schema.Padding.SAME, schema.Padding.VALID), f"has padding {padding}")
    room = size if padding == schema.Padding.SAME else size - effective + 1
    out = (room + stride - 1) // stride
    call.require(
        out > 0, f"has a window of {effective} on an image of {size}, which leaves nothing"
    )
    before = max((out - 1) * stride + effective - size, 0) // 2
    return Axis(size, window, stride, dilation, before, out)


def _image(call: Call) -> tuple[Value, Axis, Axis]:
    (x,) = call.arguments(1)
    call.require_types("int8", "int16", values=(x,))
    call.require(len(x.shape) == 4 and min(x.shape) > 0, f"reads a tensor of shape {x.shape}")
    window = call.option("filterHeight"), call.option("filterWidth")
    return x, *axes(call, x.shape, window)


def _along(codes: np.ndarray, axis: Axis, dimension: int, combine: np.ufunc, start) -> np.ndarray:
    """The window's maximum or sum along one dimension."""
    codes = np.moveaxis(codes, dimension, 0)
    result = np.full((axis.out, *codes.shape[1:]), start, np.int64)
    for _, outputs, inputs in axis.taps():
        result[outputs] = combine(result[outputs], codes[inputs])
    return np.moveaxis(result, 0, dimension)


def max_pool_2d(call: Call) -> np.ndarray:
    """The largest code of a window; the input's grid is not looked at."""
    x, rows, columns = _image(call)
    lowest, _ = call.code_range()
    codes = _along(x.codes.astype(np.int64), rows, 1, np.maximum, lowest)
    codes = _along(codes, columns, 2, np.maximum, lowest)
    return call.clamp(codes, call.option("fusedActivationFunction"))


def average_pool_2d(call: Call) -> np.ndarray:
    """The mean code of a window without its padding, halves away from zero.

    After internal/reference/integer_ops/pooling.h; the input's grid is not looked at.
    """
    x, rows, columns = _image(call)
    total = _along(_along(x.codes.astype(np.int64), rows, 1, np.add, 0), columns, 2, np.add, 0)
    ones = np.ones((1, *x.shape[1:3], 1), np.int64)
    count = _along(_along(ones, rows, 1, np.add, 0), columns, 2, np.add, 0)
    codes = np.sign(total) * ((np.abs(total) + count // 2) // count)
    return call.clamp(codes, call.option("fusedActivationFunction"))


def _reduced(call: Call) -> tuple[Value, tuple[int, ...]]:
    x, dimensions = call.arguments(2)
    call.require_types("int8", "int16", values=(x,))
    call.require(x.codes.size > 0, "reduces an empty tensor")
    rank = len(x.shape)
    return x, tuple({call.axis(d, rank) for d in call.constant(dimensions, "int32")})


def mean(call: Call) -> np.ndarray:
    """The mean over some dimensions; `1/n` is folded into the multiplier and cut, not rounded.

    After QuantizedMeanOrSum in internal/reference/reduce.h.
    """
    x, dimensions = _reduced(call)
    count = math.prod(x.shape[d] for d in dimensions)
    real = np.float64(x.scale) / np.float64(call.output.scale)
    multiplier, shift = (int(number) for number in quantize_multiplier(real))
    extra = min(count.bit_length() - 1, 32, 31 + shift)
    total = x.codes.sum(axis=dimensions, keepdims=bool(call.option("keepDims")), dtype=np.int64)
    total = wrap32(wrap32(total) - x.tensor.zero_point * count)
    codes = multiply(total, np.int64((multiplier << extra) // count), np.int64(shift - extra))
    return call.clamp(codes + call.output.zero_point)


def reduce_max(call: Call) -> np.ndarray:
    """The largest code over some dimensions."""
    x, dimensions = _reduced(call)
    call.require(same_grid(x.tensor, call.output), "changes the grid, which it cannot do")
    return x.codes.max(axis=dimensions, keepdims=bool(call.option("keepDims")))


KERNELS: dict[str, Callable[[Call], np.ndarray]] = {
    "AVERAGE_POOL_2D": average_pool_2d,
    "MAX_POOL_2D": max_pool_2d,
    "MEAN": mean,
    "REDUCE_MAX": reduce_max,
}
