from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_models import model_of, quantized, recipe, run_file, run_model

import qat

layers = tf_keras.layers


def net() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(3)
    x = inputs = tf_keras.Input((8, 8, 1))
    x = layers.Rescaling(1 / 255.0)(x)
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    model = tf_keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        spread = [
            np.abs(rng.normal(1, 0.3, w.shape))
            if "variance" in w.name
            else rng.normal(0, 0.3, w.shape)
            for w in layer.weights
        ]
        layer.set_weights(spread)
    return model


@pytest.fixture(scope="module")
def settled():
    model = qat.quantize_model(net(), "w2a8", input_range=(0, 255))
    images = np.random.default_rng(1).integers(0, 256, (64, 8, 8, 1)).astype(np.float32)
    qat.calibrate(model, tf.data.Dataset.from_tensors(images))
    before = [weight.numpy() for weight in model.weights]
    return model, before, qat.settle_biases(model), images


def bias_in_steps(model: tf_keras.Model) -> np.ndarray:
    """(β - μ·m) / (1/255 · s_w · |m|) of the first convolution, worked out from its definition."""
    kernel = model.get_layer("quant_conv")._weight_vars[0][0].numpy().astype(float)
    norm = model.get_layer("norm")
    m = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + float(norm.epsilon))
    scale = np.abs(kernel).max(axis=(0, 1, 2)) / 127  # the first layer keeps 8 bits
    return (norm.beta.numpy() - norm.moving_mean.numpy() * m) / (scale * np.abs(m) / 255)


def test_biases_become_whole_numbers_of_steps(settled):
    """Within what float32 holds of a beta and a mean: 2^-23 of the bias."""
    steps = bias_in_steps(settled[0])
    assert 1e3 < np.abs(steps).max() < 2e6
    np.testing.assert_allclose(steps, np.rint(steps), rtol=0, atol=np.abs(steps).max() * 2**-23)


def test_only_biases_change_and_by_little(settled):
    model, before, *_ = settled
    changed = {
        weight.name
        for weight, old in zip(model.weights, before, strict=True)
        if not np.array_equal(weight.numpy(), old)
    }
    assert changed
    assert all("beta" in name or "bias" in name for name in changed), changed


def test_a_second_call_changes_nothing(settled):
    model = settled[0]
    before = [weight.numpy() for weight in model.weights]
    qat.settle_biases(model)
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_allclose(weight.numpy(), old, rtol=2**-22, atol=0)


def test_the_file_stores_just_these_biases(settled, tmp_path):
    """At 2 bits half a step of the bias is much of an output step; settled, no code differs."""
    model, before, _, images = settled
    path = tmp_path / "file.tflite"
    qat.export_tflite(model, path)
    dataset = tf.data.Dataset.from_tensors(images)
    after = qat.verify_tflite(path, model, dataset, layer_examples=0)
    weights = model.get_weights()
    model.set_weights(before)
    qat.export_tflite(model, path)
    unsettled = qat.verify_tflite(path, model, dataset, layer_examples=0)
    model.set_weights(weights)
    assert after.integers_match and unsettled.integers_match
    assert after.max_output_difference_lsb == 0 < unsettled.max_output_difference_lsb


@pytest.fixture(scope="module")
def binary():
    """A file of nothing but 1-bit convolutions, each output an output of the model."""

    def convolutions(x):
        conv = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
        dense = layers.Conv2D(32, 1, use_bias=True)(x)
        return layers.BatchNormalization()(conv), dense

    model = quantized(model_of(convolutions, (9, 9, 16)), recipe(1, 1), data_for_binary())
    return qat.settle_biases(model)


def data_for_binary():
    return [np.random.default_rng(5).normal(0, 1, (32, 9, 9, 16)).astype(np.float32)]


@pytest.mark.parametrize("kernels", ["default", "optimized", "reference"])
def test_all_kernels_round_the_sums_of_signs_as_training_does(binary, kernels, tmp_path):
    path = qat.export_tflite(binary, tmp_path / "binary.tflite")
    x = data_for_binary()
    for file, keras in zip(run_file(path, x, kernels), run_model(binary, x), strict=True):
        assert len(np.unique(keras)) > 50
        np.testing.assert_allclose(file, keras, rtol=0, atol=1e-3 * np.abs(keras).max())


@pytest.fixture(scope="module")
def slopes():
    """PReLU alone, on all codes of its input's grid; slopes of both signs, above 1 and 0."""
    alpha = np.float32([0.25, -0.3, 0.9, 1.0, -0.011, 0.0, 0.6, -0.77, 0.123, 0.05])
    initial = tf_keras.initializers.Constant(alpha)
    build = layers.PReLU(shared_axes=[1, 2], alpha_initializer=initial, name="it")
    model = model_of(build, (16, 16, alpha.size))
    model.get_layer("it").alpha.assign(alpha.reshape(1, 1, -1))
    reals = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 16, 16, 1)
    data = [np.repeat(reals, alpha.size, axis=-1)]
    return quantized(model, "w8a8", data), data


@pytest.mark.parametrize("kernels", ["default", "optimized", "reference"])
def test_settled_slopes_make_up_for_prelus_second_rounding(slopes, kernels, tmp_path):
    model, data = slopes
    path = qat.export_tflite(model, tmp_path / "slopes.tflite")
    written = path.read_bytes()
    (file,) = run_file(path, data, kernels)

    def differing():
        return np.count_nonzero(np.abs(file - run_model(model, data)[0]) > 1e-6)

    layer = next(each for each in model.layers if type(each).__name__ == "QuantizedPReLU")
    layer.early.assign(0.0)
    before = differing()
    qat.settle_biases(model)
    assert before > 0 == differing()
    assert qat.export_tflite(model, path).read_bytes() == written
