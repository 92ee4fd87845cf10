"""Checkpoints, and an end to trainings that diverge or are interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterator
from typing import Protocol

import tensorflow as tf
import tf_keras

from qat.errors import QatError


class TrainingError(QatError):
    """Training cannot go on. One line: what happened and what to do."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended training after a step whose checkpoint was written.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int, step: int):
        super().__init__(
            f"{signal.Signals(number).name}; step {step} is saved; go on with --resume"
        )
        self.number = number


@dataclasses.dataclass
class Stop:
    """Whether training was asked to stop: the number of the signal, 0 = no."""

    signal: int = 0


class Saver(Protocol):
    """`qat.checkpoints.CheckpointFolder`."""

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step."""


class Checkpoints(tf_keras.callbacks.Callback):
    """Saves at every epoch's end, every `steps` steps if given, and when asked to stop.

    What is not finite is not saved.
    """

    def __init__(self, folder: Saver, steps: int | None, stop: Stop | None = None):
        super().__init__()
        self._supports_tf_logs = True  # they are read when saving, so no other step waits for them
        self.folder = folder
        self.steps = steps
        self.stop = stop or Stop()
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.stop.signal or (self.steps and (batch + 1) % self.steps == 0):
            self._save(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._save(logs)

    def _save(self, logs: dict[str, float] | None) -> None:
        require_finite(logs, self.epoch)
        require_finite_weights(self.model, self.epoch)
        step = int(self.model.optimizer.iterations.numpy())
        self.folder.save(step)
        if self.stop.signal:
            raise Interrupted(self.stop.signal, step)


class StopAtNan(tf_keras.callbacks.Callback):
    """Ends training with an error when an epoch's loss is not finite, before it is checkpointed."""

    def on_epoch_end(self, epoch, logs=None):
        require_finite(logs, epoch)


def require_finite(logs: dict[str, float] | None, epoch: int) -> None:
    """Raises TrainingError if the mean loss is no longer a number."""
    loss = float((logs or {}).get("loss", 0.0))
    if not math.isfinite(loss):
        raise TrainingError(f"the loss became {loss} in epoch {epoch + 1}; lower the learning rate")


def require_finite_weights(model: tf_keras.Model, epoch: int) -> None:
    """Raises TrainingError if a weight is no longer a number: the next step's loss will be none."""
    for variable in model.trainable_variables:
        if not tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(variable))):
            raise TrainingError(
                f"{variable.name} became NaN or infinite in epoch {epoch + 1}; lower the learning "
                "rate"
            )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What TensorFlow says on pages, for the two cases in which the user can do something."""
    try:
        yield
    except tf.errors.UnimplementedError as error:
        reason = next((line for line in str(error).splitlines() if "eterminis" in line), None)
        if reason is None:
            raise
        raise TrainingError(
            f"a kernel has no deterministic version: {reason.strip()[:300]}; leave --deterministic "
            "out"
        ) from error
    except tf.errors.ResourceExhaustedError as error:
        reason = str(error).splitlines()[0].strip()[:200]
        raise TrainingError(
            f"memory or disk is used up: {reason}; lower --batch_size, or make room"
        ) from error
