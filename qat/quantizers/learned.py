"""Uniform quantizers whose grid is trained: LSQ, LSQ+ and PACT.

The step is `unit · gain`: `unit` is the step that calibration found, `gain` starts at 1 and is
trained. So an optimizer that moves every variable by about its learning rate (Adam) changes each
step by the same share, whatever its size; a step of 0.01 and one of 1 need no rates of their own.
A unit of 0 means that nothing was calibrated: then the step follows the tensor, and the first
training step keeps it. A channel or tensor that was all zeros then, or in calibration, has the
smallest unit and is met again: the first training step that sees other values keeps theirs. Until
then activations have the grid of [0, 1] (`qat.grid.affine_grid`).

With plain gradient descent such a step changes by unit² as much as the step itself would.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf
import tf_keras

from qat import ranges
from qat.grid import CONTAINER_TOP, SMALLEST_SCALE, Grid, affine_grid, symmetric_grid
from qat.quantizers.base import range_shape, range_variable, trained_variable
from qat.quantizers.rounding import LearnedGrid, fake_quantize, in_float32
from qat.quantizers.uniform import UniformQuantizer

# A gain that training has pushed below this counts as this: the step stays positive.
SMALLEST_GAIN = 2.0**-10


@tf_keras.utils.register_keras_serializable("qat")
class LsqQuantizer(UniformQuantizer):
    """Learned step size: `s·(clip(round(x/s) + z, qmin, qmax) - z)`, s trained.

    Backward: `dx = g` inside, 0 outside; `ds = κ·Σ g·(round(x/s) - x/s inside, code - z outside)`,
    κ = 1/√(N·Qp), N = elements that share the step (of one example, for activations), Qp = the
    highest level. Before calibration s = 2·mean|x|/√Qp. Symmetric grids have z = 0; affine ones
    the z that calibration found (qmin after a ReLU), kept fixed. `method` is the backward rule's
    name unless that is "ste".

    Args:
        As `UniformQuantizer`; num_bits 2 to 8.

    Raises:
        ValueError: another width.

    Source: LSQ arXiv 1902.08153.
    """

    def __init__(self, *, num_bits: int = 4, **options):
        if num_bits not in range(2, 9):
            raise ValueError(f"{type(self).__name__} takes 2 to 8 bits, got {num_bits!r}")
        super().__init__(num_bits=num_bits, **options)

    @property
    def method(self) -> str:
        return "lsq" if self.backward.rule == "ste" else self.backward.rule

    @property
    def codes_range(self) -> tuple[int, int]:
        """(qmin, qmax)."""
        if self.symmetric:
            qmax = 2 ** (self.num_bits - 1) - 1
            return (-qmax if self.narrow_range else -qmax - 1), qmax
        return CONTAINER_TOP - (2**self.num_bits - 1), CONTAINER_TOP

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        shape = range_shape(tensor_shape, self.channel_axes)
        per_example = tensor_shape if self.symmetric else tensor_shape[1:]
        sharing = math.prod(n or 1 for n in per_example) / math.prod(shape)
        self.gradient_scale = 1.0 / math.sqrt(sharing * self._highest_level)
        made = {
            "unit": range_variable(layer, f"{name}_unit", shape),
            "gain": trained_variable(
                layer, f"{name}_gain", shape, "ones", regularizer=self._regularizer()
            ),
        }
        if not self.symmetric:
            made["zero_point"] = range_variable(layer, f"{name}_zero_point", shape)
        return made

    def set_range(self, weights, minimum, maximum):
        if self.symmetric:
            bound = tf.maximum(-minimum, maximum)
            grid = symmetric_grid(bound, num_bits=self.num_bits, narrow_range=self.narrow_range)
        else:
            grid = affine_grid(minimum, maximum, num_bits=self.num_bits)
            weights["zero_point"].assign(grid.zero_point)
        only_zeros = tf.logical_and(tf.equal(minimum, 0.0), tf.equal(maximum, 0.0))
        self._keep(weights, tf.where(only_zeros, SMALLEST_SCALE, grid.scale))
        return True

    def range(self, weights, inputs):
        grid = self.grid(weights, inputs)
        return grid.lowest, grid.highest

    def grid(self, weights, inputs=None):
        step, zero_point = self._step_and_zero_point(weights, inputs)
        qmin, qmax = self.codes_range
        return Grid(scale=step, zero_point=zero_point, qmin=qmin, qmax=qmax)

    def quantized(self, inputs, training, weights):
        detached = tf.stop_gradient(in_float32(inputs))
        if training:
            self._start(weights, detached)
        return fake_quantize(
            inputs,
            self.grid(weights, None if training else detached),
            backward=self.backward,
            learned=self._learned(weights),
        )

    @property
    def _highest_level(self) -> int:
        """Qp of the paper: levels above zero."""
        qmin, qmax = self.codes_range
        return qmax if self.symmetric else qmax - qmin

    def _learned(self, weights) -> LearnedGrid:
        return LearnedGrid(gradient_scale=self.gradient_scale)

    def _regularizer(self):
        return None

    def _step_and_zero_point(self, weights, inputs) -> tuple[tf.Tensor, tf.Tensor]:
        def stored():
            unit = tf.convert_to_tensor(weights["unit"])
            if not self.symmetric:
                unit = tf.where(unit <= SMALLEST_SCALE, 1.0 / self._highest_level, unit)
            step = unit * _positive(tf.convert_to_tensor(weights["gain"]))
            # Replicas that started on different data average their zero points.
            zero_point = tf.round(tf.convert_to_tensor(weights.get("zero_point", 0.0)))
            return tf.maximum(step, SMALLEST_SCALE), zero_point

        if inputs is None:
            if tf.executing_eagerly() and not _is_set(weights):
                raise ValueError(
                    "no step was set yet: train, or call qat.calibrate(model, dataset)"
                )
            return stored()
        return tf.cond(_is_set(weights), stored, lambda: self._estimate(inputs))

    def _estimate(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The paper's first step, and a zero point for tensors with or without negative values."""
        magnitude = ranges.mean_magnitude(inputs, self.channel_axes)
        step = tf.maximum(2.0 * magnitude / math.sqrt(self._highest_level), SMALLEST_SCALE)
        if self.symmetric:
            return step, tf.constant(0.0)
        lowest = float(self.codes_range[0])
        middle = lowest + 2.0 ** (self.num_bits - 1)
        below_zero = ranges.tensor_range(inputs, self.channel_axes)[0] < 0.0
        return step, tf.where(below_zero, middle, lowest)

    def _start(self, weights, inputs: tf.Tensor) -> None:
        """Keeps the estimate where only zeros were seen, or nothing.

        The variables change outside of the cond, because replicas cannot average inside. Elsewhere
        they are added 0, which averages leave at 0.
        """
        unit = tf.convert_to_tensor(weights["unit"])
        zero_point = tf.convert_to_tensor(weights.get("zero_point", 0.0))
        missing = unit <= SMALLEST_SCALE

        def first():
            step, zero = self._estimate(inputs)
            return tf.where(missing, step - unit, 0.0), tf.where(missing, zero - zero_point, 0.0)

        def nothing():
            return tf.zeros_like(unit), tf.zeros_like(unit)

        step, zero = tf.cond(tf.reduce_any(missing), first, nothing)
        weights["unit"].assign_add(step)
        if not self.symmetric:
            weights["zero_point"].assign_add(zero)

    def _keep(self, weights, step: tf.Tensor) -> None:
        weights["unit"].assign(step)
        weights["gain"].assign(tf.ones_like(weights["gain"]))


@tf_keras.utils.register_keras_serializable("qat")
class LsqPlusQuantizer(LsqQuantizer):
    """LSQ with a learned offset β, the real value of qmin: activations that go below zero.

    Forward: as LSQ with `z = clip(round(qmin - β/s), qmin, qmax)`, so that 0 stays a code.
    Backward: `ds = κ·Σ g·(round(x/s) - x/s inside, code - qmin outside)`, `dβ = κ·Σ g` outside.
    β = `unit · (qmin - z₀ + (qmax - qmin) · shift)`, z₀ the first z and shift trained: β moves by a
    share of the first range.

    Source: LSQ+ arXiv 2004.09576.
    """

    method = "lsqplus"

    def __init__(self, *, symmetric: bool = False, **options):
        super().__init__(symmetric=symmetric, **options)
        if symmetric or self.channel_axes is not None:
            raise ValueError("LsqPlusQuantizer has an offset: for activations, per tensor")

    def build(self, tensor_shape, name, layer):
        made = super().build(tensor_shape, name, layer)
        made["shift"] = trained_variable(layer, f"{name}_shift", [], "zeros")
        return made

    def _learned(self, weights):
        start = tf.round(tf.convert_to_tensor(weights["zero_point"]))
        offset = self._offset(weights, weights["unit"], start)
        return LearnedGrid(gradient_scale=self.gradient_scale, keeps_lowest=True, offset=offset)

    def _offset(self, weights, unit, start) -> tf.Tensor:
        """β."""
        return unit * (self.codes_range[0] - start + self._highest_level * weights["shift"])

    def _step_and_zero_point(self, weights, inputs):
        step, start = super()._step_and_zero_point(weights, inputs)
        unit = tf.where(_is_set(weights), weights["unit"], step)
        offset = self._offset(weights, unit, start)
        qmin, qmax = self.codes_range
        zero_point = tf.stop_gradient(tf.round(float(qmin) - offset / step))
        return step, tf.clip_by_value(zero_point, float(qmin), float(qmax))

    def _keep(self, weights, step):
        super()._keep(weights, step)
        weights["shift"].assign(0.0)


@tf_keras.utils.register_keras_serializable("qat")
class PactQuantizer(LsqQuantizer):
    """Learned clipping: `clip(x, 0, α)` rounded to 2^b - 1 steps of α, α trained.

    Backward: `dx = g` where 0 <= x < α, else 0; `dα = Σ g` over x >= α.
    α = `(qmax - qmin)·unit·gain`.

    Args:
        l2: weight of α² in the loss. Others as `LsqQuantizer`; for tensors that a ReLU precedes.

    Source: PACT arXiv 1805.06085. Before calibration α is 6 (the paper's 6 to 8).
    """

    method = "pact"
    cuts_negatives = True

    def __init__(self, *, symmetric: bool = False, l2: float = 0.0, **options):
        super().__init__(symmetric=symmetric, **options)
        if symmetric or self.channel_axes is not None:
            raise ValueError("PactQuantizer clips at zero: for activations, per tensor")
        if not 0.0 <= l2 < math.inf:
            raise ValueError(f"l2 must be a finite number of at least 0, got {l2!r}")
        self.l2 = l2

    def build(self, tensor_shape, name, layer):
        self._unit = None
        made = super().build(tensor_shape, name, layer)
        self._unit = made["unit"]
        self.gradient_scale = 1.0
        return made

    def set_range(self, weights, minimum, maximum):
        return super().set_range(weights, tf.zeros_like(maximum), maximum)

    def get_config(self):
        return {**super().get_config(), "l2": self.l2}

    def _learned(self, weights):
        return LearnedGrid(inside=False, keeps_lowest=True)

    def _regularizer(self):
        if not self.l2:
            return None

        def of_alpha(gain):  # the levels of the moment, which GradualBits changes
            return self.l2 * tf.reduce_sum(tf.square(gain * self._unit * self._highest_level))

        return of_alpha

    def _estimate(self, inputs):
        return tf.constant(6.0 / self._highest_level), tf.constant(float(self.codes_range[0]))


def _is_set(weights) -> tf.Tensor:
    # A NaN is a unit too, so that diverged training shows.
    return tf.reduce_any(tf.not_equal(weights["unit"], 0.0))


@tf.custom_gradient
def _positive(gain: tf.Tensor) -> tf.Tensor:
    """At least SMALLEST_GAIN; the gradient passes, so that training can raise it again."""
    return tf.maximum(gain, SMALLEST_GAIN), lambda upstream: upstream
