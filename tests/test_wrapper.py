"""A layer that a model calls several times quantizes its kernel once a call of the model."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import qat
from qat import quantizers
from qat.forward import forward, in_mode
from qat.precision import in_precision

layers = tf_keras.layers


def heads(recipe: str) -> tf_keras.Model:
    """One head on maps of three sizes, as detectors have it."""
    tf_keras.utils.set_random_seed(0)
    image = tf_keras.Input([8, 8, 3])
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    head, end = layers.Conv2D(4, 3, padding="same", name="head"), layers.Conv2D(2, 1, name="end")
    maps = [x, layers.MaxPooling2D()(x), layers.AveragePooling2D(4)(x)]
    outputs = [end(layers.ReLU()(head(x))) for x in maps]
    return qat.quantize_model(tf_keras.Model(image, outputs), recipe)


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 8, 8, 3)).astype(np.float32)


@pytest.fixture
def times_quantized(monkeypatch):
    """{id of a kernel: how often it was quantized since the start of the test}."""
    counts = {}
    for kind in (quantizers.LastValueQuantizer, quantizers.LsqQuantizer):
        original = kind.__call__

        def counted(self, inputs, training, weights, *, original=original, **kwargs):
            if isinstance(inputs, tf.Variable):
                counts[id(inputs)] = counts.get(id(inputs), 0) + 1
            return original(self, inputs, training, weights, **kwargs)

        monkeypatch.setattr(kind, "__call__", counted)
    return counts


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-lsq"])
def test_a_kernel_is_quantized_once_a_call(recipe, traced, times_quantized):
    model = heads(recipe)
    call = tf.function(model) if traced else model
    call(images(), training=True)
    times_quantized.clear()
    call = tf.function(model) if traced else model
    call(images(), training=True)
    assert sorted(times_quantized.values()) == [1, 1, 1]
    call(images(), training=False)
    assert sorted(times_quantized.values()) == [2, 2, 2]


def gradients(model: tf_keras.Model, run, x: np.ndarray) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_sum(tf.square(tf.sin(y))) for y in run(x)])
    found = tape.gradient(loss, model.trainable_variables)
    assert all(gradient is not None for gradient in found)
    return [gradient.numpy() for gradient in found]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4-lsq", "w1a1"])
def test_gradients_are_those_of_a_kernel_quantized_at_each_call(recipe, traced):
    model, x = heads(recipe), images()
    model(x, training=True)
    weights = model.get_weights()

    def one_by_one(x):
        return forward(model, [x], lambda *call: in_mode(*call, training=True))

    found = []
    for run in (one_by_one, lambda x: model(x, training=True)):
        model.set_weights(weights)
        found.append(gradients(model, tf.function(run) if traced else run, x))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_two_calls_and_two_tapes_see_two_kernels():
    """Nothing is kept beyond a call: neither from an older kernel nor from another tape."""
    model, x = heads("w8a8"), images()
    model(x, training=True)
    variable = next(v for v in model.trainable_variables if v.name == "head/kernel:0")

    @tf.function
    def twice(x):
        with tf.GradientTape() as tape:
            first = model(x, training=True)[0]
        one = tape.gradient(first, variable)
        variable.assign(2.0 * variable)
        with tf.GradientTape() as tape:
            second = model(x, training=True)[0]
        return first, second, one, tape.gradient(second, variable)

    first, second, one, other = twice(tf.constant(x))
    assert one is not None and other is not None
    assert np.abs(first - second).max() > 0.1 * np.abs(first).max()


def test_a_saved_model_does_so_too(tmp_path, times_quantized):
    model = heads("w8a8")
    path = tmp_path / "model.keras"
    qat.save_model(model, path, recipe="w8a8")
    loaded = qat.load_quantized_model(path)
    times_quantized.clear()
    loaded(images(), training=True)
    assert sorted(times_quantized.values()) == [1, 1, 1]


def test_so_does_its_copy_for_mixed_precision(times_quantized):
    copy = in_precision(heads("w8a8"), "bfloat16")
    times_quantized.clear()
    copy(images(), training=True)
    assert sorted(times_quantized.values()) == [1, 1, 1]


def test_it_is_written_as_a_saved_model(tmp_path):
    model = heads("w8a8")
    model(images(), training=True)
    model.save(tmp_path / "folder", save_format="tf")
    loaded = tf_keras.models.load_model(tmp_path / "folder")
    for one, other in zip(model(images()), loaded(images()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_mode_that_is_a_tensor():
    """A branch's tensors stay in it: each call of the head quantizes in branches of its own."""
    model = heads("w8a8")
    run = tf.function(lambda x, mode: model(x, training=mode))
    run(tf.constant(images()), tf.constant(True))
    found = run(tf.constant(images()), tf.constant(False))
    expected = model(images(), training=False)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
