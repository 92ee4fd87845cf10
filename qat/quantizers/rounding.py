"""Fake quantization: rounding to a grid forward, a straight-through estimator backward.

With v = x / scale, z the zero point, y = (code - z)·scale the fake-quantized x, and g the upstream
gradient:

    rule   dx where qmin - z <= v <= qmax - z (else 0)         strength        source
    ste    g                                                                   1308.3432
    ewgs   g·(1 + δ·sign(g)·(v - round(v)) / (qmax - qmin))    δ, 1e-3         2104.00903
    dsq    g·½·a·k·(1 - tanh²(k·(v - floor(v) - ½))),          α, 0.4          1908.05033
           a = 1/(1 - α), k = ln(2/α - 1)

Behind a ReLU (`qat.quantizers.behind_relu`) dx is the gradient at the ReLU's input, of both.
A learned scale gets Σ κ·g·d over the elements that share it (LSQ, arXiv 1902.08153, equation 3):
d = round(v) - v inside, `code - fixed_code` outside: the scale stretches the grid around the code
that keeps its real value. PACT's is learned from outside alone, to which x = α belongs (1805.06085,
equation 3). A learned offset gets Σ κ·g over the elements outside (LSQ+, 2004.09576).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import tensorflow as tf

from qat import ste
from qat.grid import Grid
from qat.quantizers.base import straight_through
from qat.quantizers.behind_relu import Relu, relu_in_front

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
    # Tensors: neither Python numbers nor variables below, in eager mode either.
    scale, zero_point = (tf.convert_to_tensor(t, tf.float32) for t in (grid.scale, grid.zero_point))
    grid = dataclasses.replace(grid, scale=scale, zero_point=zero_point)
    relu = relu_in_front(x) if clipped else None
    if relu is not None and learned is not None:
        # Where the ReLU saturates it has no gradient, but scale and offset have one.
        saturates = learned.keeps_lowest or relu.limit < math.inf
        relu = None if saturates else relu
    if relu is not None:  # its gradient is left to the quantizer's
        x = straight_through(relu.inputs, x)
    round_on = _on_given_grid if learned is None else _on_learned_grid(learned)
    return tf.cast(round_on(in_float32(x), grid, backward, clipped, relu), x.dtype)


def _on_given_grid(x32, grid: Grid, backward: Backward, clipped: bool, relu: Relu | None):
    @tf.custom_gradient
    def forward(x32):
        # The gradient keeps this and not x, whose memory becomes that of the values.
        mask = [_inside(x32, grid, relu)] if clipped else []
        with tf.control_dependencies(mask):
            values = grid.nearest(x32, negatives=relu is None)

        def gradient(upstream):
            dx = backward(upstream, x32 / grid.scale, grid.qmax - grid.qmin)
            return _selected(mask[0], dx) if clipped else dx

        return values, gradient

    return forward(x32)


def _on_learned_grid(learned: LearnedGrid):
    offset = tf.convert_to_tensor(0.0 if learned.offset is None else learned.offset, tf.float32)

    def round_on(x32, grid: Grid, backward: Backward, clipped: bool, relu: Relu | None):
        @tf.custom_gradient
        def forward(x32, scale, offset):
            values = grid.nearest(x32, negatives=relu is None)

            def gradients(upstream):
                with tf.control_dependencies([upstream]):  # or all masks were made beforehand
                    mask = _inside(x32, grid, relu, top=learned.inside) if clipped else None
                inside = functools.partial(_selected, mask) if clipped else tf.identity
                fixed = grid.lowest if learned.keeps_lowest else 0.0
                moved = values - fixed - inside((x32 if learned.inside else values) - fixed)
                kappa = learned.gradient_scale
                d_scale = kappa / scale * _summed(upstream * moved, scale)
                d_offset = kappa * _summed(upstream - inside(upstream), offset)
                # Before the layers below, or x stays in memory until the last of them is done.
                with tf.control_dependencies([d_scale]):
                    dx = backward(upstream, x32 / scale, grid.qmax - grid.qmin)
                    return inside(dx), d_scale, d_offset

            return values, gradients

        return forward(x32, grid.scale, offset)

    return round_on


def _inside(x: tf.Tensor, grid: Grid, relu: Relu | None, *, top: bool = True) -> tf.Tensor:
    """Where x passes its gradient on, bool; `top`: the highest real number is inside too."""
    if relu is None:
        below = x <= grid.highest if top else x < grid.highest
        return tf.logical_and(x >= grid.lowest, below)
    # Behind a ReLU no x lies below 0, and at its ends the ReLU has no gradient.
    highest = tf.minimum(grid.highest, np.nextafter(np.float32(relu.limit), np.float32(0.0)))
    return tf.logical_and(x > 0.0, x <= highest)


def _selected(mask: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """The values where the mask is true, else 0: one pass, in memory that it may reuse.

    `tf.where` allows for shapes that differ, which is slow.
    """
    return tf.raw_ops.Select(condition=mask, x=values, y=_zeros(values))


def _zeros(like: tf.Tensor) -> tf.Tensor:
    """Zeros of the tensor's shape, in a graph the same ones for all tensors of that shape.

    TensorFlow makes constants of zeros of a known shape, which stay in memory for the whole step.
    """
    if tf.executing_eagerly() or not like.shape.is_fully_defined():
        return tf.zeros_like(like)
    graph, key = like.graph, (like.device, like.dtype, *like.shape)
    made = graph.get_collection_ref("qat_zeros")
    for known, zeros in made:
        if known == key and zeros.graph is graph:
            return zeros
    with tf.control_dependencies(None):
        made.append((key, tf.zeros(like.shape, like.dtype)))
    return made[-1][1]


def in_float32(x: tf.Tensor | tf.Variable) -> tf.Tensor:
    """x as float32; a variable under mixed precision is read before Keras rounds it to 16 bits."""
    return tf.cast(getattr(x, "_variable", x), tf.float32)


def _summed(pull: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The sum over all elements that share an entry of `like`."""
    if like.shape.rank == 0:
        return tf.reduce_sum(pull)
    missing = pull.shape.rank - like.shape.rank
    shape = [1] * missing + like.shape.as_list()
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tf.reshape(tf.reduce_sum(pull, axes), like.shape)
