"""Re-estimated statistics against NumPy's averages over the same batches."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_models import batches, data_for, model_of, quantized

import qat
from qat.errors import ModelError

layers = tf_keras.layers


def net(x):
    x = layers.Conv2D(4, 3, name="one")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm1")(x))
    x = layers.Conv2D(3, 3, name="two")(x)
    return layers.BatchNormalization(name="norm2")(x)


@pytest.fixture(scope="module")
def model():
    return quantized(model_of(net, (8, 8, 2)), "w4a4")


def test_statistics_are_averages_over_batches(model):
    (x,) = data_for(model, 96, seed=3)
    convolved = tf_keras.Model(model.inputs, model.get_layer("norm1").input)
    parts = [convolved(x[i : i + 32]).numpy().astype(np.float64) for i in (0, 32, 64)]
    before = {w.name: w.numpy() for w in model.weights}
    qat.reestimate_batch_norm(model, batches([x], 32))
    norm = model.get_layer("norm1")
    mean = np.mean([part.mean((0, 1, 2)) for part in parts], axis=0)
    # Keras stores the unbiased variance of a batch.
    size = parts[0][..., 0].size
    variance = np.mean([part.var((0, 1, 2)) for part in parts], axis=0) * size / (size - 1)
    np.testing.assert_allclose(norm.moving_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-5)
    changed = {w.name for w in model.weights if not np.array_equal(before[w.name], w.numpy())}
    assert changed == {
        f"{norm}/moving_{what}:0" for norm in ("norm1", "norm2") for what in ("mean", "variance")
    }
    assert norm.momentum == 0.99


def test_a_layer_called_twice_has_the_statistics_of_both_calls():
    """Each call overwrites the moving statistics of the one before."""
    norm = layers.BatchNormalization(name="norm", center=False, scale=False)
    inputs = [tf_keras.Input((6, 6, 2)) for _ in range(2)]
    model = tf_keras.Model(inputs, layers.Add()([norm(x) for x in inputs]))
    rng = np.random.default_rng(0)
    pair = [rng.normal(m, s, (32, 6, 6, 2)).astype(np.float32) for m, s in ((0, 1), (8, 3))]
    model = qat.calibrate(qat.quantize_model(model, "w8a8"), batches(pair, 16))
    qat.reestimate_batch_norm(model, batches(pair, 16))
    halves = [x.astype(np.float64) for x in pair]  # batches of 16 are joined
    size = halves[0][..., 0].size
    norm = model.get_layer("norm")
    mean = np.mean([half.mean((0, 1, 2)) for half in halves], axis=0)
    variance = np.mean([half.var((0, 1, 2)) for half in halves], axis=0) * size / (size - 1)
    np.testing.assert_allclose(norm.moving_mean, mean, atol=0.05)  # of 8-bit inputs
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=0.02)


@pytest.mark.parametrize("arguments", [((), {"training": False}), ((False,), {})])
def test_a_call_in_inference_keeps_its_statistics(arguments):
    """The idiom of fine-tuning, for a pretrained part that is trainable otherwise."""
    x, args, kwargs = tf_keras.Input((6,)), *arguments
    kept, free = layers.BatchNormalization(name="kept"), layers.BatchNormalization(name="free")
    model = tf_keras.Model(x, free(kept(x, *args, **kwargs), None))
    rng = np.random.default_rng(1)
    kept.set_weights([rng.uniform(0.5, 1.5, 6) for _ in range(4)])
    before, (gamma, beta, mean, variance) = kept.get_weights(), kept.get_weights()
    data = rng.normal(7.0, 2.0, (40, 6)).astype(np.float32)
    qat.reestimate_batch_norm(model, batches([data], 32))
    for one, other in zip(before, kept.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    normalized = (data - mean) / np.sqrt(variance + kept.epsilon) * gamma + beta
    # The second batch is a quarter of the first: its mean counts a quarter.
    np.testing.assert_allclose(free.moving_mean, normalized.mean(0), rtol=1e-4)


def test_steps_limit_the_batches(model):
    (x,) = data_for(model, 64, seed=4)
    qat.reestimate_batch_norm(model, batches([x], 32), steps=1)
    one = model.get_layer("norm2").moving_mean.numpy()
    qat.reestimate_batch_norm(model, batches([x[:32]], 32))
    np.testing.assert_array_equal(one, model.get_layer("norm2").moving_mean)


@pytest.mark.parametrize(
    "count, size, joined", [(70, 1, [32, 38]), (64, 24, [64]), (99, 16, [32, 32, 35]), (9, 2, [9])]
)
def test_small_batches_are_joined(count, size, joined, model):
    """A rest joins the batch before it."""
    (x,) = data_for(model, count, seed=6)
    qat.reestimate_batch_norm(model, batches([x], size), steps=None)
    found = model.get_layer("norm2").get_weights()
    parts = iter(np.split(x, np.cumsum(joined)[:-1]))
    whole = tf.data.Dataset.from_generator(
        lambda: parts, output_signature=tf.TensorSpec((None, 8, 8, 2))
    )
    qat.reestimate_batch_norm(model, whole, steps=None)
    for one, other in zip(found, model.get_layer("norm2").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_steps_count_joined_batches_of_a_stream_without_end(model):
    (x,) = data_for(model, 64, seed=7)
    qat.reestimate_batch_norm(model, batches([x], 2).repeat(), steps=2)
    found = model.get_layer("norm2").get_weights()
    qat.reestimate_batch_norm(model, batches([x], 32))
    for one, other in zip(found, model.get_layer("norm2").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_too_few_values_leave_statistics_alone(caplog):
    """Ten examples give a convolution's channel hundreds of values, a dense layer's ten."""

    def build(x):
        x = layers.BatchNormalization(name="of_images")(layers.Conv2D(4, 3)(x))
        x = layers.Dense(5)(layers.Flatten()(layers.ReLU()(x)))
        return layers.BatchNormalization(name="of_vectors")(x)

    model = quantized(model_of(build, (8, 8, 2)), "w4a4")
    norms = {name: model.get_layer(name) for name in ("of_images", "of_vectors")}
    (x,) = data_for(model, 31, seed=8)
    before = {name: norm.moving_mean.numpy() for name, norm in norms.items()}
    qat.reestimate_batch_norm(model, batches([x[:10]], 5))
    assert "10 examples are too few" in caplog.text
    assert "of_vectors" in caplog.text and "of_images" not in caplog.text
    assert not np.array_equal(before["of_images"], norms["of_images"].moving_mean)
    np.testing.assert_array_equal(before["of_vectors"], norms["of_vectors"].moving_mean)
    qat.reestimate_batch_norm(model, batches([np.concatenate([x, x])], 1))
    assert not np.array_equal(before["of_vectors"], norms["of_vectors"].moving_mean)


def test_frozen_layers_stay(model):
    norm, (x,) = model.get_layer("norm1"), data_for(model, 16, seed=5)
    before = norm.moving_mean.numpy()
    norm.trainable = False
    qat.reestimate_batch_norm(model, batches([x]))
    norm.trainable = True
    np.testing.assert_array_equal(before, norm.moving_mean)


def test_an_empty_dataset_changes_nothing(model):
    before = model.get_layer("norm1").moving_mean.numpy()
    with pytest.raises(ModelError, match="empty"):
        qat.reestimate_batch_norm(
            model, tf.data.Dataset.from_tensors(np.zeros((1, 8, 8, 2))).take(0)
        )
    np.testing.assert_array_equal(before, model.get_layer("norm1").moving_mean)


def test_layers_can_be_tapped_afterwards(model):
    (x,) = data_for(model, 16, seed=6)
    qat.reestimate_batch_norm(model, batches([x]))
    tapped = tf_keras.Model(model.inputs, model.get_layer("norm1").output)
    assert tapped(x).shape == (16, 6, 6, 4)


def test_statistics_that_are_no_numbers_are_refused():
    """A later layer's: the first is measured on sound values."""
    spoiled = quantized(model_of(net, (8, 8, 2)), "w8a8")
    kernel = spoiled.get_layer("quant_two")._weight_vars[0][0]
    kernel.assign(tf.fill(kernel.shape, np.nan))
    before = [spoiled.get_layer(name).get_weights() for name in ("norm1", "norm2")]
    with pytest.raises(ModelError, match="'norm2' gets NaN"):
        qat.reestimate_batch_norm(spoiled, batches(data_for(spoiled, 16)))
    for name, weights in zip(("norm1", "norm2"), before, strict=True):
        for one, other in zip(weights, spoiled.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_nested_model_is_named():
    inner = tf_keras.Sequential([layers.Input((4,)), layers.BatchNormalization()], name="inner")
    x = tf_keras.Input((4,))
    outer = tf_keras.Model(x, inner(x))
    with pytest.raises(ModelError, match="layer 'inner' is a model.*quantize the model first"):
        qat.reestimate_batch_norm(outer, tf.data.Dataset.from_tensors(np.zeros((16, 4), "f4")))


@pytest.mark.parametrize("trains", [True, False])
def test_nested_models_without_anything_to_measure(trains):
    inside = [] if trains else [layers.BatchNormalization()]
    inner = tf_keras.Sequential([layers.Input((4,)), layers.GaussianNoise(0.1), *inside])
    inner.trainable = trains
    x, norm = tf_keras.Input((4,)), layers.BatchNormalization()
    data = np.random.default_rng(0).normal(3.0, 1.0, (64, 4)).astype(np.float32)
    qat.reestimate_batch_norm(tf_keras.Model(x, norm(inner(x))), tf.data.Dataset.from_tensors(data))
    np.testing.assert_allclose(norm.moving_mean, data.mean(0), rtol=2e-3)
