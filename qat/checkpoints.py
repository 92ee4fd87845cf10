"""Checkpoints of a training: whole or not there, and what damage leaves readable."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from absl import logging

from qat.callbacks.guards import Stop, TrainingError

_KEPT = 2


class CheckpointFolder:
    """The last two checkpoints of a training, `ckpt-<step>`.

    Every worker of a distributed training has one and saves at the same steps, because reading
    variables may take all of them; all but the chief write to a folder of their own that is thrown
    away.

    Args:
        folder: made if missing. states: what `tf.train.Checkpoint` takes by name.
        resume: whether `restore` follows; if not, checkpoints of an earlier training are removed.
        writes: whether this process is the one that writes.
    """

    def __init__(
        self, folder: pathlib.Path, states: dict[str, Any], *, resume: bool, writes: bool = True
    ):
        self.folder = folder
        self._checkpoint = tf.train.Checkpoint(**states)
        if writes and not resume:
            self._remove("ckpt-*")
        self._aside = None if writes else tempfile.TemporaryDirectory(prefix="qat-worker-")
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(folder) if writes else self._aside.name, max_to_keep=_KEPT
        )

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have been finished, the last one first.

        By the index files, which TensorFlow writes last; its own list of checkpoints comes after
        them and may be a checkpoint behind.
        """
        names = [path.stem.removeprefix("ckpt-") for path in self.folder.glob("ckpt-*.index")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def restore(self) -> int:
        """Reads the last checkpoint that is whole; its step, or 0 if there is none at all.

        Raises:
            TrainingError: there are checkpoints, and none can be read.
        """
        reasons = []
        for step in self.steps():
            try:
                status = self._checkpoint.restore(str(self.folder / f"ckpt-{step}"))
                status.assert_existing_objects_matched()
            except Exception as error:  # of damage TensorFlow says IndexError, KeyError and more
                reasons.append(_one_line(error))
                logging.warning("checkpoint of step %d cannot be read: %s", step, reasons[-1])
                continue
            if reasons:
                logging.warning("training goes on from the checkpoint before it, step %d", step)
            return step
        if reasons:
            raise TrainingError(
                f"{self.folder} cannot be resumed: it is damaged, or of another model or other "
                f"settings: {reasons[0]}; start anew without --resume"
            )
        return 0

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step, then removes the oldest of more than two.

        Raises:
            TrainingError: it cannot be written; nothing of it is left, the last one is.
        """
        try:
            self._manager.save(step)
        except (OSError, tf.errors.OpError) as error:
            self._remove(f"ckpt-{step}.*", f"ckpt-{step}_temp")
            kept = self.steps()
            last = f"that of step {kept[0]} is kept" if kept else "there is none before it"
            raise TrainingError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: "
                f"{_one_line(error)}; {last}; make room and go on with --resume"
            ) from error

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def stopping_at_signals(wanted: bool) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask training to stop after the step that runs; a second one stops at once.

    If it is not wanted, or outside the main thread, which alone may do that, signals do what they
    did.
    """
    stop, before = Stop(), {}

    def ask(number: int, _) -> None:
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    if wanted and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
