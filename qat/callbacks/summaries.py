"""TensorBoard curves of what quantization does to a network that is being trained."""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf
import tf_keras

from qat.batches import inputs_and_labels
from qat.callbacks.quantized import grid_kernels
from qat.canonical import functional
from qat.forward import forward, infer
from qat.grid import Grid
from qat.layers import FakeQuantize
from qat.quantizers import GridQuantizer


class QuantizationSummaries(tf_keras.callbacks.Callback):
    """Writes, twice an epoch or less often, for every quantized kernel and activation:

    - `lowest`, `highest`: the range that its grid covers; `step`: the grid's (mean over channels);
    - `levels_used`: the share of the grid's levels that some value takes; `clipped`: the share of
      values outside the range; for activations on one batch;
    - `flips`: the share of a kernel's integers that one training step changes;
    - histograms of the integers (`codes`) and, with a step per channel, of the steps.

    A model without quantizers of ours gets no curves. The batch runs once for each writing.

    Args:
        log_dir: TensorBoard's; None = nothing is written, on machines that help a chief, whose
            variables they have to read together. data: batches of x or (x, y); the first is taken.
        times: an epoch. least_steps: from one writing to the next, in short epochs.
        steps_per_epoch: None = what Keras says.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike | None,
        data: tf.data.Dataset,
        times: int = 2,
        *,
        least_steps: int = 100,
        steps_per_epoch: int | None = None,
    ):
        super().__init__()
        self._supports_tf_logs = True
        if times < 1:
            raise ValueError(f"times is a whole number of at least 1, got {times!r}")
        self.log_dir = log_dir
        self.data = data
        self.times = times
        self.least_steps = least_steps
        self.steps_per_epoch = steps_per_epoch
        self._writer = None

    def on_train_begin(self, logs=None):
        steps = self.steps_per_epoch or self.params.get("steps") or 1
        self._every = max(1, self.least_steps, steps // self.times)
        self._step = int(self.model.optimizer.iterations.numpy())
        self._kernels = grid_kernels(self.model)
        self._sites = [la for la in self.model.submodules if isinstance(la, FakeQuantize)]
        self._before: dict[str, np.ndarray] | None = None
        if (self._kernels or self._sites) and self._writer is None:
            helps = self.log_dir is None
            make = tf.summary.create_noop_writer if helps else tf.summary.create_file_writer
            self._writer = make() if helps else make(os.fspath(self.log_dir))
            batch = next(iter(self.data))
            self._batch = inputs_and_labels(self.model, batch)[0]
            self._observed = tf.function(self._run)

    def on_train_batch_begin(self, batch, logs=None):
        if self._writer is not None and self._step % self._every == 0:
            self._before = self._codes()
        self._step += 1

    def on_train_batch_end(self, batch, logs=None):
        if self._before is None:
            return
        before, after, self._before = self._before, self._codes(), None
        with self._writer.as_default(step=self._step):
            for name, kernel in self._kernels.items():
                grid = kernel.quantizer.grid(kernel.variables, tf.convert_to_tensor(kernel.weight))
                _write(name, kernel.quantizer, grid, kernel.weight.numpy(), after[name])
                tf.summary.scalar(f"{name}/flips", np.mean(before[name] != after[name]))
            for site, value in zip(self._sites, self._observed(), strict=True):
                grid = site.quantizer.grid(site.quantizer_weights, value)
                codes = site.quantizer.codes(value, site.quantizer_weights)
                _write(site.name, site.quantizer, grid, value.numpy(), codes.numpy())

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.flush()

    def _codes(self) -> dict[str, np.ndarray]:
        """Every kernel's integers now."""
        return {
            name: each.quantizer.codes(tf.convert_to_tensor(each.weight), each.variables).numpy()
            for name, each in self._kernels.items()
        }

    def _run(self) -> list[tf.Tensor]:
        """What flows into each activation quantizer, in inference."""
        found = {}

        def visit(call, args, kwargs):
            if isinstance(call.layer, FakeQuantize) and kwargs.get("observe", True):
                found[id(call.layer)] = tf.cast(args[0], tf.float32)
            return infer(call, args, kwargs)

        forward(functional(self.model), self._batch, visit)
        return [found[id(site)] for site in self._sites]


def _write(
    name: str, quantizer: GridQuantizer, grid: Grid, values: np.ndarray, codes: np.ndarray
) -> None:
    grid = grid.numpy()
    lowest, highest = grid.lowest.numpy(), grid.highest.numpy()
    levels = (grid.qmax - grid.qmin) // quantizer.code_unit + 1
    # A rounding error beyond the end is no value that was cut off.
    tolerance = grid.scale * 1e-3
    outside = (values < lowest - tolerance) | (values > highest + tolerance)
    numbers = {
        "lowest": lowest.min(),
        "highest": highest.max(),
        "step": grid.scale.mean(),
        "levels_used": min(1.0, np.unique(codes).size / levels),
        "clipped": outside.mean(),
    }
    for key, number in numbers.items():
        tf.summary.scalar(f"{name}/{key}", number)
    tf.summary.histogram(f"{name}/codes", codes)
    if grid.scale.size > 1:
        tf.summary.histogram(f"{name}/steps", grid.scale)
