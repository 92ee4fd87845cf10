"""Operator layers on their way into the file: simulated, exported, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from small_models import layers

import qat
from qat import operator_layers as made

IMAGE = (8, 6, 4)
LAYERS = {
    "Affine": (lambda: made.Affine(2.0, [1.0, 2, 3, 4]), lambda x: 2 * x + [1, 2, 3, 4]),
    "ChannelScale": (lambda: made.ChannelScale(), lambda x: x),
    "FoldedAway": (lambda: made.FoldedAway("Affine", "conv"), lambda x: x),
    "Pad": (
        lambda: made.Pad([[1, 0], [0, 2], [3, 1]]),
        lambda x: np.pad(x, [[0, 0], [1, 0], [0, 2], [3, 1]]),
    ),
    "ReduceMax": (lambda: made.ReduceMax([3, 1], True), lambda x: x.max((1, 3), keepdims=True)),
    "ReduceMean": (lambda: made.ReduceMean([2]), lambda x: x.mean(2)),
    "Slice": (
        lambda: made.Slice([[-3, None, None], [4, 0, -2], [1, 3, 1]]),
        lambda x: x[:, -3:, 4:0:-2, 1:3],
    ),
}
FUNCTIONS = {
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_sigmoid6": lambda x: np.clip(x + 3, 0, 6) / 6,
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compute_what_numpy_does(kind):
    make, expected = LAYERS[kind]
    x = np.random.default_rng(0).normal(size=(2, *IMAGE)).astype(np.float32)
    layer = make()
    copy = tf_keras.layers.deserialize(tf_keras.layers.serialize(layer))
    assert copy.get_config() == layer.get_config()
    np.testing.assert_allclose(copy(x), expected(x), rtol=1e-6, atol=1e-6)
    assert tuple(layer.compute_output_shape((None, *IMAGE)))[1:] == expected(x).shape[1:]
    assert tuple(layer.compute_output_shape((None, None, 6, 4)))[1] in (None, 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compute_what_numpy_does(name):
    layer = layers.Activation(getattr(made, name))
    copy = tf_keras.layers.deserialize(tf_keras.layers.serialize(layer))
    x = np.linspace(-5, 5, 101, dtype=np.float32)
    np.testing.assert_allclose(copy(x), FUNCTIONS[name](x), atol=1e-6)


def moves(x):
    first, second = tf.split(x[:, 1:], 2, axis=-1)
    return [
        first,
        tf.pad(second, [[0, 0], [1, 2], [0, 0], [0, 1]]),
        x[:, ::-2, 1:-1, ::-1],
        tf.transpose(x[..., 1], [0, 2, 1]),
        tf.reshape(x, [tf.shape(x)[0], -1]),
        tf.reduce_max(x, axis=-1, keepdims=True),
        tf.nn.depth_to_space(x, 2),
        tf.tile(x, [1, 1, 2, 1]),
        tf.image.resize(x, (16, 3), method="nearest"),
    ]


def computations(x):
    y = layers.Conv2D(4, 3, padding="same")(x)
    return [
        tf.nn.relu(x - y),
        1 - x,
        x * [1.0, 2, -3, 4],
        y / 4.0 + 1.0,
        made.ChannelScale()(layers.DepthwiseConv2D(3, use_bias=False)(x)),
        tf.nn.relu(y * 0.5 + 0.1),
        tf.nn.relu6(y + 3) / 6,
        tf.image.resize(x, (16, 12)),
        tf.reduce_mean(x, -1, keepdims=True),
        tf.reduce_sum(x, [1, 2]),
    ]


def preprocessing(x):
    x = layers.RandomFlip()(layers.RandomRotation(0.1)(x))
    x = layers.Normalization(mean=[1.0, 2, 3, 4], variance=[1.0, 2, 3, 4])(x / 4)
    y = layers.Rescaling(0.5, -1.0)(layers.Conv2D(4, 3)(x))
    return [y, layers.Conv2D(4, 3, padding="same")(x)]


def squeeze_and_excite(x):
    """As EfficientNet and MobileNetV3 do it, in a residual block with a drop path."""
    x = y = layers.Conv2D(6, 3, padding="same", activation="relu")(x)
    gate = layers.Reshape((1, 1, 6))(layers.GlobalAveragePooling2D()(y))
    gate = layers.Conv2D(8, 1, activation="relu")(gate)
    y = layers.Multiply()([y, layers.Conv2D(6, 1, activation="sigmoid")(gate)])
    gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = layers.ReLU(6.0)(layers.Conv2D(6, 1)(gate) + 3.0) * (1.0 / 6.0)
    y = layers.Dropout(0.2, noise_shape=(None, 1, 1, 1))(y * gate)
    return layers.Add()([x, y])


def shared_and_nested(x):
    inputs = layers.Input(IMAGE)
    y = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", name="conv")(inputs))
    inner = tf_keras.Model(inputs, [tf.nn.relu(y), y], name="inner")
    first, second = inner(x)
    third, _ = inner(first)
    head = tf_keras.Sequential([layers.Conv2D(3, 1, name="conv"), layers.Flatten()], name="head")
    return layers.Dense(5)(head(second + third))


# The most that an output of the file may be off, in steps; sums that pass on what is off, more.
NETWORKS = {
    moves: 0,
    computations: 1,
    preprocessing: 1,
    squeeze_and_excite: 2,
    shared_and_nested: 3,
}
SLOW = (moves, computations, preprocessing, squeeze_and_excite, shared_and_nested)


@pytest.mark.parametrize(
    "build",
    [pytest.param(b, marks=pytest.mark.slow if b in SLOW else (), id=b.__name__) for b in NETWORKS],
)
def test_files_hold_the_model_in_integers(build, tmp_path):
    model = small_models.model_of(build, IMAGE)
    data = small_models.data_for(model, 24)
    quantized = qat.settle_biases(small_models.quantized(model, "w8a8", data))
    path = tmp_path / "model.tflite"
    qat.export_tflite(quantized, path)
    found = qat.verify_tflite(path, quantized, small_models.batches(data))
    assert found.integers_match and found.float_operators == []
    assert found.max_output_difference_lsb <= NETWORKS[build]
    assert found.output_snr_db > 30
    # The quantized model computes about what the float model does.
    for expected, actual in zip(
        small_models.run_model(model, data), small_models.run_model(quantized, data), strict=True
    ):
        assert np.abs(expected - actual).max() <= 0.1 * np.abs(expected).max()
    # The reference kernels' codes are the simulator's.
    exact = small_models.run_model(qat.ExactModel(quantized), data)
    for expected, actual in zip(small_models.run_file(path, data, "reference"), exact, strict=True):
        np.testing.assert_array_equal(expected, actual)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(8, 16), (4, 8)])
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_other_widths_are_integers_too(build, bits, tmp_path):
    model = small_models.model_of(build, IMAGE)
    data = small_models.data_for(model, 24)
    quantized = qat.settle_biases(small_models.quantized(model, small_models.recipe(*bits), data))
    path = tmp_path / "model.tflite"
    qat.export_tflite(quantized, path)
    found = qat.verify_tflite(path, quantized, small_models.batches(data))
    assert found.integers_match and found.float_operators == []
    assert found.output_snr_db > 30


@pytest.mark.slow
def test_quantized_models_with_operator_layers_are_saved_and_loaded(tmp_path):
    model = small_models.model_of(computations, IMAGE)
    data = small_models.data_for(model, 4)
    quantized = small_models.quantized(model, "w8a8", data)
    qat.save_model(quantized, tmp_path / "m.keras", recipe=qat.Recipe.from_name("w8a8"))
    loaded = qat.load_quantized_model(tmp_path / "m.keras")
    for one, two in zip(
        small_models.run_model(quantized, data), small_models.run_model(loaded, data), strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_layers_kept_in_float_compute_the_same(tmp_path):
    def build(x):
        y = made.ChannelScale(name="kept_scale")(x)
        y = tf.nn.relu6(layers.Conv2D(4, 1, name="kept")(y + 1.0) + 3) / 6
        return layers.Conv2D(3, 3)(y)

    rules = [qat.Rule(layer=name, keep_float="x") for name in ("kept*", "tf.*")]
    model = small_models.model_of(build, IMAGE)
    data = small_models.data_for(model, 8)
    recipe = qat.Recipe.from_name("w8a8").with_rules(*rules)
    quantized = small_models.quantized(model, recipe, data)
    path = tmp_path / "model.tflite"
    qat.export_tflite(quantized, path)
    found = qat.verify_tflite(path, quantized, small_models.batches(data))
    assert found.integers_match and found.max_output_difference_lsb <= 1


def test_a_crop_that_resizes_is_refused():
    model = small_models.model_of(lambda x: layers.RandomCrop(4, 4, name="crop")(x), IMAGE)
    with pytest.raises(ValueError, match="'crop' .RandomCrop. cannot be quantized: it resizes"):
        qat.quantize_model(model)
