"""Training a Keras model, float or quantized, and going on where a run was cut off."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Protocol

import tensorflow as tf
import tf_keras

from qat.errors import QatError

# Optimizer steps that train a small network well; epochs follow from the dataset's size.
FLOAT_STEPS, FLOAT_EPOCHS = 4000, (4, 60)
QAT_STEPS, QAT_EPOCHS = 2500, (2, 30)
BINARY_FACTOR = 3  # a sign in the network has to be learned anew, not fine-tuned
LEARNING_RATE = 1e-3
QAT_LEARNING_RATE = 3e-4


class TrainingError(QatError):
    """Training cannot go on. One line: what happened and what to do."""


class TrainingData(Protocol):
    """What `fit` needs: `qat.data.ImageData` is one."""

    steps_per_epoch: int
    validation: tf.data.Dataset

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """Endless batches (x, y), a function of the step alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training data.
        learning_rate: Adam's at the start; it falls to 0 along a cosine.
        from_logits: whether the model's output needs a softmax.
        teacher: a float model whose class probabilities replace the labels (distillation, T = 1).
        jit_compile: compile the training step with XLA.
        checkpoint_dir: where to keep the last two checkpoints; None = nowhere.
        checkpoint_steps: also between epochs, every so many steps; None = at epochs' ends.
        resume: go on from the last checkpoint, if there is one.
        log_dir: TensorBoard events; None = none.
        profile_steps: (first, last) steps for the profiler; None = none.
    """

    epochs: int
    learning_rate: float
    from_logits: bool = True
    teacher: tf_keras.Model | None = None
    jit_compile: bool = False
    checkpoint_dir: pathlib.Path | None = None
    checkpoint_steps: int | None = None
    resume: bool = False
    log_dir: pathlib.Path | None = None
    profile_steps: tuple[int, int] | None = None


def default_epochs(steps_per_epoch: int, *, quantized: bool, binary: bool = False) -> int:
    """Epochs that give a dataset of this size its step budget."""
    steps, (least, most) = (QAT_STEPS, QAT_EPOCHS) if quantized else (FLOAT_STEPS, FLOAT_EPOCHS)
    factor = BINARY_FACTOR if binary else 1
    return factor * min(most, max(least, round(steps / steps_per_epoch)))


def fit(
    model: tf_keras.Model,
    data: TrainingData,
    config: TrainConfig,
    *,
    callbacks: Sequence[tf_keras.callbacks.Callback] = (),
) -> int:
    """Trains a classifier in place with Adam and a cosine schedule.

    Args:
        model: float or quantized, with one vector of classes as output.
        data: training stream and validation set.
        config: see `TrainConfig`.
        callbacks: Keras callbacks besides progress, TensorBoard and checkpoints.

    Returns:
        The step that training started from: 0, or the one it was resumed at.

    Raises:
        TrainingError: the loss is no longer a number.
    """
    steps, total = data.steps_per_epoch, config.epochs * data.steps_per_epoch
    _compile(model, config, total)
    manager = _checkpoints(model, config)
    if manager is not None and config.resume:
        _restore(manager)
    start = int(model.optimizer.iterations.numpy())
    own = [StopAtNan(), *_watchers(config)]
    if manager is not None:
        own.append(Checkpoints(manager, config.checkpoint_steps))
    for first, last, count in _segments(start, steps, config.epochs):
        model.fit(
            _targets(data.train_stream(first), config.teacher),
            initial_epoch=first // steps,
            epochs=last,
            steps_per_epoch=count,
            validation_data=_targets(data.validation, config.teacher),
            callbacks=[*own, *callbacks],
            verbose=1 if sys.stdout.isatty() else 2,
        )
    return start


def _segments(start: int, steps: int, epochs: int) -> list[tuple[int, int, int]]:
    """(first step, epoch to end with, steps an epoch) of the calls of Keras's fit.

    A run that was cut off inside an epoch first finishes that epoch.
    """
    epoch, done = divmod(start, steps)
    segments = [(start, epoch + 1, steps - done)] if done else []
    whole = epoch + bool(done)
    return [*segments, (whole * steps, epochs, steps)] if whole < epochs else segments


def _compile(model: tf_keras.Model, config: TrainConfig, total_steps: int) -> None:
    schedule = tf_keras.optimizers.schedules.CosineDecay(config.learning_rate, max(1, total_steps))
    if config.teacher is None:
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=config.from_logits)
        metric = tf_keras.metrics.SparseCategoricalAccuracy("accuracy")
    else:
        loss = tf_keras.losses.CategoricalCrossentropy(from_logits=config.from_logits)
        metric = tf_keras.metrics.CategoricalAccuracy("agreement")
    model.compile(
        tf_keras.optimizers.Adam(schedule), loss, [metric], jit_compile=config.jit_compile
    )


def _targets(dataset: tf.data.Dataset, teacher: tf_keras.Model | None) -> tf.data.Dataset:
    """The dataset, its labels replaced by the teacher's probabilities if there is a teacher."""
    if teacher is None:
        return dataset
    if ends_in_softmax(teacher):
        return dataset.map(lambda x, _: (x, teacher(x, training=False)))
    return dataset.map(lambda x, _: (x, tf.nn.softmax(teacher(x, training=False))))


def ends_in_softmax(model: tf_keras.Model) -> bool:
    """Whether the float or quantized model's output is a probability."""
    for layer in reversed(model.layers):
        activation = getattr(getattr(layer, "layer", layer), "activation", None)
        if isinstance(layer, tf_keras.layers.Softmax):
            return True
        if activation is not None:
            return activation is tf_keras.activations.softmax
    return False


def _checkpoints(model: tf_keras.Model, config: TrainConfig) -> tf.train.CheckpointManager | None:
    if config.checkpoint_dir is None:
        return None
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return tf.train.CheckpointManager(checkpoint, str(config.checkpoint_dir), max_to_keep=2)


def _restore(manager: tf.train.CheckpointManager) -> None:
    try:
        manager.restore_or_initialize()
    except (ValueError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"{manager.directory} cannot be resumed: it is damaged or of another model: {reason}"
        ) from error


def _watchers(config: TrainConfig) -> list[tf_keras.callbacks.Callback]:
    if config.log_dir is None:
        return []
    return [
        tf_keras.callbacks.TensorBoard(
            str(config.log_dir), write_graph=False, profile_batch=config.profile_steps or 0
        )
    ]


class Checkpoints(tf_keras.callbacks.Callback):
    """Saves model and optimizer at every epoch's end, and every `steps` steps if given."""

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
