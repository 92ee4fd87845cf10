"""Fake quantization: rounding to a grid forward, a straight-through estimator backward.

With v = x / scale and y = (code - zero_point)·scale the fake-quantized x, g the upstream gradient:

    rule   dx where qmin <= code <= qmax (else 0)              strength        source
    ste    g                                                                   1308.3432
    ewgs   g·(1 + δ·sign(g)·(v - round(v)) / (qmax - qmin))    δ, 1e-3         2104.00903
    dsq    g·½·a·k·(1 - tanh²(k·(v - floor(v) - ½))),          α, 0.4          1908.05033
           a = 1/(1 - α), k = ln(2/α - 1)

A learned scale gets Σ κ·g·d over the elements that share it (LSQ, arXiv 1902.08153, equation 3):
d = round(v) - v inside, `code - fixed_code` outside: the scale stretches the grid around the code
that keeps its real value. A learned offset gets Σ κ·g over the elements outside (LSQ+, 2004.09576).
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from qat import ste
from qat.grid import Grid

# The rules, each with the default of its strength.
RULES: dict[str, float | None] = {"ste": None, "ewgs": 1e-3, "dsq": 0.4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backward:
    """The gradient that x gets inside the grid.

    Args:
        rule: "ste", "ewgs" or "dsq". strength: EWGS's δ >= 0, DSQ's α in (0, 0.5); None = default.

    Raises:
        ValueError: an unknown rule, or a strength that it does not take.
    """

    rule: str = "ste"
    strength: float | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"unknown backward {self.rule!r}; choose from {', '.join(RULES)}")
        if self.strength is None:
            object.__setattr__(self, "strength", RULES[self.rule])
            return
        high = {"ste": 0.0, "ewgs": math.inf, "dsq": 0.5}[self.rule]
        legal = isinstance(self.strength, int | float) and 0.0 <= self.strength < high
        if not legal or (self.rule == "dsq" and not self.strength):
            raise ValueError(
                f"backward {self.rule!r} takes no strength {self.strength!r}; ewgs takes one of at "
                "least 0, dsq one in (0, 0.5), ste none"
            )

    def __call__(self, upstream: tf.Tensor, v: tf.Tensor, levels: int) -> tf.Tensor:
        """The gradient of x where it lies inside: v = x / scale, levels = qmax - qmin."""
        if self.rule == "ewgs":
            error = (v - tf.round(v)) / float(levels)
            return upstream * (1.0 + self.strength * tf.sign(upstream) * error)
        if self.rule == "dsq":
            return upstream * ste.ROUND_SURROGATES["dsq"](v, alpha=self.strength)
        return upstream


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedGrid:
    """How the grid's scale (and offset) learn.

    Attributes:
        gradient_scale: κ; LSQ's is 1/√(N·Qp).
        inside: whether the rounding error inside the grid counts (LSQ) or not (PACT).
        keeps_lowest: the scale stretches the grid around qmin (PACT, LSQ+), else around zero_point.
        offset: real value of qmin, if it is learned too (LSQ+); scalar float32, differentiable.
    """

    gradient_scale: float = 1.0
    inside: bool = True
    keeps_lowest: bool = False
    offset: tf.Tensor | None = None


def fake_quantize(
    x: tf.Tensor,
    grid: Grid,
    *,
    clipped: bool = True,
    backward: Backward | None = None,
    learned: LearnedGrid | None = None,
) -> tf.Tensor:
    """Rounds x to the grid and back; gradients as the module's table says.

    Forward `(clip(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`. Inside means
    that x lies between the reals of qmin and qmax, both included. Computed in float32, returned in
    x's dtype.

    Args:
        clipped: some x may lie outside. If the grid was made from x itself none does, and a
            comparison could only lose the largest one to rounding.
        backward: x's gradient; None = plain straight-through.
        learned: None = the grid gets no gradient. `grid.scale` must be differentiable then.

    Source: tensorflow/core/kernels/fake_quant_ops_functor.h (the FakeQuant kernels).
    """
    backward = backward or Backward()
    offset = 0.0 if learned is None or learned.offset is None else learned.offset
    # Tensors: in eager mode the function below gets its arguments as they are.
    grid_tensors = [tf.convert_to_tensor(x, tf.float32) for x in (grid.scale, grid.zero_point)]

    @tf.custom_gradient
    def forward(x32, scale, zero_point, offset):
        lowest = (float(grid.qmin) - zero_point) * scale
        highest = (float(grid.qmax) - zero_point) * scale

        def gradients(upstream):
            v = x32 / scale
            slope = backward(upstream, v, grid.qmax - grid.qmin)
            inside = None
            if clipped:
                inside = tf.logical_and(x32 >= lowest, x32 <= highest)
                slope = tf.where(inside, slope, tf.zeros_like(slope))
            if learned is None:
                return slope, None, None, None
            pulls = _pulls(upstream * learned.gradient_scale, v, inside, zero_point, grid, learned)
            return (slope, _summed(pulls[0], scale), None, _summed(pulls[1], offset))

        return grid.dequantize(grid.quantize(x32)), gradients

    offset = tf.convert_to_tensor(offset, tf.float32)
    return tf.cast(forward(in_float32(x), *grid_tensors, offset), x.dtype)


def in_float32(x: tf.Tensor | tf.Variable) -> tf.Tensor:
    """x as float32; a variable under mixed precision is read before Keras rounds it to 16 bits."""
    return tf.cast(getattr(x, "_variable", x), tf.float32)


def _pulls(upstream, v, inside, zero_point, grid: Grid, learned: LearnedGrid):
    """What each element adds to the gradients of scale and offset."""
    rounding = tf.round(v) - v if learned.inside else tf.zeros_like(v)
    if inside is None:
        return upstream * rounding, tf.zeros_like(v)
    codes = tf.clip_by_value(tf.round(v) + zero_point, float(grid.qmin), float(grid.qmax))
    fixed = float(grid.qmin) if learned.keeps_lowest else zero_point
    outside = tf.where(inside, tf.zeros_like(v), upstream)
    return tf.where(inside, upstream * rounding, outside * (codes - fixed)), outside


def _summed(pull: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The sum over all elements that share an entry of `like`."""
    if like.shape.rank == 0:
        return tf.reduce_sum(pull)
    missing = pull.shape.rank - like.shape.rank
    shape = [1] * missing + like.shape.as_list()
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tf.reshape(tf.reduce_sum(pull, axes), like.shape)
