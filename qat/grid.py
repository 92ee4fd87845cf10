"""The integer grid that a tensor is rounded to: pure functions of scale and zero point."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

# A scale below this cannot be inverted in float32 without overflow of ordinary weights.
SMALLEST_SCALE = 2.0**-40
# Below it float32 is 0 on some devices.
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)

# The top code of the 8-bit container. Activations narrower than 8 bits take its topmost codes,
# so that the saturation of an int8 kernel is their own upper clamp and costs no operator.
CONTAINER_TOP = 127


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Uniform grid: `real = (code - zero_point) * scale`, `qmin <= code <= qmax`.

    Attributes:
        scale: float32, scalar or shaped to broadcast against the tensor (per channel).
        zero_point: float32 whole number, the code of real 0 (exactly representable).
        qmin: lowest code. qmax: highest code.

    Source: Jacob et al. 2018, arXiv 1712.05877, equation 1.
    """

    scale: tf.Tensor | np.ndarray
    zero_point: tf.Tensor | np.ndarray
    qmin: int
    qmax: int

    def quantize(self, x: tf.Tensor) -> tf.Tensor:
        """Codes of x: `clip(round(x / scale) + zero_point, qmin, qmax)`, float32 whole numbers."""
        codes = tf.round(tf.cast(x, tf.float32) / self.scale) + self.zero_point
        return tf.clip_by_value(codes, float(self.qmin), float(self.qmax))

    def dequantize(self, codes: tf.Tensor) -> tf.Tensor:
        """Real values of codes: `(codes - zero_point) * scale`, float32."""
        return (tf.cast(codes, tf.float32) - self.zero_point) * self.scale

    def nearest(self, x: tf.Tensor, *, negatives: bool = True) -> tf.Tensor:
        """`dequantize(quantize(x))` in fewer passes over x; float32.

        `clip(round(x / scale), qmin - zero_point, qmax - zero_point) * scale`.

        Args:
            negatives: some x may be below 0, else they need no lower clip: 0 lies on every grid.
        """
        steps = tf.round(tf.cast(x, tf.float32) / self.scale)
        if negatives:
            steps = tf.maximum(steps, float(self.qmin) - self.zero_point)
        return tf.minimum(steps, float(self.qmax) - self.zero_point) * self.scale

    @property
    def lowest(self) -> tf.Tensor:
        """Real value of qmin."""
        return self.dequantize(tf.constant(float(self.qmin)))

    @property
    def highest(self) -> tf.Tensor:
        """Real value of qmax."""
        return self.dequantize(tf.constant(float(self.qmax)))

    def numpy(self) -> Grid:
        """The same grid with NumPy constants, as the freeze table stores it (eager only)."""
        return Grid(
            scale=np.asarray(self.scale, np.float32),
            zero_point=np.asarray(self.zero_point, np.float32),
            qmin=self.qmin,
            qmax=self.qmax,
        )


def symmetric_grid(bound: tf.Tensor, *, num_bits: int, narrow_range: bool = True) -> Grid:
    """Grid with zero point 0 whose highest code stands for `bound`.

    `scale = bound / (2^(b-1) - 1)`; codes from `-(2^(b-1) - 1)` (narrow range) or `-2^(b-1)`.

    Args:
        bound: largest magnitude, float32, any shape that broadcasts against the tensor.
        num_bits: 2 to 8, or 16.
        narrow_range: leaves the lowest two's-complement code unused.

    Raises:
        ValueError: one bit has no symmetric uniform grid (use the binary quantizers).
    """
    if num_bits < 2:
        raise ValueError(
            f"a symmetric grid needs at least 2 bits, got {num_bits}; for one bit use "
            "qat.quantizers.BinaryWeightQuantizer or BinaryActivationQuantizer"
        )
    qmax = 2 ** (num_bits - 1) - 1
    scale = _quotient(bound, float(qmax))
    # Only activations have 16 bits; those that are zeros get range 1, see `affine_grid`.
    scale = _usable(scale, qmax) if num_bits == 16 else tf.maximum(scale, SMALLEST_SCALE)
    qmin = -qmax if narrow_range else -qmax - 1
    return Grid(scale=scale, zero_point=tf.constant(0.0), qmin=qmin, qmax=qmax)


def affine_grid(minimum: tf.Tensor, maximum: tf.Tensor, *, num_bits: int) -> Grid:
    """Grid over [minimum, maximum], widened to hold 0 and nudged so that 0 is a code.

    `n = 2^b - 1`, `scale = (maximum - minimum) / n`, codes `127 - n … 127` of the int8 container.
    A range [-a, a] has its zero between two codes; there `scale = a / (2^(b-1) - 1)`, and one code
    is left over. Zeros alone, such as the output of units that no example activates, fit any grid:
    theirs is that of [0, 1], since a kernel cannot requantize to a tiny scale.

    Args:
        minimum, maximum: float32, any shape that broadcasts against the tensor.
        num_bits: 1 to 8.

    Raises:
        ValueError: more than 8 bits (TFLite's 16-bit activations are symmetric).
    """
    if not 1 <= num_bits <= 8:
        raise ValueError(
            f"an affine grid takes 1 to 8 bits, got {num_bits}; 16-bit tensors are symmetric"
        )
    levels = 2**num_bits - 1
    qmin = CONTAINER_TOP - levels
    minimum = tf.minimum(tf.cast(minimum, tf.float32), 0.0)
    maximum = tf.maximum(tf.cast(maximum, tf.float32), 0.0)
    scale = _quotient(maximum - minimum, float(levels))
    if num_bits > 1:
        half = float(levels // 2)
        scale = tf.where(minimum == -maximum, _quotient(maximum, half), scale)
    scale = _usable(scale, levels)
    zero_point = tf.round(qmin - minimum / scale)
    zero_point = tf.clip_by_value(zero_point, float(qmin), float(CONTAINER_TOP))
    return Grid(scale=scale, zero_point=zero_point, qmin=qmin, qmax=CONTAINER_TOP)


def _usable(scale: tf.Tensor, levels: int) -> tf.Tensor:
    """The scale of a range of real numbers; that of a range of 1, if they are all zeros."""
    return tf.where(scale < _SMALLEST_NORMAL, 1.0 / levels, tf.maximum(scale, SMALLEST_SCALE))


def _quotient(x: tf.Tensor, divisor: float) -> tf.Tensor:
    """x / divisor, float32, the same in eager and in compiled graphs.

    Those multiply by the divisor's reciprocal; in float64 that makes no difference after rounding.
    """
    return tf.cast(tf.cast(x, tf.float64) / divisor, tf.float32)
