"""The fixed-point arithmetic of LiteRT's reference kernels, on NumPy arrays.

Read from tflite/kernels/internal/{common.h, common.cc, quantization_util.cc} and from gemmlowp's
fixedpoint/fixedpoint.h. Values are int64 arrays that hold what the kernel holds in an int32 (or
int16) register; `wrap32` is where a register overflows.
"""

from __future__ import annotations

import numpy as np

from qat.verify.reader import SimulationError


def wrap32(x: np.ndarray) -> np.ndarray:
    """int64 values as an int32 register keeps them (modulo 2^32)."""
    return np.asarray(x, np.int64).astype(np.int32).astype(np.int64)


def round_away(x: np.ndarray) -> np.ndarray:
    """Nearest whole number, halves away from zero; C's `round`, exact for every float."""
    whole = np.trunc(x)
    return whole + np.copysign(np.abs(x - whole) >= 0.5, x)


def to_int32(x: np.ndarray) -> np.ndarray:
    """Whole floats as int64.

    Raises:
        SimulationError: a value outside int32, where C leaves the conversion undefined.
    """
    if not np.all(np.abs(x) < 2.0**31):
        raise SimulationError("a value is not finite or leaves int32 when it is quantized")
    return x.astype(np.int64)


def quantize_multiplier(real) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, shift) with `real ≈ multiplier · 2^(shift - 31)`, multiplier in [2^30, 2^31).

    Reals below 2^-32 become 0 (QuantizeMultiplier).
    """
    mantissa, shift = np.frexp(np.asarray(real, np.float64))
    multiplier = round_away(mantissa * 2.0**31).astype(np.int64)
    shift = shift.astype(np.int64)
    carry = np.abs(multiplier) == 2**31
    multiplier = np.where(carry, multiplier // 2, multiplier)
    shift = np.where(carry, shift + 1, shift)
    vanishes = shift < -31
    return np.where(vanishes, 0, multiplier), np.where(vanishes, 0, shift)


def high_multiply(a: np.ndarray, b: np.ndarray, bits: int = 32) -> np.ndarray:
    """`round(a·b / 2^(bits-1))`, halves up (SaturatingRoundingDoublingHighMul)."""
    product = (a * b + (1 << (bits - 2))) >> (bits - 1)
    return np.minimum(product, (1 << (bits - 1)) - 1)


def rounding_shift(x: np.ndarray, exponent) -> np.ndarray:
    """`round(x / 2^exponent)`, halves away from zero (RoundingDivideByPOT)."""
    exponent = np.asarray(exponent, np.int64)
    half = (np.int64(1) << exponent) >> 1
    return (x + half - ((x < 0) & (exponent > 0))) >> exponent


def multiply(x: np.ndarray, multiplier, shift) -> np.ndarray:
    """`x · multiplier · 2^(shift - 31)`, rounded twice (MultiplyByQuantizedMultiplier, int32)."""
    _require_shift(shift, 30)
    x = wrap32(x << np.maximum(shift, 0))
    return rounding_shift(high_multiply(x, multiplier), np.maximum(-np.asarray(shift), 0))


def multiply_below_one(x: np.ndarray, multiplier, shift) -> np.ndarray:
    """`multiply` for shift ≤ 0 (MultiplyByQuantizedMultiplierSmallerThanOneExp)."""
    _require_shift(shift, 0)
    return rounding_shift(high_multiply(x, multiplier), -np.asarray(shift))


def multiply_wide(x: np.ndarray, multiplier, shift) -> np.ndarray:
    """`x · multiplier · 2^(shift - 31)` for an int64 accumulator.

    The multiplier is cut to 16 bits and the result rounded once, halves up
    (MultiplyByQuantizedMultiplier, int64).
    """
    _require_shift(shift, 14)
    reduced = np.where(multiplier < 0x7FFF0000, (multiplier + (1 << 15)) >> 16, 0x7FFF)
    total = 15 - np.asarray(shift, np.int64)
    return wrap32((x * reduced + (np.int64(1) << (total - 1))) >> total)


def _require_shift(shift, most: int) -> None:
    if np.any(np.asarray(shift) > most):
        raise SimulationError(
            f"a rescaling by more than 2^{most} is undefined in the kernel; the output scale is "
            "too small for its inputs"
        )
