"""Statistics that stop moving: of batch normalization and of activation ranges.

Both follow the batches with a moving average. Near the end of training, weights whose integers flip
at every step shake them, and the network that is exported is none of those that were trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat.callbacks.scheduled import (
    Scheduled,
    replace_call,
    require_share,
    restore_call,
    retrace,
)
from qat.layers import FakeQuantize
from qat.quantizers import MovingAverageQuantizer
from qat.reestimate import reestimate_batch_norm


class _Freezing(Scheduled):
    """Changes the graph once, at a share of the training."""

    def __init__(self, after: float, *, total_steps: int | None = None):
        super().__init__(total_steps=total_steps)
        self.after = require_share("after", after)
        self._undo: list[Callable[[], None]] = []
        self._waited = False
        self.frozen = False

    def freeze(self, begins: bool) -> list[Callable[[], None]]:
        """Freezes, now or (`begins` is false) as it was before; returns what undoes it."""
        raise NotImplementedError

    def at_step(self, step):
        first = self.first_step(self.after)
        if step < first:
            self._waited = True
        if step < first or self.frozen:
            return
        # A training that is resumed after this step did not wait for it.
        self._undo = self.freeze(begins=self._waited or step == first)
        self._waited, self.frozen = False, True
        retrace(self.model)

    def finish(self):
        if self.frozen:
            for undo in self._undo:
                undo()
            self._undo, self.frozen = [], False
            retrace(self.model)


class FreezeBatchNorm(_Freezing):
    """From a share of the training on, batch normalization uses its moving statistics.

    They stay as they are then, and training sees the network that is exported; gamma and beta are
    trained on. With a dataset the statistics are measured anew at the moment of freezing (see
    `qat.reestimate_batch_norm`). Do not re-estimate them at the end of such a training: what was
    trained after the freezing fits the frozen ones.

    Args:
        after: share of the training, 0 to 1. dataset: batches of x or (x, y); None = the moving
            averages stay. steps: batches to use of it. total_steps: as `Scheduled`.

    Raises:
        ValueError: an illegal share.

    Source: Krishnamoorthi, arXiv 1806.08342.
    """

    def __init__(
        self,
        after: float,
        dataset: tf.data.Dataset | None = None,
        steps: int = 50,
        *,
        total_steps: int | None = None,
    ):
        super().__init__(after, total_steps=total_steps)
        self.dataset = dataset
        self.steps = steps

    def freeze(self, begins: bool):
        # Later on the checkpoint holds the measured ones.
        if begins and self.dataset is not None:
            reestimate_batch_norm(self.model, self.dataset, steps=self.steps)
        undo = []
        for layer in self.model.submodules:
            if isinstance(layer, tf_keras.layers.BatchNormalization) and layer.trainable:
                replace_call(layer, _in_inference(layer.call))
                undo.append(lambda layer=layer: restore_call(layer))
        return undo


class FreezeRanges(_Freezing):
    """From a share of the training on, moving averages of activation ranges stop moving.

    Learned and fixed ranges are none, and go on as before.

    Args:
        after: share of the training, 0 to 1. total_steps: as `Scheduled`.

    Raises:
        ValueError: an illegal share.

    Source: AIMET's "QAT without range learning" (quic/aimet), which keeps calibration's all along.
    """

    def freeze(self, begins: bool):
        undo = []
        for layer in self.model.submodules:
            if isinstance(layer, FakeQuantize) and _moves(layer.quantizer):
                replace_call(layer, _without_observing(layer.call))
                undo.append(lambda layer=layer: restore_call(layer))
            elif isinstance(layer, QuantizeWrapper) and layer._output_quantizers:
                undo += _freeze_output(layer)
        return undo


class ReestimateBatchNorm(Scheduled):
    """At the end of training, the statistics of batch normalization are measured anew.

    See `qat.reestimate_batch_norm`. Not together with `FreezeBatchNorm`, which takes a dataset.

    Args:
        dataset: batches of x or (x, y). steps: batches to use of it. total_steps: as `Scheduled`.

    Source: arXiv 2203.11086, section 3.2.
    """

    def __init__(
        self, dataset: tf.data.Dataset, steps: int = 50, *, total_steps: int | None = None
    ):
        super().__init__(total_steps=total_steps)
        self.dataset = dataset
        self.steps = steps

    def on_train_end(self, logs=None):
        if self.is_over():
            reestimate_batch_norm(self.model, self.dataset, steps=self.steps)


def _in_inference(call: Callable) -> Callable:
    def inference(inputs, training=None, mask=None):
        return call(inputs, training=False, mask=mask)

    return inference


def _without_observing(call: Callable) -> Callable:
    def quantize(inputs, training=None, observe=True, averages=False):
        return call(inputs, training=training, observe=False, averages=averages)

    return quantize


def _moves(quantizer: Any) -> bool:
    return isinstance(quantizer, MovingAverageQuantizer)


def _freeze_output(wrapper: QuantizeWrapper) -> list[Callable[[], None]]:
    """For a range that lives in TFMOT's wrapper instead of a layer of its own."""
    (quantizer,) = wrapper._output_quantizers
    if not _moves(quantizer):
        return []

    def frozen(inputs, training, weights, **kwargs):
        return quantizer(inputs, False, weights=weights, **kwargs)

    wrapper._output_quantizers = [frozen]
    return [lambda: setattr(wrapper, "_output_quantizers", [quantizer])]
