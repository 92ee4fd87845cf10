"""Random layers (dropout, noise, flips) whose numbers are a function of seed and step.

Keras keeps the state of their generators outside of checkpoints. Drawn from the step, the numbers
need no state: a training that is resumed draws those that it would have drawn.
"""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf
import tf_keras

from qat.callbacks.scheduled import Scheduled, retrace

_GENERATOR = "_random_generator"  # where Keras's random layers keep theirs


class RandomByStep(Scheduled):
    """Lets every random layer of Keras draw its numbers from (seed, layer, step, call, replica).

    Args:
        seed: of the training. total_steps: as `Scheduled`.
    """

    def __init__(self, seed: int = 0, *, total_steps: int | None = None):
        super().__init__(total_steps=total_steps)
        self.seed = seed
        self._replaced: list[tuple[tf_keras.layers.Layer, Any]] = []

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self._replaced:
            return
        found = [layer for layer in self.model.submodules if hasattr(layer, _GENERATOR)]
        for index, layer in enumerate(found):
            self._replaced.append((layer, vars(layer)[_GENERATOR]))
            # Past Layer.__setattr__, which would put the generator into checkpoints and files.
            made = StepGenerator((self.seed, index), self.model.optimizer.iterations)
            vars(layer)[_GENERATOR] = made
        if found:
            retrace(self.model)

    def finish(self):
        for layer, generator in self._replaced:
            vars(layer)[_GENERATOR] = generator
        if self._replaced:
            self._replaced = []
            retrace(self.model)


class StepGenerator:
    """Has the methods of the generators in Keras's random layers; holds no state.

    Args:
        seed: two integers. step: the variable that counts steps.
    """

    _rng_type = "legacy_stateful"  # Keras's default: what a layer's get_config looks at

    def __init__(self, seed: tuple[int, int], step: tf.Variable):
        self._seed = seed
        self._step = step
        self._draws: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def _maybe_init(self) -> None:
        """Keras calls it when a layer is built."""

    def make_seed_for_stateless_op(self) -> tf.Tensor:
        """(2,) of the next draw, counted in the graph that is being traced."""
        graph = tf.compat.v1.get_default_graph()
        draw = self._draws.get(graph, 0)
        self._draws[graph] = draw + 1
        seed = tf.random.fold_in(
            tf.constant(self._seed, tf.int64), tf.convert_to_tensor(self._step)
        )
        seed = tf.random.fold_in(seed, draw)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return seed
        return tf.random.fold_in(seed, tf.cast(context.replica_id_in_sync_group, tf.int64))

    def random_uniform(self, shape, minval=0.0, maxval=None, dtype=None, nonce=None) -> tf.Tensor:
        """Numbers in [minval, maxval)."""
        dtype = dtype or tf_keras.backend.floatx()
        seed = self.make_seed_for_stateless_op()
        return tf.random.stateless_uniform(shape, seed, minval, maxval, dtype)

    def random_normal(self, shape, mean=0.0, stddev=1.0, dtype=None, nonce=None) -> tf.Tensor:
        """Normal numbers."""
        dtype = dtype or tf_keras.backend.floatx()
        return tf.random.stateless_normal(
            shape, self.make_seed_for_stateless_op(), mean, stddev, dtype
        )

    def truncated_normal(self, shape, mean=0.0, stddev=1.0, dtype=None, nonce=None) -> tf.Tensor:
        """Normal numbers within two standard deviations."""
        dtype = dtype or tf_keras.backend.floatx()
        return tf.random.stateless_truncated_normal(
            shape, self.make_seed_for_stateless_op(), mean, stddev, dtype
        )

    def dropout(self, inputs: tf.Tensor, rate: float, noise_shape=None) -> tf.Tensor:
        """The inputs, each 0 with probability `rate`, else divided by `1 - rate`."""
        return tf.nn.experimental.stateless_dropout(
            inputs, rate, self.make_seed_for_stateless_op(), noise_shape=noise_shape
        )
