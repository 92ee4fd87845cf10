"""calibrate: ranges that suit the data, found without training, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from small_models import layers

import qat
from qat import quantizers, ranges
from qat.errors import QatError

DECAY = 0.99  # of MovingAverageQuantizer


def network(x):
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.5, name="drop")(layers.ReLU(name="relu")(x))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv2")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.AveragePooling2D(name="average")(layers.ReLU(name="relu2")(x))
    return layers.Dense(3, name="logits")(layers.Flatten()(x))


@pytest.fixture(scope="module")
def net():
    return small_models.model_of(network, (6, 6, 2))


@pytest.fixture(scope="module")
def data():
    """Four batches of 16 whose ranges differ."""
    rng = np.random.default_rng(0)
    scales = np.reshape([1, 3, 0.5, 2], (4, 1, 1, 1, 1))
    return (rng.normal(0, 1, (4, 16, 6, 6, 2)) * scales).astype(np.float32)


@pytest.fixture(scope="module")
def fresh(net):
    """`fresh(recipe)`: the net quantized and not calibrated. Each recipe's is made once."""
    made = {}

    def get(recipe: str = "w8a8") -> tf_keras.Model:
        if recipe not in made:
            model = qat.quantize_model(net, recipe)
            made[recipe] = model, model.get_weights()
        model, weights = made[recipe]
        model.set_weights(weights)
        return model

    return get


@pytest.fixture()
def model(fresh):
    return fresh()


def dataset(batches) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(batches)


def grid_of(model, name: str):
    layer = model.get_layer(name)
    return layer.quantizer.grid(layer.quantizer_weights).numpy()


def range_of(model, name: str) -> tuple[float, float]:
    weights = model.get_layer(name).quantizer_weights
    assert float(weights["observed"]) == 1.0
    return float(weights["minimum"]), float(weights["maximum"])


def tapped(model, tensor, batches) -> np.ndarray:
    """Values of a symbolic tensor of the model over the batches, in inference."""
    part = tf_keras.Model(model.inputs, tensor)
    return np.concatenate([part(batch, training=False).numpy().ravel() for batch in batches])


def into(model, name: str, batches) -> np.ndarray:
    return tapped(model, model.get_layer(name).input, batches)


def kernel_of(model, name: str) -> tf.Variable:
    return model.get_layer(f"quant_{name}")._weight_vars[0][0]


# Methods.


def test_minmax_is_the_range_of_all_batches(model, net, data):
    assert qat.calibrate(model, dataset(data), activations="minmax") is model
    assert range_of(model, "in0_fake_quantize") == (data.min(), data.max())
    # The convolution's output, with weights quantized: near the float model's.
    hidden = tapped(net, net.get_layer("relu").output, data)
    minimum, maximum = range_of(model, "relu_fake_quantize")
    assert minimum == 0
    assert maximum == pytest.approx(hidden.max(), rel=0.05)


def test_percentile_leaves_the_outliers_out(model, data):
    spoiled = data.copy()
    spoiled[2, 3, 1, 1, 0] = 1000.0
    qat.calibrate(model, dataset(spoiled), activations="percentile", percentile=98.0)
    expected = np.percentile(spoiled, [2, 98])
    # A bin of the histogram is 1/64 of its values wide.
    np.testing.assert_allclose(range_of(model, "in0_fake_quantize"), expected, rtol=1 / 64)
    qat.calibrate(model, dataset(spoiled), activations="percentile", percentile=100)
    assert range_of(model, "in0_fake_quantize") == (spoiled.min(), 1000.0)


@pytest.fixture(scope="module")
def unrounded(net, data):
    """What flows into each quantizer of the calibrated 8-bit model."""
    model = qat.calibrate(qat.quantize_model(net), dataset(data), activations="minmax")
    names = [layer.name for layer in model.layers if isinstance(layer, qat.FakeQuantize)]
    assert len(names) == 4
    return {name: into(model, name, data) for name in names}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a2", "w8a4-pact", "w8a3-lsqplus", "w8a16"])
def test_mse_is_no_worse_than_minmax_on_every_tensor(fresh, data, unrounded, recipe):
    errors = {name: [] for name in unrounded}
    for method in ("minmax", "mse"):
        model = qat.calibrate(fresh(recipe), dataset(data), activations=method, batch_norm=False)
        for name, x in unrounded.items():
            grid = grid_of(model, name)
            errors[name].append(np.square(grid.dequantize(grid.quantize(x)) - x).mean())
    for name, (minmax, mse) in errors.items():
        # At 8 and 16 bits the rounding in `unrounded` itself is as large as the error.
        assert mse <= minmax * (1.02 if recipe in ("w8a8", "w8a16") else 1.001), name
    if recipe == "w8a2":
        assert errors["relu_fake_quantize"][1] < 0.7 * errors["relu_fake_quantize"][0]


@pytest.mark.parametrize("recipe", ["w4a8", "wta8-lsq", "w2a8", "w8a8-lsq"])
def test_kernels_get_their_channels_bounds(fresh, data, recipe):
    model = fresh(recipe)
    kernel, quantizer, weights = model.get_layer("quant_conv2")._weight_vars[0]
    before = kernel.numpy()
    options = {"num_bits": quantizer.num_bits, "narrow_range": quantizer.narrow_range}
    bounds = {
        "minmax": np.abs(before).max((0, 1, 2), keepdims=True),
        "mse": ranges.mse_bound(tf.constant(before), (-1,), **options),
    }
    for method, bound in bounds.items():
        qat.calibrate(model, dataset(data), weights=method, batch_norm=False)
        grid = quantizer.grid(weights)
        np.testing.assert_allclose(grid.scale * grid.qmax, bound, rtol=1e-6)
        np.testing.assert_array_equal(weights["gain"], np.ones_like(bound))
        np.testing.assert_array_equal(kernel, before)


# How the batches are run.


def test_no_range_depends_on_another_tensors_rounding(net, data, unrounded):
    """At 2 bits rounded inputs would move the next tensor's range by tens of percent."""
    model = qat.quantize_model(net, small_models.recipe(8, 2), input_range=(-8, 8))
    qat.calibrate(model, dataset(data), activations="minmax", batch_norm=False)
    for name in ("relu_fake_quantize", "relu2_fake_quantize"):
        expected = unrounded[name].max()
        assert float(grid_of(model, name).highest) == pytest.approx(expected, rel=0.02)


def test_signs_stay_signs(fresh, data):
    """Inputs a hundred times as large leave what is behind a sign as it was."""
    found = []
    for factor in (1, 100):
        model = fresh("w8a1")
        qat.calibrate(model, dataset(factor * data), activations="minmax", batch_norm=False)
        in_front, behind = (
            float(grid_of(model, name).highest)
            for name in ("norm_fake_quantize", "relu2_fake_quantize")
        )
        found.append((in_front, behind))
    assert found[1][0] > 50 * found[0][0]
    assert found[1][1] == pytest.approx(found[0][1], rel=0.3)
    # Rounding in front of the sign turns some values just below 0 to +1.
    signed = into(model, "relu2_fake_quantize", 100 * data)
    assert behind == pytest.approx(signed.max(), rel=0.1)


def shared(observe: bool) -> tf_keras.Model:
    x = tf_keras.Input([4])
    layer = qat.FakeQuantize(quantizers.MovingAverageQuantizer(), name="fq")
    y = layer(layers.Rescaling(-3.0)(layer(x)), observe=observe)
    return tf_keras.Model(x, y)


def test_calls_that_are_not_observed_do_not_count():
    x = np.linspace(-1, 2, 64, dtype=np.float32).reshape(1, 16, 4)
    model = qat.calibrate(shared(observe=False), dataset(x), activations="minmax")
    assert range_of(model, "fq") == (-1, 2)
    model = qat.calibrate(shared(observe=True), dataset(x), activations="minmax")
    assert range_of(model, "fq") == (-6, 3)


def test_steps_limit_the_batches(model, data):
    qat.calibrate(model, dataset(data), steps=1, activations="minmax")
    assert range_of(model, "in0_fake_quantize") == (data[0].min(), data[0].max())


def test_labels_are_ignored(model, data):
    labelled = dataset((data, np.zeros((4, 16), np.int64)))
    qat.calibrate(model, labelled, activations="minmax")
    assert range_of(model, "in0_fake_quantize") == (data.min(), data.max())


def test_several_inputs(data):
    def joined(x, y):
        return layers.Dense(2)(layers.Concatenate(name="both")([x, y]))

    net = small_models.model_of(joined, (3,), (5,))
    x, y = small_models.data_for(net, 64)
    for content in [(x, 2 * y), ((x, 2 * y), np.zeros(64)), {"in0": x, "in1": 2 * y}]:
        model = qat.quantize_model(net)
        qat.calibrate(model, dataset(content).batch(16), activations="minmax")
        low, high = range_of(model, "both_fake_quantize")
        assert (low, high) == (min(x.min(), 2 * y.min()), max(x.max(), 2 * y.max()))


# What else changes, and what does not.


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


@pytest.mark.parametrize(
    ("recipe", "asked", "measured"),
    [
        ("w8a8", None, False),
        ("w8a8", True, True),
        pytest.param("w5a5", None, False, marks=pytest.mark.slow),
        ("w4a8", None, True),
        ("w8a4", None, True),
        pytest.param("w1a1", None, True, marks=pytest.mark.slow),
        pytest.param("wta8", None, True, marks=pytest.mark.slow),
        ("w2a2", False, False),
    ],
)
def test_batch_norm_statistics(fresh, data, recipe, asked, measured):
    """They follow the rounded network where rounding is coarse, or where one asks for it."""
    model = fresh(recipe)
    norm = model.get_layer("norm2")
    before = norm.get_weights()
    qat.calibrate(model, dataset(data), batch_norm=asked)
    after = norm.get_weights()
    for kept in (0, 1):  # gamma and beta
        np.testing.assert_array_equal(before[kept], after[kept])
    assert np.array_equal(before[2], after[2]) is not measured
    # They are those of the network as it is now.
    again = qat.reestimate_batch_norm(model, dataset(data)).get_layer("norm2").get_weights()
    close = np.allclose(after[2], again[2], rtol=1e-5, atol=1e-6)
    assert close is measured


def test_training_goes_on_from_the_range(model, data):
    """The first training batch moves a range by its share of the running average, no more."""
    qat.calibrate(model, dataset(data), activations="minmax")
    model(data[2], training=True)
    weights = model.get_layer("in0_fake_quantize").quantizer_weights
    assert float(weights["observed"]) == pytest.approx(1.0)
    expected = DECAY * data.max() + (1 - DECAY) * data[2].max()
    assert float(weights["maximum"]) == pytest.approx(expected, rel=1e-6)


def test_inference_afterwards_observes_nothing(model, data):
    qat.calibrate(model, dataset(data))
    before = model.get_weights()
    model(100 * data[0], training=False)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_collecting_ends_with_an_error_too(fresh, data):
    def broken():
        yield data[0]
        raise RuntimeError("disk gone")

    model = fresh("w4a4")
    source = tf.data.Dataset.from_generator(
        broken, output_signature=tf.TensorSpec((16, 6, 6, 2), tf.float32)
    )
    norm = model.get_layer("norm").get_weights()
    with pytest.raises(tf.errors.OpError):
        qat.calibrate(model, source)
    for one, other in zip(norm, model.get_layer("norm").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_can_be_tapped_afterwards(fresh, data):
    model = qat.calibrate(fresh("w4a4"), dataset(data))
    assert into(model, "relu2_fake_quantize", data).min() == 0


def test_a_given_input_range_is_not_observed(net, data):
    model = qat.calibrate(qat.quantize_model(net, input_range=(-1, 2)), dataset(data))
    layer = model.get_layer("in0_fake_quantize")
    assert {weight.name.split("/")[-1]: float(weight) for weight in layer.weights} == {
        "output_minimum:0": -1.0,
        "output_maximum:0": 2.0,
    }
    np.testing.assert_allclose(grid_of(model, "in0_fake_quantize").scale, 3 / 255, rtol=1e-6)


def test_quantizers_in_tfmots_wrappers(net, data, tmp_path):
    """Plain TFMOT keeps the output's quantizer inside its wrapper, and has its own at the input."""
    keras = tfmot.quantization.keras
    x = layers.Input([6, 6, 2])
    config = qat.configs.uniform(weight_bits=8)
    annotated = keras.quantize_annotate_layer(layers.Conv2D(3, 3, name="conv"), config)
    with keras.quantize_scope():
        model = keras.quantize_apply(tf_keras.Model(x, annotated(x)))
    qat.calibrate(model, dataset(data), activations="minmax")
    wrapper = model.get_layer("quant_conv")
    (kernel, quantizer, _) = wrapper._weight_vars[0]
    rounded = quantizer(tf.convert_to_tensor(kernel), False, {})
    # TFMOT's input quantizer has eight bits of the range so far.
    values = [tf.nn.conv2d(batch, rounded, 1, "VALID") + wrapper.layer.bias for batch in data]
    found = {key: float(value) for key, value in wrapper._output_quantizer_vars.items()}
    expected = {"minimum": np.min(values), "maximum": np.max(values), "observed": 1.0}
    assert found == pytest.approx(expected, rel=0.02)
    # TensorFlow's bookkeeping of lists takes exchanged elements ill.
    tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    outputs = model(data[0], training=False).numpy()
    assert len(np.unique(outputs)) <= 256


def test_a_range_for_each_channel_is_its_own(data):
    x = tf_keras.Input([6, 6, 2])
    quantizer = quantizers.MovingAverageQuantizer(channel_axes=(-1,))
    model = tf_keras.Model(x, qat.FakeQuantize(quantizer, name="fq")(x))
    qat.calibrate(model, dataset(data * np.float32([1, 5])))
    weights = model.get_layer("fq").quantizer_weights
    expected = data.max((0, 1, 2, 3)) * np.float32([1, 5])
    np.testing.assert_array_equal(np.ravel(weights["maximum"]), expected)


# Quality, and mistakes.


@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_eight_bits_stay_close_to_float(model, net, method):
    """Tensors of 8 bits over ±5 standard deviations have 39 dB each: 1 / (12 · (255 / 10)²).

    30 dB leave room for five of them in a row, and none for a wrong grid.
    """
    (x,) = small_models.data_for(net, 64)
    qat.calibrate(model, small_models.batches([x], 16), activations=method)
    (expected,), (actual,) = small_models.run_model(net, [x]), small_models.run_model(model, [x])
    noise = np.square(expected - actual).mean()
    assert 10 * np.log10(expected.var() / noise) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "entropy"}, "activations='entropy'; legal: mse, percentile, minmax"),
        ({"weights": "percentile"}, "weights='percentile'; legal: mse, minmax"),
        ({"percentile": 40}, "percentile must lie above 50"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_illegal_options(model, data, options, message):
    with pytest.raises(QatError, match=message) as error:
        qat.calibrate(model, dataset(data), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", ["w8a8", "w2a2"])
def test_bad_data_and_bad_models(net, fresh, data, recipe):
    model = fresh(recipe)
    before = model.get_layer("norm").get_weights()
    spoiled = data.copy()
    spoiled[1, 2, 3, 3, 0] = np.nan
    for source, message in [(dataset(data).take(0), "empty"), (dataset(spoiled), "batch 2 .*NaN")]:
        with pytest.raises(QatError, match=message) as error:
            qat.calibrate(model, source)
        assert "\n" not in str(error.value)
    for one, other in zip(before, model.get_layer("norm").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(QatError, match="quantize_model") as error:
        qat.calibrate(net, dataset(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("w8a8", "'relu_fake_quantize' gets NaN"), ("w4a8", "'norm' gets NaN")],
)
def test_weights_that_are_no_numbers(fresh, data, recipe, message):
    model = fresh(recipe)
    kernel = kernel_of(model, "conv")
    kernel.assign(tf.fill(kernel.shape, np.nan))
    with pytest.raises(QatError, match=message):
        qat.calibrate(model, dataset(data))
    if recipe == "w4a8":
        kernel = kernel_of(model, "conv2")
        kernel.assign(tf.fill(kernel.shape, np.nan))
        with pytest.raises(QatError, match="'conv2' has NaN or infinite weights"):
            qat.calibrate(model, dataset(data))
