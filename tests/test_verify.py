"""verify_tflite and evaluate_tflite against numbers worked out here from the file's outputs."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tensorflow_datasets as tfds
import tf_keras
from small_models import layers

import qat
import qat.digits  # noqa: F401  registers the dataset
from qat.errors import QatError
from qat.tflite_file import FileError, read_file
from qat.verify import evaluate
from qat.verify.evaluate import evaluate_tflite
from qat.verify.interpreter import Runner
from qat.verify.outputs import Output

IMAGE = (8, 8, 1)


def classifier(x):
    x = layers.Conv2D(4, 3, use_bias=False, activation="relu", name="conv")(x)
    return layers.Dense(10, name="logits")(layers.Flatten()(x))


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (50, *IMAGE)).astype(np.float32)


@pytest.fixture(scope="module")
def model(pixels):
    net = small_models.model_of(lambda x: classifier(layers.Rescaling(1 / 255)(x)), IMAGE)
    return small_models.quantized(net, "w4a8", [pixels], input_range=(0, 255))


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    return {
        io: qat.export_tflite(model, folder / f"{io}.tflite", io=io)
        for io in ("float32", "int8", "uint8")
    }


def dataset(x, y=None, size: int = 16) -> tf.data.Dataset:
    content = x if y is None else (x, y)
    return tf.data.Dataset.from_tensor_slices(content).batch(size)


def reals(path, pixels) -> np.ndarray:
    """The file's outputs in Keras units, by the plain interpreter."""
    output = read_file(path).outputs[0]
    offset = {"float32": 0, "int8": 128, "uint8": 0}[output.dtype]
    (raw,) = small_models.run_file(path, [pixels - offset])
    if output.dtype == "float32":
        return raw
    return (raw.astype(float) - output.zero_point[0]) * output.scale[0]


@pytest.mark.parametrize("io", ["float32", "int8", "uint8"])
def test_every_field(model, paths, pixels, io):
    expected, actual = model(pixels, training=False).numpy(), reals(paths[io], pixels)
    labels = actual.argmax(1)
    labels[::3] = (labels[::3] + 1) % 10  # some wrong ones
    found = qat.verify_tflite(paths[io], model, dataset(pixels, labels), layer_examples=0)
    assert found.integers_match and found.mismatches == []
    assert found.num_examples == 50
    assert found.agreement == (actual.argmax(1) == expected.argmax(1)).mean()
    assert found.accuracy == (actual.argmax(1) == labels).mean() == 33 / 50
    assert found.model_accuracy == (expected.argmax(1) == labels).mean()
    # The model's outputs lie on the output grid, so that steps are whole numbers.
    scale = np.unique(np.diff(np.unique(actual))).min()
    steps = np.rint(np.abs(actual - expected).max() / scale)
    assert found.max_output_difference_lsb == steps
    noise = np.square(expected - actual).sum()
    signal = np.square(expected - expected.mean(0)).sum()
    if noise < 1e-6 * signal:
        assert found.output_snr_db > 60
    else:
        np.testing.assert_allclose(found.output_snr_db, 10 * np.log10(signal / noise), rtol=1e-3)
    boundary = {"float32": {"QUANTIZE": 1, "DEQUANTIZE": 1}, "int8": {}, "uint8": {"QUANTIZE": 2}}
    inner = {"CONV_2D": 1, "RESHAPE": 1, "FULLY_CONNECTED": 1}
    assert found.operators == {**inner, **boundary[io]}
    assert found.float_operators == []
    assert found.bytes == paths[io].stat().st_size
    # First and last layers keep 8 bits: 36 and 1440 weights, 4 and 10 biases of 4 bytes.
    assert found.weight_bytes == 36 + 1440 + 4 * 14
    assert found.float_weight_bytes == 4 * (36 + 1440 + 14)


def test_without_labels(model, paths, pixels):
    found = qat.verify_tflite(paths["float32"], model, dataset(pixels), layer_examples=0)
    assert found.accuracy is None and found.model_accuracy is None
    assert found.agreement is not None and found.num_examples == 50


def test_targets_say_whether_the_output_is_of_classes(model, paths, pixels):
    """One-hot and soft ones do; values, and several classes at once, do not."""
    picked = reals(paths["float32"], pixels).argmax(1)
    one_hot = np.eye(10, dtype=np.float32)[picked]
    one_hot[::5] = np.roll(one_hot[::5], 1, axis=1)
    several = np.maximum(one_hot, np.roll(one_hot, 1, axis=1))
    values = np.random.default_rng(0).normal(size=one_hot.shape)
    found = [
        qat.verify_tflite(paths["float32"], model, dataset(pixels, targets), layer_examples=0)
        for targets in (one_hot, 0.8 * one_hot + 0.02, several, values)
    ]
    assert [each.accuracy for each in found] == [40 / 50, None, None, None]
    assert found[0].model_accuracy is not None
    agreement = qat.verify_tflite(
        paths["float32"], model, dataset(pixels), layer_examples=0
    ).agreement
    assert [each.agreement for each in found] == [agreement, agreement, None, None]


def test_a_single_example_has_a_ratio(paths, pixels):
    """Its mean over the examples is itself, and leaves no signal."""
    net = small_models.model_of(classifier, IMAGE, seed=9)
    other = small_models.quantized(net, "w4a8", [pixels], input_range=(0, 255))
    x = pixels[:1]
    expected, actual = other(x, training=False).numpy(), reals(paths["float32"], x)
    found = qat.verify_tflite(paths["float32"], other, dataset(x), layer_examples=0)
    ratio = 10 * np.log10(np.square(expected).sum() / np.square(expected - actual).sum())
    np.testing.assert_allclose(found.output_snr_db, ratio, rtol=1e-3)


def test_a_ratio_without_signal_or_difference():
    ones, zeros = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    assert Output("y", None, ones, ones).snr_db() == float("inf")
    assert Output("y", None, zeros, ones).snr_db() < -3000
    np.testing.assert_allclose(Output("y", None, ones, 0.9 * ones).snr_db(), 20, rtol=1e-4)


def test_batches_of_one_element_tuples(model, paths, pixels):
    """What `from_tensor_slices((x,))` gives, as Keras and qat.calibrate take it."""
    batches = tf.data.Dataset.from_tensor_slices((pixels,)).batch(16)
    found = qat.verify_tflite(paths["float32"], model, batches, layer_examples=0)
    assert found.layers.rows == [] and found.layers.examples == 0
    assert found.num_examples == 50 and found.accuracy is None


def test_a_file_of_another_model(paths, pixels):
    net = small_models.model_of(lambda x: classifier(layers.Rescaling(1 / 255)(x)), IMAGE, seed=9)
    other = small_models.quantized(net, "w4a8", [pixels], input_range=(0, 255))
    found = qat.verify_tflite(paths["float32"], other, dataset(pixels), layer_examples=0)
    assert not found.integers_match
    assert any("conv/kernel" in line for line in found.mismatches)
    assert found.agreement < 0.6
    assert found.output_snr_db < 10


def test_several_outputs(tmp_path):
    """The worst output decides; no classes are compared."""

    def build(x):
        shared = layers.Conv2D(4, 3, activation="relu", name="shared")(x)
        return [
            layers.Dense(3, name="small")(layers.Flatten()(shared)),
            layers.Conv2D(2, 3, name="map")(shared),
        ]

    net = small_models.model_of(build, (6, 6, 2))
    model, (x,) = small_models.quantized(net), small_models.data_for(net)
    path = qat.export_tflite(model, tmp_path / "two.tflite")
    found = qat.verify_tflite(path, model, dataset(x), layer_examples=0)
    assert found.agreement is None and found.integers_match
    file = read_file(path)
    steps, ratios = [], []
    pairs = zip(small_models.run_model(model, [x]), small_models.run_file(path, [x]), strict=True)
    for output, (expected, actual) in zip(file.outputs, pairs, strict=True):
        scale = next(op.inputs[0].scale[0] for op in file.operators if op.outputs[0] is output)
        steps.append(int(np.rint(np.abs(expected - actual).max() / scale)))
        noise = np.square(expected - actual).sum()
        ratios.append(10 * np.log10(np.square(expected - expected.mean(0)).sum() / noise))
    assert found.max_output_difference_lsb == max(steps) > 0
    np.testing.assert_allclose(found.output_snr_db, min(ratios), rtol=1e-3)


@pytest.mark.parametrize("io", ["float32", "int8"])
def test_several_inputs(tmp_path, io):
    """Inputs go where the model's do, though the file reads the second one first."""

    def build(x, y):
        y = layers.Conv2D(2, 3, padding="same", activation="relu", name="deep_1")(y)
        y = layers.Conv2D(2, 3, padding="same", activation="relu", name="deep_2")(y)
        return layers.Subtract(name="difference")([x, y])

    net = small_models.model_of(build, (4, 4, 2), (4, 4, 2))
    data = small_models.data_for(net)
    model = small_models.quantized(net, "w8a8", data)
    path = qat.export_tflite(model, tmp_path / "two.tflite", io=io)
    batches = dataset(tuple(data), np.zeros(32, np.int64))
    found = qat.verify_tflite(path, model, batches, layer_examples=0)
    assert found.max_output_difference_lsb <= 3
    assert found.output_snr_db > 25


def test_inputs_by_name_and_labels_in_a_column(tmp_path):
    """A dictionary's keys are sorted, the model's inputs are not."""
    b, a = layers.Input((4,), name="b"), layers.Input((4,), name="a")
    net = tf_keras.Model([b, a], layers.Subtract()([b, a]))
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(40, 4)).astype(np.float32) for name in ("a", "b")}
    labels = (x["b"] - x["a"]).argmax(1)
    batches = tf.data.Dataset.from_tensor_slices((x, labels[:, None])).batch(16)
    model = qat.calibrate(qat.quantize_model(net, "w8a8"), batches)
    path = qat.export_tflite(model, tmp_path / "model.tflite")
    found = qat.verify_tflite(path, model, batches)
    assert found.accuracy > 0.9 and found.model_accuracy > 0.9


def test_data_of_another_shape(model, paths):
    wrong = np.zeros((4, 8, 9, 1), np.float32)
    with pytest.raises(FileError) as error:
        qat.verify_tflite(paths["float32"], model, dataset(wrong))
    message = str(error.value)
    assert "\n" not in message and "(1, 8, 8, 1)" in message and str(paths["float32"]) in message


def test_an_empty_dataset_and_a_missing_file(model, paths, pixels, tmp_path):
    with pytest.raises(QatError, match="empty") as error:
        qat.verify_tflite(paths["float32"], model, dataset(pixels).take(0))
    assert "\n" not in str(error.value)
    with pytest.raises(FileError) as error:
        qat.verify_tflite(tmp_path / "no.tflite", model, dataset(pixels))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kernels", ["default", "optimized", "reference"])
def test_the_runner_quantizes_as_the_file_says(paths, pixels, kernels):
    """Eight-bit files take float images: pixels 0-255 become the codes that a camera sends."""
    runner = Runner(paths["uint8"], kernels=kernels, threads=1)
    (found,) = runner.run(pixels)
    (codes,) = small_models.run_file(paths["uint8"], [pixels], kernels)
    np.testing.assert_array_equal(found.codes, codes)
    output = read_file(paths["uint8"]).outputs[0]
    expected = (codes.astype(float) - output.zero_point[0]) * output.scale[0]
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert runner.latency(pixels, runs=3) > 0


def test_the_runner_refuses_damage_in_one_line(paths, tmp_path):
    content = paths["float32"].read_bytes()
    for name, damaged in (
        ("half", content[: len(content) // 2]),
        ("zeros", content[:8] + bytes(len(content) - 8)),
        ("noise", content[:8] + np.random.default_rng(0).bytes(400)),
        ("foreign", b"GIF89a and so on"),
    ):
        path = tmp_path / name
        path.write_bytes(damaged)
        with pytest.raises(FileError) as error:
            Runner(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


# evaluate_tflite, on the embedded dataset.


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def digits(digits_dir):
    builder = tfds.builder("digits", data_dir=digits_dir)
    builder.download_and_prepare()
    images, labels = tfds.as_numpy(
        builder.as_dataset(split="test", batch_size=-1, as_supervised=True)
    )
    return images, labels


def test_evaluate_on_digits(paths, digits, digits_dir):
    images, labels = digits
    predicted = reals(paths["uint8"], images.astype(np.float32)).argmax(1)
    found = evaluate_tflite(paths["uint8"], "digits", data_dir=digits_dir, threads=1)
    assert found["accuracy"] == (predicted == labels).mean()
    assert 0 < found["accuracy"] < 1
    assert found["num_eval_examples"] == len(labels) == 360
    assert found["dataset"].startswith("digits") and found["split"] == "test"
    assert found["tflite"] == str(paths["uint8"])
    assert found["bytes"] == paths["uint8"].stat().st_size
    assert found["batch_size_in_file"] == 1
    assert found["weight_bytes"] == 36 + 1440 + 4 * 14
    assert found["operators"]["CONV_2D"] == 1 and found["float_operators"] == []
    assert 0 < found["seconds_per_invocation"] < 1


@pytest.mark.slow
def test_evaluate_maps_pixels_to_the_input_range(tmp_path, digits, digits_dir):
    """A file whose inputs are -1 … 1 sees pixel / 255 · 2 - 1."""
    images, labels = digits
    scaled = images.astype(np.float32) / 255 * 2 - 1
    net = small_models.model_of(classifier, IMAGE, seed=3)
    model = small_models.quantized(net, "w8a8", [scaled], input_range=(-1, 1))
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    expected = (reals(path, scaled).argmax(1) == labels).mean()
    found = evaluate_tflite(path, "digits", data_dir=digits_dir, input_range=(-1, 1), threads=1)
    # 2x/255 - 1 in float32 has more than one order of operations; a code may change by one.
    assert abs(found["accuracy"] - expected) <= 1 / 360
    wrong = evaluate_tflite(path, "digits", data_dir=digits_dir, input_range=(0, 1), threads=1)
    assert wrong["accuracy"] != found["accuracy"]


def test_evaluate_takes_grey_images_for_colours_and_one_number_for_two_classes(
    tmp_path, digits, digits_dir, monkeypatch
):
    """As the quantizing program does."""
    images, labels = digits
    spec = evaluate.qat_data.DatasetSpec(
        name="two", image_shape=(8, 8, 1), class_names=("0", "1"), splits={}, num_examples={}
    )
    pairs = tf.data.Dataset.from_tensor_slices((images.astype(np.float32), labels % 2)).batch(50)
    monkeypatch.setattr(
        evaluate.qat_data, "evaluation_split", lambda *args, **kwargs: (pairs, spec)
    )
    x = np.repeat(images.astype(np.float32), 3, axis=-1)
    for activation, middle in (("sigmoid", 0.5), (None, 0.0)):

        def build(x, activation=activation):
            x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(x))
            return layers.Dense(1, activation)(layers.Rescaling(1 / 255)(x))

        net = small_models.model_of(build, (8, 8, 3), seed=1)
        model = small_models.quantized(net, "w8a8", [x], input_range=(0, 255))
        path = qat.export_tflite(model, tmp_path / "one.tflite")
        expected = ((reals(path, x)[:, 0] > middle) == labels % 2).mean()
        assert 0 < expected < 1
        assert evaluate_tflite(path, "two", threads=1)["accuracy"] == expected


def test_evaluate_refuses_a_file_of_any_image_size(tmp_path, digits_dir):
    """LiteRT gives 1 for a size that is open."""
    inputs = layers.Input((None, None, 1))
    net = tf_keras.Model(inputs, layers.Dense(10)(layers.GlobalMaxPooling2D()(inputs)))
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    (tmp_path / "any.tflite").write_bytes(converter.convert())
    with pytest.raises(FileError, match=r"leaves the size of its images open, \(-1, -1, -1, 1\)"):
        evaluate_tflite(tmp_path / "any.tflite", "digits", data_dir=digits_dir, threads=1)


@pytest.mark.parametrize("given, told", [((0, 255), False), ((-1, 1), False), ((0, 400), True)])
def test_evaluate_tells_of_a_range_that_the_input_cuts_off(paths, digits_dir, given, told, caplog):
    evaluate_tflite(paths["int8"], "digits", data_dir=digits_dir, input_range=given, threads=1)
    assert ("values there are cut off" in caplog.text) == told


def test_a_dataset_without_an_end_is_refused(model, paths, pixels):
    with pytest.raises(QatError, match=r"no end; give dataset.take\(n\)"):
        qat.verify_tflite(paths["float32"], model, dataset(pixels).repeat(), layer_examples=0)


def test_evaluate_refuses_what_is_no_classifier(tmp_path, digits_dir):
    cases = {
        "image": small_models.model_of(lambda x: layers.ReLU()(x), IMAGE),
        "vector": small_models.model_of(lambda x: layers.Dense(3)(x), (64,)),
    }
    for name, net in cases.items():
        path = qat.export_tflite(small_models.quantized(net), tmp_path / f"{name}.tflite")
        with pytest.raises(FileError, match="no (image )?classifier") as error:
            evaluate_tflite(path, "digits", data_dir=digits_dir, threads=1)
        assert "\n" not in str(error.value)
