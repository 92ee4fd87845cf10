"""What the callbacks share: where training stands, and changes of the graph of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras


class Scheduled(tf_keras.callbacks.Callback):
    """A callback whose effect depends on the share of the training that is done.

    What it does is a function of the step and of `state` alone, so that a resumed training goes on
    as if it had not been cut off. Subclasses override `make_state`, `at_step` and `finish`.

    Args:
        total_steps: steps of the whole training; the optimizer's counter says how many are done.
            None = every `model.fit` is a training of its own, of its epochs times its steps.

    Attributes:
        state: what a checkpoint must hold besides model and optimizer; None = nothing.
    """

    def __init__(self, *, total_steps: int | None = None):
        super().__init__()
        self._supports_tf_logs = True  # no hook reads the logs, so no step has to wait for them
        self.total_steps = total_steps
        self.state: tf.train.Checkpoint | None = None
        self._prepared: tf_keras.Model | None = None
        self._epoch_start = 0
        self._counted_before: int | None = None

    def make_state(self, model: tf_keras.Model) -> tf.train.Checkpoint | None:
        """The variables at the training's start."""
        return None

    def at_step(self, step: int) -> None:
        """Called before the step, counted from 0; a few steps may be skipped."""

    def finish(self) -> None:
        """Training is over or was given up: undoes what must not outlive it. Can be repeated."""

    @property
    def total(self) -> int:
        """Steps of the whole training.

        Raises:
            ValueError: nobody knows.
        """
        if self.total_steps is not None:
            return self.total_steps
        if not self.params.get("steps"):
            raise ValueError(
                f"{type(self).__name__} must know how long training is and the dataset has no "
                "length: give model.fit steps_per_epoch, or the callback total_steps"
            )
        return self.params["epochs"] * self.params["steps"]

    def first_step(self, share: float) -> int:
        """The first step after a share of the training."""
        return round(share * self.total)

    def prepare(self, model: tf_keras.Model) -> None:
        """Makes the state, for a checkpoint to be read into it before training begins."""
        self.state = self.make_state(model)
        self._prepared = model

    def on_train_begin(self, logs=None):
        self._counted_before = None if self.total_steps is None else 0
        if self.total_steps is None or self._prepared is not self.model:
            self.prepare(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        counted = int(self.model.optimizer.iterations.numpy())
        if self._counted_before is None:
            steps = self.total // self.params["epochs"]
            self._counted_before = counted - epoch * steps
        self._epoch_start = counted - self._counted_before
        self.at_step(self._epoch_start)

    def on_train_batch_begin(self, batch, logs=None):
        if batch:
            self.at_step(self._epoch_start + batch)

    def on_train_end(self, logs=None):
        if self.is_over():
            self.finish()

    def is_over(self) -> bool:
        """Whether this end of a `model.fit` is the end of the training."""
        return (
            self.total_steps is None
            or int(self.model.optimizer.iterations.numpy()) >= self.total_steps
        )


def require_share(name: str, share: float) -> float:
    """The share of the training.

    Raises:
        ValueError: it lies outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} is a share of the training in [0, 1], got {share!r}")
    return share


def cosine(share: float, start: float, first: float, last: float) -> float:
    """From `first` (until the share `start` of the training) to `last` (its end), along a cosine.

    `last + (first - last)·(1 + cos(π·(share - start)/(1 - start)))/2`.
    """
    if share <= start:
        return first
    done = min(1.0, (share - start) / (1.0 - start))
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * done))


def retrace(model: tf_keras.Model) -> None:
    """Makes the model's next step see changed Python attributes; no variable is touched."""
    model.make_train_function(force=True)
    model.test_function = model.predict_function = None


def replace_call(layer: tf_keras.layers.Layer, call: Callable) -> None:
    """Lets the layer compute `call` until `restore_call`; retrace the model after it."""
    layer.call = call


def restore_call(layer: tf_keras.layers.Layer) -> None:
    """Undoes `replace_call`."""
    if "call" in vars(layer):
        del layer.call


class _HookedLoss:
    """A model's `compute_loss` with other targets, and with terms added."""

    def __init__(self, compute: Callable):
        self.compute = compute
        self.targets: list[Callable] = []
        self.terms: list[Callable] = []

    def __call__(self, x=None, y=None, y_pred=None, sample_weight=None):
        for target in self.targets:
            y = target(x, y)
        loss = self.compute(x, y, y_pred, sample_weight)
        for term in self.terms:
            # As the regularizers of Keras: once, not once a replica.
            loss += tf.nn.scale_regularization_loss(term())
        return loss


def hook_loss(
    model: tf_keras.Model,
    *,
    target: Callable[[Any, Any], Any] | None = None,
    term: Callable[[], tf.Tensor] | None = None,
) -> None:
    """Changes what the model's steps minimize until `unhook_loss`.

    Args:
        target: gets x and y, returns the y for the loss (metrics keep theirs).
        term: a scalar to add to the training loss; the reported "loss" stays without it.
    """
    if not isinstance(model.compute_loss, _HookedLoss):
        model.compute_loss = _HookedLoss(model.compute_loss)
    hooks = model.compute_loss
    hooks.targets += [target] if target else []
    hooks.terms += [term] if term else []
    retrace(model)


def unhook_loss(model: tf_keras.Model, hook: Callable) -> None:
    """Undoes `hook_loss` for one target or term."""
    hooks = model.compute_loss
    hooks.targets = [kept for kept in hooks.targets if kept is not hook]
    hooks.terms = [kept for kept in hooks.terms if kept is not hook]
    if not hooks.targets and not hooks.terms:
        del model.compute_loss
    retrace(model)
