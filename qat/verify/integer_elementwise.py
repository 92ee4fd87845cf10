"""Arithmetic, activations and comparisons on integers, element by element.

After tflite/kernels/{add, sub, mul, activations, maximum_minimum, comparisons, select}.cc and
internal/reference/. A real multiplier is formed in the precision that the kernel forms it in:
float32 in MUL, RELU, LEAKY_RELU, PRELU and HARD_SWISH, float64 in ADD and SUB.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qat.verify.arithmetic import (
    high_multiply,
    multiply,
    multiply_below_one,
    quantize_multiplier,
    round_away,
    rounding_shift,
    wrap32,
)
from qat.verify.integer_call import Call, Value, broadcast_shape

_INT8_HEADROOM, _INT16_HEADROOM = 20, 15
_COMPARISON_HEADROOM = 8


def add(call: Call) -> np.ndarray:
    """`a + b`, both rescaled to twice the larger input scale."""
    return _sum(call, sign=1)


def sub(call: Call) -> np.ndarray:
    """`a - b`, rescaled like `add`."""
    return _sum(call, sign=-1)


def _sum(call: Call, sign: int) -> np.ndarray:
    a, b = call.arguments(2)
    dtype = call.require_types("int8", "int16", "int32", values=(a, b))
    shape = broadcast_shape(call, a, b)
    if dtype == "int32":
        call.require(call.option("fusedActivationFunction") == 0, "has a fused activation")
        return wrap32(a.codes.astype(np.int64) + sign * b.codes.astype(np.int64))
    if dtype == "int16":
        _require_zero_points(call, a, b)
        logarithms = [_log2(scale) for scale in (a.scale, b.scale, call.output.scale)]
        if call.option("potScaleInt16") and None not in logarithms:
            return _shifted_sum(call, a, b, logarithms, sign)
    headroom = _INT16_HEADROOM if dtype == "int16" else _INT8_HEADROOM
    twice = 2.0 * max(float(a.scale), float(b.scale))
    real = twice / (2.0**headroom * float(call.output.scale))
    call.require(real < 1, "has an output scale so small that the kernel aborts")
    terms = [_below_one(value, float(value.scale) / twice, headroom) for value in (a, b)]
    total = np.broadcast_to(terms[0] + sign * terms[1], shape)
    codes = multiply_below_one(total, *quantize_multiplier(real)) + call.output.zero_point
    return call.clamp(codes, call.option("fusedActivationFunction"))


def _below_one(value: Value, real: float, headroom: int) -> np.ndarray:
    return multiply_below_one(value.centered() << headroom, *quantize_multiplier(real))


def _require_zero_points(call: Call, *values: Value) -> None:
    points = [tensor.zero_point for tensor in (*(v.tensor for v in values), call.output)]
    call.require(not any(points), "has a zero point that is not 0 on an int16 tensor")


def _log2(scale: np.float32) -> int | None:
    """The scale's exponent if it is (within 0.1 %) a power of two; CheckedLog2, in float32."""
    logarithm = np.log(scale) * (np.float32(1) / np.log(np.float32(2)))
    nearest = round_away(logarithm)
    return int(nearest) if abs(logarithm - nearest) < np.float32(1e-3) else None


def _shifted_sum(call: Call, a: Value, b: Value, logarithms: list[int], sign: int) -> np.ndarray:
    """int16 on power-of-two scales: shifts instead of multipliers, where the file allows them."""
    shifts = [logarithms[2] - logarithm for logarithm in logarithms[:2]]
    call.require(
        min(shifts) == 0 and max(shifts) <= 15,
        "has power-of-two scales that the kernel cannot shift to each other; potScaleInt16 = false "
        "rescales them",
    )
    call.require(sign < 0 or a.shape == b.shape, "broadcasts power-of-two int16 tensors")
    terms = [rounding_shift(v.centered(), s) for v, s in zip((a, b), shifts, strict=True)]
    return call.clamp(terms[0] + sign * terms[1], call.option("fusedActivationFunction"))


def mul(call: Call) -> np.ndarray:
    """`a · b`."""
    a, b = call.arguments(2)
    if call.require_types("int8", "int16", values=(a, b)) == "int16":
        _require_zero_points(call, a, b)
    broadcast_shape(call, a, b)
    real = a.scale * b.scale / call.output.scale
    product = wrap32(a.centered() * b.centered())
    codes = multiply(product, *quantize_multiplier(real)) + call.output.zero_point
    return call.clamp(codes, call.option("fusedActivationFunction"))


def _identity(call: Call, x: Value) -> np.ndarray:
    return multiply(x.centered(), *quantize_multiplier(x.scale / call.output.scale))


def _activation(call: Call) -> Value:
    (x,) = call.arguments(1)
    if call.require_types("int8", "int16", values=(x,)) == "int16":
        _require_zero_points(call, x)
    return x


def _relu(high: float | None) -> Callable[[Call], np.ndarray]:
    def relu(call: Call) -> np.ndarray:
        codes = _identity(call, _activation(call)) + call.output.zero_point
        return call.clamp_real(codes, 0, high)

    return relu


def leaky_relu(call: Call) -> np.ndarray:
    """`x` where positive, else `alpha · x`."""
    x = _activation(call)
    alpha = x.scale * np.float32(call.option("alpha")) / call.output.scale
    multiplier, shift = quantize_multiplier(alpha)
    centered = x.centered()
    negative = np.sign(multiplier) * multiply(centered, np.abs(multiplier), shift)
    codes = np.where(centered >= 0, _identity(call, x), negative)
    return call.clamp(codes + call.output.zero_point)


def prelu(call: Call) -> np.ndarray:
    """`x` where positive, else `alpha · x` with an int8 tensor alpha."""
    x, alpha = call.arguments(2)
    if call.require_types("int8", "int16", values=(x,)) == "int16":
        _require_zero_points(call, x)
    call.require(alpha.dtype == "int8", f"has an {alpha.dtype} alpha, needs int8")
    shape = broadcast_shape(call, x, alpha)
    call.require(shape == x.shape, f"has alpha {alpha.shape} on an input of shape {x.shape}")
    real = x.scale * alpha.scale / call.output.scale
    negative = multiply(x.centered() * alpha.centered(), *quantize_multiplier(real))
    codes = np.where(x.centered() >= 0, _identity(call, x), negative)
    return call.clamp(codes + call.output.zero_point)


def hard_swish(call: Call) -> np.ndarray:
    """`x · relu6(x + 3) / 6` in 16-bit fixed point (internal/reference/hard_swish.h)."""
    (x,) = call.arguments(1)
    call.require_types("int8", values=(x,))
    fine = np.float32(1 / 128) * x.scale
    output, output_exponent = _multiplier16(fine / call.output.scale)
    reluish, exponent = _multiplier16(fine / np.float32(3 / 32768))
    call.require(
        -15 <= output_exponent <= 0 and -15 <= exponent <= 31,
        "has scales that the kernel refuses",
    )
    centered = x.centered() << 7
    # relu6(x + 3) / 6 as a code of [0, 1]; saturating shifts, the last one after the product.
    gate = _saturate16(centered << max(exponent - 1, 0))
    gate = high_multiply(gate, reluish, 16)
    gate = _saturate16(gate << 1) if exponent > 0 else rounding_shift(gate, -exponent)
    gate = (gate + 32768) >> 1
    product = gate * high_multiply(centered, output, 16)
    product = np.sign(product) * (np.abs(product) >> 15)
    codes = rounding_shift(product, -output_exponent) + call.output.zero_point
    return call.clamp(codes.astype(np.int16).astype(np.int64))


def _multiplier16(real: np.float32) -> tuple[int, int]:
    multiplier, shift = (int(number) for number in quantize_multiplier(real))
    return min((multiplier + (1 << 15)) >> 16, 32767), shift


def _saturate16(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -32768, 32767)


def _extreme(pick: np.ufunc) -> Callable[[Call], np.ndarray]:
    def extreme(call: Call) -> np.ndarray:
        """The larger or smaller code; the grids are not looked at."""
        a, b = call.arguments(2)
        call.require_types("int8", "int16", values=(a, b))
        broadcast_shape(call, a, b)
        return pick(a.codes, b.codes)

    return extreme


def greater_equal(call: Call) -> np.ndarray:
    """`a ≥ b`: int8 after rescaling both, int16 on the codes alone.

    The kernel aborts on an int8 scale of exactly 1, and shifts by a negative number for larger
    ones; only a comparison with zero survives that.
    """
    a, b = call.arguments(2)
    same = a.dtype == b.dtype and a.dtype in ("int8", "int16") and call.output.dtype == "bool"
    call.require(same, f"compares {a.dtype} with {b.dtype} into {call.output.dtype}")
    broadcast_shape(call, a, b)
    if a.dtype == "int16":
        return a.codes >= b.codes
    scales = float(a.scale), float(b.scale)
    call.require(1.0 not in scales, "has an input scale of exactly 1, on which the kernel aborts")
    if min(scales) > 1 and not np.any(b.centered()):
        return a.centered() >= b.centered()
    call.require(max(scales) < 1, "compares with other than zero at an input scale above 1")
    left, right = (
        _below_one(value, scale, _COMPARISON_HEADROOM)
        for value, scale in zip((a, b), scales, strict=True)
    )
    return left >= right


def select_v2(call: Call) -> np.ndarray:
    """`a` where the condition holds, else `b`, copied code by code.

    A single code takes the shape that the file states, whatever the shapes of the inputs.
    """
    condition, a, b = call.arguments(3)
    call.require(condition.dtype == "bool", f"has a condition of type {condition.dtype}")
    call.require_types("int8", "int16", "float32", values=(a, b))
    shape = broadcast_shape(call, condition, a, b)
    if math.prod(shape) == math.prod(call.output.shape) == 1:
        shape = call.output.shape
    return np.where(condition.codes, a.codes, b.codes).reshape(shape)


KERNELS: dict[str, Callable[[Call], np.ndarray]] = {
    "ADD": add,
    "GREATER_EQUAL": greater_equal,
    "HARD_SWISH": hard_swish,
    "LEAKY_RELU": leaky_relu,
    "MAXIMUM": _extreme(np.maximum),
    "MINIMUM": _extreme(np.minimum),
    "MUL": mul,
    "PRELU": prelu,
    "RELU": _relu(None),
    "RELU6": _relu(6),
    "SELECT_V2": select_v2,
    "SUB": sub,
}
