"""LOGISTIC, TANH and SOFTMAX on integers, and QUANTIZE and DEQUANTIZE at the border to float.

After tflite/kernels/{activations, quantize, dequantize}.cc, internal/reference/softmax.h,
internal/reference/integer_ops/{logistic, tanh}.h and gemmlowp's fixedpoint.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qat.verify.arithmetic import (
    high_multiply,
    multiply,
    quantize_multiplier,
    round_away,
    rounding_shift,
    to_int32,
    wrap32,
)
from qat.verify.integer_call import Call, Value

_POSITIVE_ONE = 2**31 - 1  # 1.0 in Q0.31, as near as it goes
_EXP_BITS, _SUM_BITS = 5, 12  # integer bits of softmax's exponents and of its sum


def _logistic_curve(x: np.ndarray) -> np.ndarray:
    one = np.float32(1)
    return one / (one + np.exp(-x.astype(np.float64)).astype(np.float32))


def _tanh_curve(x: np.ndarray) -> np.ndarray:
    return np.tanh(x.astype(np.float64)).astype(np.float32)


def lookup(call: Call, x: Value, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """int8: a table of 256 codes, computed in float32 (LUTPopulate in internal/common.h).

    The kernel calls the C library's `expf` and `tanhf`, we round float64 results to float32;
    where the two differ by a unit in the last place, a code that lies on a tie could differ.
    """
    inverse = np.float32(1) / call.output.scale
    codes = np.arange(-128, 128)
    real = x.scale * (codes - x.tensor.zero_point).astype(np.float32)
    steps = round_away(curve(real) * inverse) + np.float32(call.output.zero_point)
    return call.clamp(to_int32(steps))[x.codes.astype(np.int64) + 128]


def _sigmoid_table() -> np.ndarray:
    """σ(i / 24) in 0.16, each entry lowered by half of the next chord's error at its middle."""
    i = np.arange(256)
    here, middle, after = (65536 / (1 + np.exp(-(i + step) / 24)) for step in (0, 0.5, 1))
    table = np.floor(here - ((here + after) / 2 - middle) / 2 + 0.5).astype(np.int64)
    table[-1] = 65535
    return table


_SIGMOID = _sigmoid_table()


def _table_argument(call: Call, x: Value, free_shifts: tuple[int, ...]) -> np.ndarray:
    """int16: x in units of 1 / (3 · 4096); scales of 2^(shift - 12) need no rounding."""
    points = x.tensor.zero_point == 0 and call.output.zero_point == 0
    scale = call.output.scale == np.float32(1 / 32768)
    call.require(
        points and scale, "has an int16 output grid other than scale 1/32768, zero point 0"
    )
    for shift in free_shifts:
        logarithm = np.log2(np.float64(x.scale))
        if abs(logarithm - (shift - 12)) < 1e-3:
            return x.centered() * (3 << shift)
    multiplier, shift = float(x.scale) * 4096.0 * 3.0, 0
    while multiplier <= 32767.0 / 2.0 and shift <= 30:
        multiplier, shift = multiplier * 2.0, shift + 1
    call.require(multiplier < 2.0**31, "has an input scale that leaves int32")
    return wrap32(x.centered() * int(multiplier) + ((1 << shift) >> 1)) >> shift


def _interpolated(x: np.ndarray, bits: int) -> np.ndarray:
    """σ(|x|) in 0.(16 + bits), linear between table entries; `bits` low bits of x are between."""
    x = np.abs(x)
    index = np.minimum(x >> bits, 254)
    step = _SIGMOID[index + 1] - _SIGMOID[index]
    return (_SIGMOID[index] << bits) + (x & ((1 << bits) - 1)) * step


def logistic(call: Call) -> np.ndarray:
    """`1 / (1 + exp(-x))`; int8 output scale 1/256, int16 output scale 1/32768."""
    (x,) = call.arguments(1)
    if call.require_types("int8", "int16", values=(x,)) == "int8":
        right = call.output.scale == np.float32(1 / 256)
        call.require(right, f"has output scale {call.output.scale}, needs 1/256")
        return lookup(call, x, _logistic_curve)
    argument = _table_argument(call, x, (0,))
    result = np.where(np.abs(argument) >> 9 >= 255, 0x7FFF << 10, _interpolated(argument, 9))
    result = np.where(argument >= 0, result + 512, (1 << 25) - result + 511)
    return result >> 10


def tanh(call: Call) -> np.ndarray:
    """`tanh(x)`; int16 output scale 1/32768."""
    (x,) = call.arguments(1)
    if call.require_types("int8", "int16", values=(x,)) == "int8":
        return lookup(call, x, _tanh_curve)
    argument = _table_argument(call, x, (0, 1))
    result = np.where(np.abs(argument) >> 8 >= 255, 0xFFFF << 8, _interpolated(argument, 8))
    result = np.where(argument >= 0, result - (1 << 23) + 128, (1 << 23) - result + 127)
    return result >> 8


def _exp_negative(x: np.ndarray) -> np.ndarray:
    """exp(x / 2^26) in Q0.31 for x ≤ 0: a polynomial on [-1/4, 0) times exp(-2^k) per bit k."""
    quarter = 1 << 24
    remainder = (x & (quarter - 1)) - quarter
    shifted = (remainder << _EXP_BITS) + (1 << 28)  # around -1/8
    square = high_multiply(shifted, shifted)
    cube, fourth = high_multiply(square, shifted), high_multiply(square, square)
    third = np.int64(round(2**31 / 3))
    tail = high_multiply(rounding_shift(fourth, 2) + cube, third) + square
    start = np.int64(round(np.exp(-1 / 8) * 2**31))
    result = start + high_multiply(start, shifted + rounding_shift(tail, 1))
    for power in range(-2, _EXP_BITS):
        factor = np.int64(round(np.exp(-(2.0**power)) * 2**31))
        is_set = ((remainder - x) >> (26 + power)) & 1
        result = np.where(is_set == 1, high_multiply(result, factor), result)
    return np.where(x == 0, _POSITIVE_ONE, result)


def _saturating_left(x: np.ndarray, shift: int) -> np.ndarray:
    return np.clip(x << shift, -(2**31), _POSITIVE_ONE)


def _one_over_one_plus(x: np.ndarray) -> np.ndarray:
    """`1 / (1 + x)` in Q0.31 for x in [0, 1): three Newton steps in Q2.29."""
    half = (x + 2**31) >> 1
    result = round(48 / 17 * 2**29) + high_multiply(half, np.int64(round(-32 / 17 * 2**29)))
    for _ in range(3):
        error = (1 << 29) - high_multiply(half, result)
        result = result + _saturating_left(high_multiply(result, error), 2)
    return _saturating_left(result, 1)


def softmax(call: Call) -> np.ndarray:
    """`exp(beta · x) / Σ exp(beta · x)` over the last dimension."""
    (x,) = call.arguments(1)
    dtype = call.require_types("int8", "int16", values=(x,))
    call.require(len(x.shape) > 0 and x.codes.size > 0, f"reads a tensor of shape {x.shape}")
    scale, zero_point = (1 / 256, -128) if dtype == "int8" else (1 / 32768, 0)
    near = abs(call.output.scale - scale) <= 0.001 * scale
    near = near and call.output.zero_point == zero_point
    call.require(
        near, f"has another {dtype} output grid than scale {scale}, zero point {zero_point}"
    )
    below = x.codes.astype(np.int64) - x.codes.max(axis=-1, keepdims=True)
    return _softmax8(call, x, below) if dtype == "int8" else _softmax16(call, x, below)


def _softmax8(call: Call, x: Value, below: np.ndarray) -> np.ndarray:
    real = np.float64(np.float32(call.option("beta"))) * np.float64(x.scale) * 2.0**26
    call.require(real > 1, "has an input scale so small that the kernel aborts")
    multiplier, shift = quantize_multiplier(min(real, 2.0**31 - 1))
    radius = int(31 * 2.0**26 / 2.0 ** int(shift))
    scaled = high_multiply(wrap32(below << shift), multiplier)
    exponentials = np.where(below >= -radius, _exp_negative(np.minimum(scaled, 0)), 0)
    counted = rounding_shift(exponentials, _SUM_BITS).sum(axis=-1, keepdims=True)
    counted = wrap32(counted)
    call.require(bool(np.all(counted > 0)), "sums more exponentials than its register holds")
    headroom = 32 - np.frexp(counted.astype(np.float64))[1].astype(np.int64)
    inverse = _one_over_one_plus((counted << headroom) - 2**31)
    exponent = _SUM_BITS - headroom + 31 - 8
    codes = rounding_shift(high_multiply(inverse, exponentials), exponent) - 128
    return call.clamp(np.where(below >= -radius, codes, -128))


def _chord_table(curve: Callable, start: float, stop: float) -> np.ndarray:
    """513 int16 samples of a curve in [0, 1], lowered by half of each chord's error at its middle
    (LUTPopulateInt16 in internal/common.h)."""
    step = (stop - start) / 512
    points = start + np.arange(512) * step
    unit = 65536 / (2 / 65535 * 65535)
    here, middle, after = (curve(points + offset) * unit for offset in (0, step / 2, step))
    sample = round_away(here)
    error = round_away((after + sample) / 2) - round_away(middle)
    table = np.append(sample - round_away(error / 2), round_away(curve(stop) * unit))
    return np.clip(table, -32768, 32767).astype(np.int64)


def _chordlookup(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    index = 256 + (x >> 7)
    return table[index] + (((table[index + 1] - table[index]) * (x & 127) + 64) >> 7)


_EXP_TABLE = _chord_table(np.exp, -10.0, 0.0)
_INVERSE_TABLE = _chord_table(lambda x: 1 / (1 + x), 0.0, 1.0)


def _softmax16(call: Call, x: Value, below: np.ndarray) -> np.ndarray:
    call.require(x.tensor.zero_point == 0, "has a zero point that is not 0 on an int16 tensor")
    real = np.float64(x.scale * np.float32(call.option("beta"))) / (10.0 / 65535.0)
    argument = multiply(below, *quantize_multiplier(real)) + 32767
    exponentials = _chordlookup(np.clip(argument, -32768, 32767), _EXP_TABLE)
    total = exponentials.sum(axis=-1, keepdims=True)
    call.require(
        bool(np.all((total > 0) & (total < 2**31))), "sums to more than its register holds"
    )
    headroom = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    fraction = (((total << (headroom - 1)) + (1 << 13)) >> 14) - (2**15 + 2**16)
    inverse = _chordlookup(np.clip(fraction, -32768, 32767), _INVERSE_TABLE)
    shift = 31 - headroom
    return np.clip((exponentials * inverse + (np.int64(1) << (shift - 1))) >> shift, 0, 32767)


def _per_channel(call: Call, value: Value, tensor) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's scales and zero points, shaped to combine with the value."""
    scales, points = tensor.scales, tensor.zero_points
    call.require(len(scales) > 0, f"has no scale on {tensor.name!r}")
    points = points if len(points) else np.zeros(1, np.int64)
    shape = [1] * len(value.shape)
    if len(scales) > 1:
        axis = call.axis(tensor.axis, len(value.shape))
        fits = len(scales) == value.shape[axis] and len(points) in (1, len(scales))
        call.require(fits, f"has {len(scales)} scales for a tensor of shape {value.shape}")
        shape[axis] = -1
    return scales.reshape(shape), points.reshape(shape if len(points) > 1 else [1] * len(shape))


def quantize(call: Call) -> np.ndarray:
    """A float onto a grid (divided and rounded in float32), or codes onto another grid."""
    (x,) = call.arguments(1)
    output = call.output.dtype
    call.require(output in ("int8", "int16", "uint8"), f"quantizes to {output}")
    if x.dtype == "float32":
        scale, zero_point = _per_channel(call, x, call.output)
        return call.clamp(to_int32(round_away(x.codes / scale)) + zero_point)
    legal = ("int8", "int16") if x.dtype == "int16" else ("int8", "int16", "uint8")
    call.require(x.dtype in ("int8", "int16", "uint8"), f"quantizes {x.dtype}")
    call.require(output in legal, f"turns {x.dtype} into {output}, which the kernel cannot")
    if x.dtype == output == "int16":
        zero = x.tensor.zero_point == 0 and call.output.zero_point == 0
        call.require(zero, "has a zero point that is not 0 on an int16 tensor")
    real = np.float64(x.scale) / np.float64(call.output.scale)
    return call.clamp(multiply(x.centered(), *quantize_multiplier(real)) + call.output.zero_point)


def dequantize(call: Call) -> np.ndarray:
    """`scale · (code - zero_point)`, float32."""
    (x,) = call.arguments(1)
    call.require(call.output.dtype == "float32", f"dequantizes to {call.output.dtype}")
    call.require(x.dtype != "float32" and x.dtype != "bool", f"dequantizes {x.dtype}")
    scale, zero_point = _per_channel(call, x, x.tensor)
    call.require(x.dtype != "int16" or not np.any(zero_point), "has an int16 zero point not 0")
    return (scale.astype(np.float64) * (x.codes.astype(np.int64) - zero_point)).astype(np.float32)


KERNELS: dict[str, Callable[[Call], np.ndarray]] = {
    "DEQUANTIZE": dequantize,
    "LOGISTIC": logistic,
    "QUANTIZE": quantize,
    "SOFTMAX": softmax,
    "TANH": tanh,
}
