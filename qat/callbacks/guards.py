"""Checkpoints, and an end to trainings that diverge."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from qat.errors import QatError


class TrainingError(QatError):
    """Training cannot go on. One line: what happened and what to do."""


class Checkpoints(tf_keras.callbacks.Callback):
    """Saves at every epoch's end, and every `steps` steps if given."""

    def __init__(self, manager: tf.train.CheckpointManager, steps: int | None):
        super().__init__()
        self.manager = manager
        self.steps = steps
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.steps and (batch + 1) % self.steps == 0:
            require_finite(logs, self.epoch)
            self.manager.save(int(self.model.optimizer.iterations.numpy()))

    def on_epoch_end(self, epoch, logs=None):
        self.manager.save(int(self.model.optimizer.iterations.numpy()))


class StopAtNan(tf_keras.callbacks.Callback):
    """Ends training with an error when an epoch's loss is not finite, before it is checkpointed."""

    def on_epoch_end(self, epoch, logs=None):
        require_finite(logs, epoch)


def require_finite(logs: dict[str, float] | None, epoch: int) -> None:
    """Raises TrainingError if the mean loss is no longer a number."""
    loss = (logs or {}).get("loss", 0.0)
    if not tf.math.is_finite(loss):
        raise TrainingError(f"the loss became {loss} in epoch {epoch + 1}; lower the learning rate")
