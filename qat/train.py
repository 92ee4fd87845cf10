"""Training a Keras model, float or quantized, and going on where a run was cut off."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import tensorflow as tf
import tf_keras

from qat import callbacks as qat_callbacks
from qat.callbacks.guards import TrainingError, one_line_errors
from qat.callbacks.progress import quiet
from qat.checkpoints import CheckpointFolder, stopping_at_signals
from qat.distribution import (
    batch_norm_over_replicas,
    by_examples,
    is_chief,
    require_same_step,
    split,
)
from qat.objective import Objective, classification
from qat.optimizer import QatAdam, cosine_schedule
from qat.precision import in_precision
from qat.reestimate import reestimate_batch_norm

__all__ = [
    "TrainConfig",
    "TrainingData",
    "TrainingError",
    "fit",
]


class TrainingData(Protocol):
    """What `fit` needs: `qat.data.ImageData` is one."""

    steps_per_epoch: int
    validation: tf.data.Dataset

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """Endless batches (x, y), a function of the step alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Shares are of the training's steps, 0 to 1; None = never.

    Attributes:
        epochs: passes over the training data.
        learning_rate: Adam's at its highest; it falls to 0 along a cosine.
        warmup_steps: steps in which it rises from 0 before that.
        weight_decay: of kernels, decoupled (AdamW); nothing else decays.
        quantizer_learning_rate: times the learning rate = that of learned steps and offsets.
        from_logits: whether the model's output needs a softmax.
        objective: losses and metrics; None = one vector of classes, cross-entropy on labels.
        teacher: a float model to learn from (`qat.callbacks.DistillationLoss`).
        distill_temperature: of its and the model's probabilities.
        distill_weight: 1 = it replaces the labels, 0 = it counts for nothing.
        freeze_batch_norm: share after which batch normalization uses its moving statistics.
        reestimate_batch_norm: batches to measure these statistics with, when they are frozen, else
            at the end; 0 = keep the moving averages.
        freeze_ranges: share after which activation ranges stop moving.
        dampening: λ of `qat.callbacks.Dampening`; 0 = none.
        iterative_freezing: last threshold of `qat.callbacks.IterativeFreezing`; 0 = none.
        gradual_bits: stages of `qat.callbacks.GradualBits`, e.g. ((8, 0.2), (4, 0.5)).
        seed: of the model's random layers, e.g. dropout; data and weights have their own.
        mixed_precision: type that kernels compute in, see `qat.precision.in_precision`; float16
            with loss scaling. The model itself stays float32.
        jit_compile: compile the training step with XLA.
        checkpoint_dir: where to keep the last two checkpoints; None = nowhere.
        checkpoint_steps: also between epochs, every so many steps; None = at epochs' ends.
        resume: go on from the last checkpoint, if there is one.
        log_dir: TensorBoard events; None = none.
        profile_steps: (first, last) steps for the profiler; None = none.

    Raises:
        TrainingError: iterative freezing with gradual bits, which change the integers that it
            counts. (Values out of range are ValueErrors of `fit`, before any step.)
    """

    epochs: int
    learning_rate: float
    warmup_steps: int = 0
    weight_decay: float = 0.0
    quantizer_learning_rate: float = 1.0
    from_logits: bool = True
    objective: Objective | None = None
    teacher: tf_keras.Model | None = None
    distill_temperature: float = 1.0
    distill_weight: float = 1.0
    freeze_batch_norm: float | None = None
    reestimate_batch_norm: int = 0
    freeze_ranges: float | None = None
    dampening: float = 0.0
    iterative_freezing: float = 0.0
    gradual_bits: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    mixed_precision: str = "float32"
    jit_compile: bool = False
    checkpoint_dir: pathlib.Path | None = None
    checkpoint_steps: int | None = None
    resume: bool = False
    log_dir: pathlib.Path | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        if self.teacher is not None and self.objective is not None:
            raise TrainingError("a teacher teaches classes; leave out the objective or the teacher")
        if self.iterative_freezing and self.gradual_bits:
            raise TrainingError(
                "iterative_freezing counts flips of integers, and gradual_bits changes these; "
                "leave one out"
            )


def fit(
    model: tf_keras.Model,
    data: TrainingData,
    config: TrainConfig,
    *,
    callbacks: Sequence[tf_keras.callbacks.Callback] = (),
) -> int:
    """Trains in place with Adam and a cosine schedule.

    Args:
        model: float or quantized, by qat or by TFMOT, with one vector of classes as output unless
            there is an objective. What a setting does not apply to is left alone: a float model
            has no kernels to dampen.
        data: training stream and validation set.
        config: see `TrainConfig`.
        callbacks: Keras callbacks besides progress, TensorBoard and checkpoints; those of
            `qat.callbacks` are told how long training is, and are part of the checkpoints.

    Returns:
        The step that training started from: 0, or the one it was resumed at.

    Raises:
        TrainingError: the loss is no longer a number, or a checkpoint cannot be read.
        ValueError: a setting out of range.
    """
    strategy = model.distribute_strategy
    with strategy.scope(), one_line_errors():
        trained = in_precision(model, config.mixed_precision)
        try:
            start = _train(trained, data, config, callbacks)
        finally:
            if trained is not model:
                model.set_weights(trained.get_weights())
        # Not by a callback: a training that was finished before and is resumed calls none.
        if config.epochs and config.reestimate_batch_norm and config.freeze_batch_norm is None:
            reestimate_batch_norm(model, data.train_stream(), steps=config.reestimate_batch_norm)
    return start


def _train(
    model: tf_keras.Model,
    data: TrainingData,
    config: TrainConfig,
    callbacks: Sequence[tf_keras.callbacks.Callback],
) -> int:
    strategy, steps = model.distribute_strategy, data.steps_per_epoch
    total = config.epochs * steps
    if not total:
        return 0
    _compile(model, config, total)
    scheduled = _scheduled(config, data)
    scheduled += [each for each in callbacks if isinstance(each, qat_callbacks.Scheduled)]
    others = [each for each in callbacks if each not in scheduled]
    saved = config.checkpoint_dir is not None
    with (
        _of_one_training(scheduled, model, total),
        batch_norm_over_replicas(model, strategy),
        stopping_at_signals(saved) as stop,
    ):
        folder = _checkpoints(model, config, scheduled)
        start = folder.restore() if folder is not None and config.resume else 0
        require_same_step(start, strategy)
        # What changes the weights comes before what saves them.
        own = [qat_callbacks.StopAtNan(), *_watchers(config, data, strategy), *scheduled]
        if folder is not None:
            own.append(qat_callbacks.Checkpoints(folder, config.checkpoint_steps, stop))
        for first, last, count in _segments(start, steps, config.epochs):
            model.fit(
                split(data.train_stream(first), strategy),
                initial_epoch=first // steps,
                epochs=last,
                steps_per_epoch=count,
                validation_data=by_examples(data.validation),
                callbacks=quiet([*own, *others], model, epochs=last, steps=count),
                verbose=0,
            )
            if model.stop_training:
                break
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
    optimizer = QatAdam(
        cosine_schedule(config.learning_rate, total_steps, config.warmup_steps),
        weight_decay=config.weight_decay,
        quantizer_learning_rate=config.quantizer_learning_rate,
    )
    objective = config.objective or classification(from_logits=config.from_logits)
    losses = objective.losses()
    if config.teacher is not None:
        losses = qat_callbacks.DistillationLoss(
            config.distill_temperature, config.distill_weight, config.from_logits
        )
    if config.mixed_precision == "float16":
        optimizer = tf_keras.mixed_precision.LossScaleOptimizer(optimizer)
    model.compile(optimizer, losses, objective.metrics(), jit_compile=config.jit_compile)
    # Keras traces a step that makes variables twice.
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
        model.compiled_loss.build(model.output)
        model.compiled_metrics.build(model.output, model.output)


def _scheduled(config: TrainConfig, data: TrainingData) -> list[qat_callbacks.Scheduled]:
    """The callbacks that the config's fields stand for; widths first, the others see them."""
    made: list[qat_callbacks.Scheduled] = [qat_callbacks.RandomByStep(config.seed)]
    if config.gradual_bits:
        made.append(qat_callbacks.GradualBits(config.gradual_bits))
    if config.teacher is not None:
        made.append(qat_callbacks.Distillation(config.teacher))
    if config.freeze_batch_norm is not None:
        batches = config.reestimate_batch_norm
        stream = data.train_stream() if batches else None
        made.append(qat_callbacks.FreezeBatchNorm(config.freeze_batch_norm, stream, batches))
    if config.freeze_ranges is not None:
        made.append(qat_callbacks.FreezeRanges(config.freeze_ranges))
    if config.dampening:
        made.append(qat_callbacks.Dampening(config.dampening))
    if config.iterative_freezing:
        made.append(qat_callbacks.IterativeFreezing(config.iterative_freezing))
    return made


@contextlib.contextmanager
def _of_one_training(
    scheduled: Sequence[qat_callbacks.Scheduled], model: tf_keras.Model, total: int
) -> Iterator[None]:
    """Tells the callbacks how long training is, and ends them with it, however it ends."""
    untold = [each for each in scheduled if each.total_steps is None]
    for each in untold:
        each.total_steps = total
    for each in scheduled:
        each.prepare(model)
    try:
        yield
    finally:
        for each in scheduled:
            each.finish()
        for each in untold:
            each.total_steps = None


def _checkpoints(
    model: tf_keras.Model, config: TrainConfig, scheduled: Sequence[qat_callbacks.Scheduled]
) -> CheckpointFolder | None:
    if config.checkpoint_dir is None:
        return None
    states = {type(each).__name__: each.state for each in scheduled if each.state is not None}
    states.update(model=model, optimizer=model.optimizer)
    writes = is_chief(model.distribute_strategy)
    return CheckpointFolder(config.checkpoint_dir, states, resume=config.resume, writes=writes)


def _watchers(
    config: TrainConfig, data: TrainingData, strategy: tf.distribute.Strategy
) -> list[tf_keras.callbacks.Callback]:
    """What shows how training does; only the chief shows it."""
    chief, steps = is_chief(strategy), data.steps_per_epoch
    made = [qat_callbacks.Progress(config.epochs, steps)] if chief else []
    if config.log_dir is None:
        return made
    if chief:
        profile = config.profile_steps or 0
        tensorboard = tf_keras.callbacks.TensorBoard
        made.append(tensorboard(str(config.log_dir), write_graph=False, profile_batch=profile))
    folder = config.log_dir / "quantization" if chief else None
    summaries = qat_callbacks.QuantizationSummaries
    return [*made, summaries(folder, data.validation, steps_per_epoch=steps)]
