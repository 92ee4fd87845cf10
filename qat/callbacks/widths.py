"""Gradual bit reduction: the network learns its recipe's widths in steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from qat.callbacks.quantized import uniform_quantizers
from qat.callbacks.scheduled import Scheduled, require_share, retrace
from qat.grid import SMALLEST_SCALE
from qat.quantizers import LsqQuantizer, PactQuantizer, UniformQuantizer

LEGAL_BITS = range(2, 9)


class GradualBits(Scheduled):
    """Trains uniform quantizers at more bits first, and at their own width from then on.

    `GradualBits([(8, 0.2), (4, 0.5)])`: 8 bits for the first fifth of the training, 4 bits until
    half of it, their own then; quantizers that are wider keep their own all along. When the width
    changes, a learned step is rescaled so that the highest level stays where it is (of affine
    grids: the whole range); min-max ranges stay of themselves. Grids that are not uniform stay.

    Until training is over the model, and a file of it, has the widths of the moment; `finish` ends
    a training that was given up.

    Args:
        stages: (bits, share of the training at which the stage ends), bits falling, shares rising.
        total_steps: as `Scheduled`.

    Raises:
        ValueError: stages that are none.

    Source: Zhuang et al., arXiv 1711.00205 (progressive quantization).
    """

    def __init__(self, stages: Sequence[tuple[int, float]], *, total_steps: int | None = None):
        super().__init__(total_steps=total_steps)
        self.stages = require_stages(stages)
        self._widened: list[_Widened] = []
        self._bits = 0

    def make_state(self, model):
        self.finish()
        self._widened = [_Widened.of(*found) for found in uniform_quantizers(model)]
        # The width that the learned steps are scaled for; 0 = everyone's own.
        return tf.train.Checkpoint(bits=tf.Variable(0, trainable=False))

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._bits = int(
            self.state.bits.numpy()
        )  # a checkpoint's, with steps that are scaled for it
        for each in self._widened:
            each.set_width(self._bits)
        retrace(self.model)

    def at_step(self, step):
        stages = (bits for bits, until in self.stages if step < self.first_step(until))
        self._change(next(stages, 0))

    def finish(self):
        self._change(0)

    def _change(self, bits: int) -> None:
        if bits == self._bits:
            return
        for each in self._widened:
            each.rescale(*each.set_width(bits))
        self._bits = bits
        self.state.bits.assign(bits)
        retrace(self.model)


def require_stages(stages: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The stages of a gradual bit reduction.

    Raises:
        ValueError: no stage, illegal widths or shares, or not in order.
    """
    stages = tuple((bits, require_share("a stage's end", until)) for bits, until in stages)
    bits, ends = [stage[0] for stage in stages], [stage[1] for stage in stages]
    in_order = sorted(set(bits), reverse=True) == bits and sorted(set(ends)) == ends
    if not stages or not in_order or any(b not in LEGAL_BITS for b in bits) or ends[-1] >= 1.0:
        raise ValueError(
            "stages are (bits, end), bits falling from 8 to 2, ends rising below 1, e.g. "
            f"[(8, 0.2), (4, 0.5)]; got {list(stages)}"
        )
    return stages


@dataclasses.dataclass(frozen=True)
class _Widened:
    """A quantizer with its variables, its own width and, if its step is learned, its own κ."""

    quantizer: UniformQuantizer
    variables: dict[str, Any]
    own_bits: int
    own_levels: int
    own_gradient_scale: float | None

    @classmethod
    def of(cls, quantizer: UniformQuantizer, variables: dict[str, Any]) -> _Widened:
        learned = isinstance(quantizer, LsqQuantizer)
        return cls(
            quantizer=quantizer,
            variables=variables,
            own_bits=quantizer.num_bits,
            own_levels=_levels(quantizer) if learned else 0,
            own_gradient_scale=quantizer.gradient_scale if learned else None,
        )

    def set_width(self, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sets the width to `bits` or its own; returns the codes' ranges before and after."""
        if self.own_gradient_scale is None:
            self.quantizer.num_bits = max(bits, self.own_bits)
            return (0, 0), (0, 0)
        before = self.quantizer.codes_range
        self.quantizer.num_bits = max(bits, self.own_bits)
        if not isinstance(self.quantizer, PactQuantizer):  # κ = 1/√(N·levels); PACT's is 1
            share = self.own_levels / _levels(self.quantizer)
            self.quantizer.gradient_scale = self.own_gradient_scale * math.sqrt(share)
        return before, self.quantizer.codes_range

    def rescale(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Makes the learned step and zero point those of the new codes.

        The step is `unit · gain`; the unit changes, so that gain, its optimizer's slots and what is
        measured in units of the range (PACT's α, LSQ+'s offset) stay.
        """
        if self.own_gradient_scale is None or before == after:
            return
        old, new = (_levels_of(codes, self.quantizer.symmetric) for codes in (before, after))
        unit = self.variables["unit"]
        # Of zeros alone, a unit stays the smallest: it is still to be found.
        unit.assign(tf.where(unit <= SMALLEST_SCALE, unit, unit * (old / new)))
        if not self.quantizer.symmetric:
            zero_point = self.variables["zero_point"]
            moved = tf.round(after[0] + (zero_point - before[0]) * (new / old))
            zero_point.assign(tf.clip_by_value(moved, float(after[0]), float(after[1])))


def _levels(quantizer: LsqQuantizer) -> int:
    return _levels_of(quantizer.codes_range, quantizer.symmetric)


def _levels_of(codes: tuple[int, int], symmetric: bool) -> int:
    """Levels above zero, or above the lowest of an affine grid."""
    qmin, qmax = codes
    return qmax if symmetric else qmax - qmin
