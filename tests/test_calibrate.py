"""calibrate: ranges are the data's own, and nothing else in the model changes."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
from small_models import layers

import qat
from qat.errors import QatError

DECAY = 0.99  # of MovingAverageQuantizer


def network(x):
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.5, name="drop")(layers.ReLU(name="relu")(x))
    x = layers.AveragePooling2D(name="average")(x)
    return layers.Dense(3, name="logits")(layers.Flatten()(x))


@pytest.fixture(scope="module")
def net():
    return small_models.model_of(network, (6, 6, 2))


@pytest.fixture(scope="module")
def data():
    """Four batches of 8 whose ranges differ."""
    rng = np.random.default_rng(0)
    return (rng.normal(0, 1, (4, 8, 6, 6, 2)) * np.reshape([1, 3, 0.5, 2], (4, 1, 1, 1, 1))).astype(
        np.float32
    )


@pytest.fixture()
def model(net):
    return qat.quantize_model(net)


def dataset(batches) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(batches)


def stored_range(model, name: str) -> tuple[float, float]:
    weights = model.get_layer(name).quantizer_weights
    share = float(weights["observed"])
    return float(weights["minimum"]) / share, float(weights["maximum"]) / share


def averaged(values) -> float:
    """The debiased moving average of a few numbers, in closed form."""
    weights = [DECAY ** (len(values) - 1 - i) for i in range(len(values))]
    return float(np.average(values, weights=weights))


def test_ranges_are_the_averages_of_the_batches(model, net, data):
    assert qat.calibrate(model, dataset(data)) is model
    minimum, maximum = stored_range(model, "in0_fake_quantize")
    axes = (1, 2, 3, 4)
    np.testing.assert_allclose(minimum, averaged(data.min(axes)), rtol=1e-5)
    np.testing.assert_allclose(maximum, averaged(data.max(axes)), rtol=1e-5)
    # The convolution's output, with weights and inputs quantized: near the float model's.
    hidden = [net.get_layer("relu")(small_relu_input(net, batch)).numpy() for batch in data]
    minimum, maximum = stored_range(model, "relu_fake_quantize")
    assert minimum == 0
    np.testing.assert_allclose(maximum, averaged([h.max() for h in hidden]), rtol=0.05)


def small_relu_input(net, batch):
    return net.get_layer("norm")(net.get_layer("conv")(batch), training=False)


def test_steps_limit_the_batches(model, data):
    qat.calibrate(model, dataset(data), steps=2)
    minimum, maximum = stored_range(model, "in0_fake_quantize")
    np.testing.assert_allclose(minimum, averaged(data[:2].min((1, 2, 3, 4))), rtol=1e-5)
    np.testing.assert_allclose(maximum, averaged(data[:2].max((1, 2, 3, 4))), rtol=1e-5)


def test_labels_are_ignored(model, data):
    labelled = tf.data.Dataset.from_tensor_slices((data, np.zeros((4, 8), np.int64)))
    qat.calibrate(model, labelled)
    _, maximum = stored_range(model, "in0_fake_quantize")
    np.testing.assert_allclose(maximum, averaged(data.max((1, 2, 3, 4))), rtol=1e-5)


def test_only_ranges_change(model, data):
    """Neither weights nor batch norm statistics; dropout is off, so twice gives the same."""
    observers = [layer for layer in model.layers if isinstance(layer, qat.FakeQuantize)]
    of_ranges = {id(weight) for layer in observers for weight in layer.weights}
    before = {id(weight): weight.numpy() for weight in model.weights}
    qat.calibrate(model, dataset(data))
    for weight in model.weights:
        same = np.array_equal(before[id(weight)], weight.numpy())
        assert same != (id(weight) in of_ranges) or weight.name.endswith("minimum:0"), weight.name
    after = [weight.numpy() for weight in model.weights]
    model.set_weights([before[id(weight)] for weight in model.weights])
    qat.calibrate(model, dataset(data))
    for one, other in zip(after, model.weights, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


def test_inference_afterwards_observes_nothing(model, data):
    qat.calibrate(model, dataset(data))
    before = model.get_weights()
    model(100 * data[0], training=False)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_observing_ends_with_an_error_too(model, data):
    def broken():
        yield data[0]
        raise RuntimeError("disk gone")

    source = tf.data.Dataset.from_generator(
        broken, output_signature=tf.TensorSpec((8, 6, 6, 2), tf.float32)
    )
    with pytest.raises(tf.errors.OpError):
        qat.calibrate(model, source)
    before = model.get_weights()
    model(100 * data[0], training=False)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_given_input_range_is_not_observed(net, data):
    model = qat.calibrate(qat.quantize_model(net, input_range=(-1, 2)), dataset(data))
    layer = model.get_layer("in0_fake_quantize")
    grid = layer.quantizer.grid(layer.quantizer_weights)
    assert {weight.name.split("/")[-1]: float(weight) for weight in layer.weights} == {
        "output_minimum:0": -1.0,
        "output_maximum:0": 2.0,
    }
    np.testing.assert_allclose(float(grid.scale), 3 / 255, rtol=1e-6)


def test_eight_bits_stay_close_to_float(model, net):
    """Tensors of 8 bits over ±5 standard deviations have 39 dB each: 1 / (12 · (255 / 10)²).

    Averaged ranges cut off each batch's own extremes; 20 dB leave room for both, and none for a
    wrong grid.
    """
    (x,) = small_models.data_for(net, 64)
    qat.calibrate(model, small_models.batches([x], 16))
    (expected,), (actual,) = small_models.run_model(net, [x]), small_models.run_model(model, [x])
    noise = np.square(expected - actual).mean()
    assert 10 * np.log10(expected.var() / noise) > 20


def test_an_empty_dataset_and_a_float_model(model, net, data):
    with pytest.raises(QatError, match="empty") as error:
        qat.calibrate(model, dataset(data).take(0))
    assert "\n" not in str(error.value)
    with pytest.raises(QatError, match="quantize") as error:
        qat.calibrate(net, dataset(data))
    assert "\n" not in str(error.value)
