"""Weights that flip between two integers: held back by the loss, or pinned.

The straight-through estimator pulls a weight across a rounding threshold and back, again and again:
the network that is trained is then never the one that is exported. Both methods are those of
"Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086, with the schedules of
its code, Qualcomm-AI-research/oscillations-qat. They apply to trainable kernels that are rounded to
the nearest point of a uniform grid (min-max, LSQ).
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from qat.callbacks.quantized import Kernel, rounded_kernels
from qat.callbacks.scheduled import Scheduled, cosine, hook_loss, require_share, unhook_loss

# Before this share of the training neither method acts: weights first find their place.
START = 0.25
AGGREGATIONS = ("filter", "sum")


class Dampening(Scheduled):
    """Adds `λ·Σ (sg(ŵ) - clip(w, lowest, highest))²` to the training loss: pulls weights to ŵ.

    ŵ is w rounded to its grid; the grid gets no gradient. λ rises along a cosine from 0 (at
    `start`) to `strength` (at the end). The reported "loss" stays the one the model was compiled
    with.

    Args:
        strength: λ at the end; the paper's for 3 and 4 bits is 0.1.
        aggregation: "filter" divides each kernel's sum by the size of a filter, as the runs of the
            paper's code do; "sum" is the paper's equation.
        start: share of the training. max_bits: wider kernels are left alone.
        total_steps: as `Scheduled`.

    Raises:
        ValueError: a negative strength, an unknown aggregation or an illegal share.
    """

    def __init__(
        self,
        strength: float = 0.1,
        *,
        aggregation: str = "filter",
        start: float = START,
        max_bits: int = 8,
        total_steps: int | None = None,
    ):
        super().__init__(total_steps=total_steps)
        if not 0.0 <= strength < float("inf"):
            raise ValueError(f"strength must be a finite number of at least 0, got {strength!r}")
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
        self.strength = strength
        self.aggregation = aggregation
        self.start = require_share("start", start)
        self.max_bits = max_bits
        self._weight: tf.Variable | None = None
        self._term = None

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self._term is None:
            kernels = rounded_kernels(self.model, self.max_bits)
            weight = tf.Variable(0.0, trainable=False, name="dampening")
            self._weight = weight
            self._term = lambda: weight * self.distance(kernels)
            hook_loss(self.model, term=self._term)

    def at_step(self, step):
        self._weight.assign(cosine(step / self.total, self.start, 0.0, self.strength))

    def finish(self):
        if self._term is not None:
            unhook_loss(self.model, self._term)
            self._term = None

    def distance(self, kernels: list[Kernel]) -> tf.Tensor:
        """The sum that λ weighs, a scalar."""
        total = tf.constant(0.0)
        for kernel in kernels:
            w, grid = tf.cast(kernel.weight, tf.float32), kernel.grid()
            rounded = tf.stop_gradient(grid.dequantize(grid.quantize(w)))
            lowest, highest = tf.stop_gradient(grid.lowest), tf.stop_gradient(grid.highest)
            squares = tf.reduce_sum(tf.square(rounded - tf.clip_by_value(w, lowest, highest)))
            total += squares / kernel.filter_size if self.aggregation == "filter" else squares
        return total


@dataclasses.dataclass(frozen=True)
class _Tracked:
    """A kernel and what is known of its integers; variables of its shape."""

    kernel: Kernel
    codes: tf.Variable
    direction: tf.Variable
    frequency: tf.Variable
    average: tf.Variable
    frozen: tf.Variable

    @classmethod
    def of(cls, kernel: Kernel) -> _Tracked:
        codes = kernel.grid().quantize(kernel.weight)
        start = {"codes": codes, "average": codes}
        start.update(direction=tf.zeros_like(codes), frequency=tf.zeros_like(codes))
        made = {name: tf.Variable(value, trainable=False) for name, value in start.items()}
        frozen = tf.Variable(tf.zeros_like(codes, tf.bool), trainable=False)
        return cls(kernel=kernel, frozen=frozen, **made)

    def update(self, threshold: tf.Tensor, momentum: float) -> None:
        """Counts this step's flips, freezes, and pins what is frozen."""
        grid, weight = self.kernel.grid(), self.kernel.weight
        codes = tf.where(self.frozen, self.codes, grid.quantize(weight))
        change = tf.sign(codes - self.codes)
        flipped = tf.cast(self.direction * change < 0.0, tf.float32)
        self.frequency.assign(momentum * flipped + (1.0 - momentum) * self.frequency)
        self.direction.assign(tf.where(change == 0.0, self.direction, change))
        freezing = tf.logical_and(self.frequency > threshold, tf.logical_not(self.frozen))
        self.codes.assign(tf.where(freezing, tf.round(self.average), codes))
        self.average.assign(momentum * codes + (1.0 - momentum) * self.average)
        self.frozen.assign(tf.logical_or(self.frozen, freezing))
        pinned = tf.cast(grid.dequantize(self.codes), weight.dtype)
        weight.assign(tf.where(self.frozen, pinned, weight))


class IterativeFreezing(Scheduled):
    """Pins weights whose integers flip too often to the integer that they had most of the time.

    After each step, with z = a weight's integer and m = `momentum`: it flipped if z moved against
    its last move; `f ← m·flipped + (1 - m)·f`; if `f > threshold`, the weight is held for good at
    `round(a)·scale`, where `a ← m·z + (1 - m)·a` averages its integers. The threshold falls along a
    cosine from `first_threshold` (at `start`; nothing is frozen before) to `threshold` (at the
    end). The scale may go on learning: the weight follows it.

    Not together with `GradualBits`, which changes the integers; steps_per_execution must be 1.

    Args:
        threshold: of f at the end, in (0, 1]; the paper's is 0.01 to 0.011.
        first_threshold: at `start`; the paper's is 0.1. momentum: m.
        start: share of the training. max_bits: wider kernels are left alone.
        total_steps: as `Scheduled`.

    Raises:
        ValueError: a threshold, momentum or share outside its range.
    """

    def __init__(
        self,
        threshold: float = 0.01,
        *,
        first_threshold: float = 0.1,
        momentum: float = 0.01,
        start: float = START,
        max_bits: int = 4,
        total_steps: int | None = None,
    ):
        super().__init__(total_steps=total_steps)
        for name, value in (("threshold", threshold), ("momentum", momentum)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
        if not threshold <= first_threshold <= 1.0:
            raise ValueError(
                f"first_threshold must lie between threshold and 1, got {first_threshold!r}"
            )
        self.threshold = threshold
        self.first_threshold = first_threshold
        self.momentum = momentum
        self.start = require_share("start", start)
        self.max_bits = max_bits
        self._tracked: list[_Tracked] = []
        self._update = None

    def make_state(self, model):
        tracked = [_Tracked.of(kernel) for kernel in rounded_kernels(model, self.max_bits)]

        def update(threshold):
            for each in tracked:
                each.update(threshold, self.momentum)

        self._tracked, self._update = tracked, tf.function(update)
        names = [field.name for field in dataclasses.fields(_Tracked)[1:]]
        return tf.train.Checkpoint(
            **{f"{name}_{i}": getattr(t, name) for i, t in enumerate(tracked) for name in names}
        )

    def on_train_batch_end(self, batch, logs=None):
        share = (self._epoch_start + batch + 1) / self.total
        threshold = cosine(share, self.start, self.first_threshold, self.threshold)
        self._update(tf.constant(threshold if share > self.start else float("inf")))

    @property
    def frozen_share(self) -> float:
        """The share of the tracked weights that are frozen; 0 if none is tracked."""
        masks = [each.frozen.numpy() for each in self._tracked]
        count = sum(mask.size for mask in masks)
        return sum(int(mask.sum()) for mask in masks) / count if count else 0.0
