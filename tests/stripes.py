"""A tiny task that networks learn in seconds, and callbacks that look on."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import tensorflow as tf
import tf_keras
from small_models import everywhere

import qat

layers = tf_keras.layers
BATCH, STEPS, CLASSES = 8, 4, 3
SIGNATURE = (
    tf.TensorSpec((BATCH, 4, 4, 1), tf.float32),
    tf.TensorSpec((BATCH,), tf.int64),
)


@dataclasses.dataclass
class Stripes:
    """Noisy images whose bright row is their class; from step `nan_from` on they are NaN."""

    nan_from: int = 10**9
    steps_per_epoch: int = STEPS

    def batch(self, seed: int, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, BATCH)
        images = rng.normal(0, 0.3, (BATCH, 4, 4, 1))
        images[np.arange(BATCH), labels] += 1
        return np.where(step < self.nan_from, images, np.nan).astype(np.float32), labels

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        def batches():
            for step in itertools.count(start_step):
                yield self.batch(1000 + step, step)

        return tf.data.Dataset.from_generator(batches, output_signature=SIGNATURE)

    @property
    def validation(self) -> tf.data.Dataset:
        images, labels = zip(*(self.batch(seed) for seed in range(4)), strict=True)
        data = tf.data.Dataset.from_tensor_slices((np.concatenate(images), np.concatenate(labels)))
        return data.batch(BATCH)

    def epoch(self, count: int = STEPS) -> tf.data.Dataset:
        """The first `count` training batches, a dataset that knows its length."""
        images, labels = zip(*(self.batch(1000 + step) for step in range(count)), strict=True)
        return tf.data.Dataset.from_tensor_slices((np.stack(images), np.stack(labels)))


def float_model(seed: int = 0) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = layers.Input((4, 4, 1), name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn", momentum=0.9)(x))
    return tf_keras.Model(image, layers.Dense(CLASSES, name="logits")(layers.Flatten()(x)))


def quantized_model(seed: int = 0, recipe: str | qat.Recipe = "w4a4") -> tf_keras.Model:
    return qat.calibrate(qat.quantize_model(float_model(seed), recipe), Stripes().validation)


@functools.cache
def _built(name: str, whole: bool) -> tuple[tf_keras.Model, list[np.ndarray]]:
    model = quantized_model(recipe=everywhere(name) if whole else name)
    return model, model.get_weights()


def same_model(name: str, *, whole: bool = True) -> tf_keras.Model:
    """The calibrated model of a recipe (`whole`: of `everywhere`), always one and the same."""
    model, weights = _built(name, whole)
    model.set_weights(weights)
    return model


def linear_model(seed: int, *, softmax: bool = False) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = layers.Input((4, 4, 1))
    logits = layers.Dense(CLASSES, kernel_initializer="he_normal")(layers.Flatten()(image))
    return tf_keras.Model(image, layers.Softmax()(logits) if softmax else logits)


def compiled(model: tf_keras.Model, rate: float = 0.1, **options) -> tf_keras.Model:
    """For plain `model.fit`, by SGD."""
    optimizer = tf_keras.optimizers.SGD(rate)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, options.pop("loss", loss), **options)
    return model


class Recorder(tf_keras.callbacks.Callback):
    """Keeps what each epoch logs and each step's learning rate; is cut off after `last` steps."""

    def __init__(self, last: int | None = None):
        super().__init__()
        self.last, self.epochs, self.rates = last, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))
        if int(self.model.optimizer.iterations) == self.last:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, dict(logs)))


class Watcher(tf_keras.callbacks.Callback):
    """Keeps what `look()` returns before training and after each step."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen = look, []

    def on_train_begin(self, logs=None):
        self.seen.append(self.look())

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.look())


class DoAfterEachStep(tf_keras.callbacks.Callback):
    """Calls `act(step)` after each step, counted from 0."""

    def __init__(self, act):
        super().__init__()
        self.act, self.step = act, 0

    def on_train_batch_end(self, batch, logs=None):
        self.act(self.step)
        self.step += 1
