"""Weights on odd codes, DoReFa and StatsQ; and DoReFa's activations.

The 2^W levels lie evenly about zero, which is none of them: codes ±1, ±3 … ±(2^W - 1). So codes of
W bits need a container of W + 1: up to 3 bits lie in INT4, up to 7 in int8, and 8 nowhere.
"""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf
import tf_keras

from qat import ranges
from qat.grid import SMALLEST_SCALE, Grid, symmetric_grid
from qat.quantizers.base import GridQuantizer, required, straight_through
from qat.quantizers.rounding import in_float32
from qat.quantizers.uniform import FixedRangeQuantizer


class _OddQuantizer(GridQuantizer):
    """Args and errors as its subclasses say; no state: the grid follows the weights."""

    def __init__(self, *, num_bits: int, channel_axes: tuple[int, ...] | None):
        if num_bits not in range(2, 8):
            raise ValueError(
                f"{type(self).__name__} takes 2 to 7 bits, got {num_bits!r}; its codes are odd, up "
                "to ±(2^bits - 1), and int8 kernels hold ±127"
            )
        self.num_bits = num_bits
        self.channel_axes = None if channel_axes is None else tuple(channel_axes)

    @property
    def container_bits(self) -> int:
        return self.num_bits + 1

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.num_bits - 1

    @abc.abstractmethod
    def _step(self, x: tf.Tensor) -> tf.Tensor:
        """The scale: half the distance of two levels."""

    @abc.abstractmethod
    def _odd(self, x: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """The codes."""

    def _surrogate(self, x: tf.Tensor) -> tf.Tensor:
        """The differentiable function whose gradient the rounding passes on."""
        return x

    def grid(self, weights, inputs=None):
        step = self._step(in_float32(required(inputs, self)))
        zero_point = tf.constant(0.0)
        scale = tf.maximum(step, SMALLEST_SCALE)
        return Grid(scale=scale, zero_point=zero_point, qmin=-self.top, qmax=self.top)

    def codes(self, inputs, weights):
        return self._odd(in_float32(inputs), self.grid(weights, inputs).scale)

    def quantized(self, inputs, training, weights):
        x = in_float32(inputs)
        grid = self.grid(weights, x)
        values = grid.dequantize(self._odd(x, grid.scale))
        return tf.cast(straight_through(self._surrogate(x), values), inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        return {"num_bits": self.num_bits, "channel_axes": self.channel_axes}


@tf_keras.utils.register_keras_serializable("qat")
class DorefaWeightQuantizer(_OddQuantizer):
    """DoReFa weights: `c·(2·round(n·(t/(2·max|t|) + 1/2))/n - 1)`, t = tanh(w), n = 2^W - 1.

    c = sg(max|w|), so that a layer keeps the magnitude that its float weights gave it, or 1. Codes
    `2·round(…) - n`, scale `c/n`. Backward: the rounding passes its gradient on, the rest is
    differentiated, the maximum too: with M = max|t|, at w_m,

        dw = c·(1 - t²)·(g/M - 1[w = w_m]·sign(t)·Σ g·t/M²).

    Args:
        num_bits: W, 2 to 7; one bit is `DorefaBinaryWeightQuantizer`.
        scaled: c = sg(max|w|); False = 1, the paper's, for layers that batch norm follows.
        channel_axes: axes that keep maxima of their own; None = one for the tensor, the paper's.

    Raises:
        ValueError: another width.

    Source: DoReFa-Net arXiv 1606.06160; tensorpack examples/DoReFa-Net/dorefa.py.
    """

    method = "dorefa"

    def __init__(
        self,
        *,
        num_bits: int = 4,
        scaled: bool = True,
        channel_axes: tuple[int, ...] | None = None,
    ):
        super().__init__(num_bits=num_bits, channel_axes=channel_axes)
        self.scaled = scaled

    def _bound(self, x):
        if self.scaled:
            return tf.stop_gradient(ranges.tensor_bound(x, self.channel_axes))
        return tf.constant(1.0)

    def _step(self, x):
        return symmetric_grid(self._bound(x), num_bits=self.container_bits).scale

    def _shape(self, x):
        """t / max|t|, in [-1, 1]."""
        t = tf.tanh(x)
        return t / tf.maximum(ranges.tensor_bound(t, self.channel_axes), SMALLEST_SCALE)

    def _odd(self, x, step):
        level = tf.round((self._shape(x) * 0.5 + 0.5) * float(self.top))
        return 2.0 * level - float(self.top)

    def _surrogate(self, x):
        return self._bound(x) * self._shape(x)

    def get_config(self):
        return {**super().get_config(), "scaled": self.scaled}


@tf_keras.utils.register_keras_serializable("qat")
class StatsqQuantizer(_OddQuantizer):
    """StatsQ weights: `S·(round(n·clip(w/S, -1, 1) - 1/2) + 1/2)/n`, n = 2^(W-1), S = 2·mean|w|.

    The rounded level is at most n - 1, so that there are 2^W of them. Codes `2·round(…) + 1`, scale
    `S/(2n)`. Backward: the identity everywhere; S gets no gradient.

    Args:
        num_bits: W, 2 to 7.
        channel_axes: axes that keep an S of their own; None = one for the tensor.

    Raises:
        ValueError: another width.

    Source: OFQ arXiv 2302.02210; nbasyl/OFQ src/quantization/quantizer/statsq.py.
    """

    method = "statsq"

    def __init__(self, *, num_bits: int = 2, channel_axes: tuple[int, ...] | None = (-1,)):
        super().__init__(num_bits=num_bits, channel_axes=channel_axes)

    def _step(self, x):
        return ranges.mean_magnitude(x, self.channel_axes) / 2.0 ** (self.num_bits - 1)

    def _odd(self, x, step):
        n = 2.0 ** (self.num_bits - 1)
        # n·w/S is w/(2·step), since the powers of two are exact.
        level = tf.clip_by_value(tf.round(x / (2.0 * step) - 0.5), -n, n - 1.0)
        return 2.0 * level + 1.0


@tf_keras.utils.register_keras_serializable("qat")
class DorefaActivationQuantizer(FixedRangeQuantizer):
    """DoReFa activations: `round(n·clip(x, 0, 1))/n`, n = 2^b - 1; straight-through inside [0, 1].

    Args:
        minimum, maximum: the range if not the paper's. Others as `FixedRangeQuantizer`.

    Source: DoReFa-Net arXiv 1606.06160.
    """

    method = "dorefa"

    def __init__(self, *, minimum: float = 0.0, maximum: float = 1.0, **options):
        super().__init__(minimum=minimum, maximum=maximum, **options)
        self.cuts_negatives = minimum >= 0.0
