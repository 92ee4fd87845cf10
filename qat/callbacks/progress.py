"""One line an epoch: how training does, how long it took, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import tf_keras

_SECONDS = 1.0  # between two changes of a terminal's line


class Progress(tf_keras.callbacks.Callback):
    """Prints loss, accuracy, validation, seconds and the time left; on a terminal in epochs too.

    Args:
        epochs, steps_per_epoch: of the whole training, which may begin in the middle.
    """

    def __init__(self, epochs: int, steps_per_epoch: int):
        super().__init__()
        self._supports_tf_logs = True  # logs are read once a second, so no step waits for them
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self._live = sys.stdout.isatty()
        self._began: float | None = None

    def on_train_begin(self, logs=None):
        if self._began is None:
            self._began, self._first = time.monotonic(), self._done()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = f"epoch {epoch + 1}/{self.epochs}"
        self._epoch_began = self._shown = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        now = time.monotonic()
        if self._live and now - self._shown >= _SECONDS:
            self._shown = now
            step = f"step {self._done() % self.steps_per_epoch}/{self.steps_per_epoch}"
            line = f"{self._epoch} {step}: {_numbers(logs)}, {self._left()}"
            print(f"\r{line}\033[K", end="", flush=True)

    def on_epoch_end(self, epoch, logs=None):
        seconds = f"{time.monotonic() - self._epoch_began:.1f} s"
        start = "\r\033[K" if self._live else ""
        print(f"{start}{self._epoch}: {_numbers(logs)}, {seconds}, {self._left()}", flush=True)

    def _done(self) -> int:
        return int(self.model.optimizer.iterations.numpy())

    def _left(self) -> str:
        done = self._done()
        seconds = (time.monotonic() - self._began) / max(1, done - self._first)
        return f"{duration(seconds * (self.epochs * self.steps_per_epoch - done))} left"


def quiet(
    callbacks: Sequence[tf_keras.callbacks.Callback],
    model: tf_keras.Model,
    *,
    epochs: int,
    steps: int,
) -> tf_keras.callbacks.CallbackList:
    """Keras's list of callbacks for `Model.fit`, without its warnings that one takes time.

    Writing a checkpoint takes longer than a step, which is no news.
    """
    made = tf_keras.callbacks.CallbackList(
        callbacks, add_history=True, model=model, epochs=epochs, steps=steps
    )
    made._check_timing = False
    return made


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:03 or 0:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _numbers(logs: dict | None) -> str:
    return ", ".join(f"{name} {float(value):.4f}" for name, value in (logs or {}).items())
