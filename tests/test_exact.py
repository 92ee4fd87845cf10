"""The exact model against the reference kernels, and its gradients against fake quantization."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_models import branches, data_for, model_of, quantized, residual, run_file

import models
import qat
from qat.errors import ModelError

layers = tf_keras.layers


def assert_equals_the_file(exact, model, x, tmp_path):
    """Bit for bit, BUILTIN_REF on the file that the model exports now."""
    path = qat.export_tflite(model, tmp_path / "model.tflite")
    (expected,) = run_file(path, [x], "reference")
    np.testing.assert_array_equal(exact.predict(x, verbose=0), expected)


@pytest.mark.parametrize(
    ("build", "recipe"),
    [(branches, "w8a8"), (residual, "w4a4"), (residual, "w1a1"), (residual, "w8a16")],
)
def test_outputs_are_the_file_s(build, recipe, tmp_path):
    model = quantized(model_of(build, (11, 10, 3)), recipe)
    (x,) = data_for(model, 8)
    assert_equals_the_file(qat.ExactModel(model), model, x, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4", "w2a2", "w1a1"])
@pytest.mark.parametrize("name", ["cnn5", "resnet20", "mobilenet_v2"])
def test_outputs_of_whole_networks(name, recipe, tmp_path):
    network = models.build(name, (16, 16, 3), 7)
    x = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3)).astype(np.float32)
    for _ in range(20):
        network(x, training=True)  # moving statistics of the data
    model = quantized(network, recipe, [x], input_range=(0, 255))
    assert_equals_the_file(qat.ExactModel(model), model, x, tmp_path)


def test_the_storage_is_the_file_s(tmp_path):
    """Behind a ReLU the INT4 convolution's bias is an accumulator step lower than int8's."""
    model = quantized(model_of(residual, (11, 10, 3)), "w4a8")
    (x,) = data_for(model, 8)
    path = qat.export_tflite(model, tmp_path / "model.tflite", weight_storage="speed")
    (expected,) = run_file(path, [x], "reference")
    exact = qat.ExactModel(model, weight_storage="speed")
    np.testing.assert_array_equal(exact.predict(x, verbose=0), expected)
    assert (qat.ExactModel(model).predict(x, verbose=0) != expected).any()


def test_gradients_are_those_of_fake_quantization_at_the_exact_values():
    """One convolution and its ReLU: both models read the same input, so only the loss differs."""
    model = quantized(model_of(lambda x: layers.Conv2D(3, 2, activation="relu")(x), (5, 5, 2)))
    exact, (x,) = qat.ExactModel(model), data_for(model, 4)
    upstream = np.random.default_rng(2).normal(size=(4, 4, 4, 3)).astype(np.float32)
    gradients = []
    for which in (model, exact):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(which(x) * upstream)
        gradients.append(tape.gradient(loss, model.trainable_variables))
    for simulated, through_exact in zip(*gradients, strict=True):
        assert np.abs(simulated).max() > 0
        np.testing.assert_array_equal(simulated, through_exact)


@pytest.mark.slow
def test_training_moves_the_integers_and_the_file_follows(tmp_path):
    model = quantized(model_of(residual, (6, 6, 1)), "w4a4")
    (x,) = data_for(model, 32)
    y = (x.mean((1, 2, 3)) > 0).astype(np.int64)
    statistics = [w.numpy() for w in model.non_trainable_weights]
    exact = qat.ExactModel(model)
    exact.compile(
        tf_keras.optimizers.SGD(0.05),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = exact.fit(x, y, batch_size=32, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert_equals_the_file(exact, model, x, tmp_path)
    for before, after in zip(statistics, model.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_float_island_has_no_exact_form():
    recipe = qat.Recipe.from_name("w8a8").with_rules(qat.Rule(layer="head", keep_float="a test"))
    model = quantized(
        model_of(lambda x: layers.Dense(2, name="head")(layers.Dense(4)(x)), (3,)), recipe
    )
    with pytest.raises(ModelError, match="no exact form"):
        qat.ExactModel(model)
