"""export_tflite as a whole: boundary types, float layers, guards, and the check of the integers."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from small_models import layers

import qat
from qat.errors import QatError
from qat.export import tflite as export_module
from qat.export.graph import ExportError
from qat.integers import integer_mismatches
from qat.roles import UnsupportedLayerError
from qat.tflite_file import read_file

IMAGE = (8, 8, 1)
IO_TYPES = ("float32", "int8", "uint8")


def classifier(x):
    x = layers.Rescaling(1 / 255, name="rescale")(x)
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return layers.Dense(5, name="logits")(x)


def images(count: int = 48) -> list[np.ndarray]:
    """Pixels 0-255 whose brightness differs, so that classes do."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 1, (count, *IMAGE)) * rng.uniform(0.1, 1, (count, 1, 1, 1))
    return [np.rint(255 * noise).astype(np.float32)]


@pytest.fixture(scope="module")
def model():
    net = small_models.model_of(classifier, IMAGE)
    return small_models.quantized(net, "w4a8", images(), input_range=(0, 255))


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("io")
    return {io: qat.export_tflite(model, folder / f"{io}.tflite", io=io) for io in IO_TYPES}


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message


# Boundary types.


def test_the_file_computes_the_model(model, files):
    (expected,) = small_models.run_model(model, images())
    file = read_file(files["float32"])
    assert integer_mismatches(model, file) == [] and file.float_operators() == []
    step = file.operators[-1].inputs[0].scale[0]
    for kernels in small_models.KERNELS:
        (actual,) = small_models.run_file(files["float32"], images(), kernels)
        # A chain of three operators: each step of the pool moves a logit by less than two.
        assert np.rint(np.abs(actual - expected) / step).max() <= 2
        ordered = np.sort(expected)
        clear = ordered[:, -1] - ordered[:, -2] > 4 * step
        assert clear.sum() > 10
        np.testing.assert_array_equal(actual.argmax(1)[clear], expected.argmax(1)[clear])


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_eight_bit_files_hold_no_float(files, io):
    file = read_file(files[io])
    assert {tensor.dtype for tensor in file.tensors} <= {"int8", "uint8", "int4", "int32"}
    assert [tensor.dtype for tensor in (*file.inputs, *file.outputs)] == [io, io]
    # uint8 costs a QUANTIZE at either end, int8 nothing.
    quantizes = file.operator_counts().get("QUANTIZE", 0)
    assert quantizes == (2 if io == "uint8" else 0)
    assert "DEQUANTIZE" not in file.operator_counts()


@pytest.mark.parametrize("io", ["int8", "uint8"])
@pytest.mark.parametrize("kernels", small_models.KERNELS)
def test_eight_bit_files_compute_the_same_codes(files, io, kernels):
    (real,) = small_models.run_file(files["float32"], images(), kernels)
    pixels = images()[0]
    codes = pixels if io == "uint8" else pixels - 128
    (actual,) = small_models.run_file(files[io], [codes], kernels)
    output = read_file(files[io]).outputs[0]
    dequantized = (actual.astype(float) - output.zero_point[0]) * output.scale[0]
    np.testing.assert_allclose(dequantized, real, rtol=1e-5, atol=1e-6)


def test_uint8_takes_the_bytes_of_a_camera(files):
    tensor = read_file(files["uint8"]).inputs[0]
    assert tensor.scale[0] == 1 and tensor.zero_point[0] == 0
    tensor = read_file(files["int8"]).inputs[0]
    assert tensor.scale[0] == 1 and tensor.zero_point[0] == -128


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_several_inputs_keep_their_order(tmp_path, io):
    """The second input's quantizer comes first in execution: its branch is the deeper one."""

    def build(x, y):
        y = layers.Conv2D(2, 3, padding="same", activation="relu", name="deep_1")(y)
        y = layers.Conv2D(2, 3, padding="same", activation="relu", name="deep_2")(y)
        return layers.Concatenate(name="both")([x, y])

    net = small_models.model_of(build, (4, 4, 1), (4, 4, 3))
    data = small_models.data_for(net)
    path = qat.export_tflite(
        small_models.quantized(net, "w8a8", data), tmp_path / "two.tflite", io=io
    )
    file = read_file(path)
    assert [tensor.shape for tensor in file.inputs] == [(1, 4, 4, 1), (1, 4, 4, 3)]


# Layers left in float.


def test_a_layer_kept_in_float(tmp_path):
    def build(x):
        x = layers.Conv2D(4, 3, activation="relu", name="first")(x)
        x = layers.Conv2D(4, 3, activation="relu", name="middle")(x)
        return layers.Dense(5, name="logits")(layers.Flatten()(x))

    net = small_models.model_of(build, IMAGE)
    recipe = small_models.recipe(8, 8, qat.Rule(layer="middle", keep_float="sensitive"))
    model, data = small_models.quantized(net, recipe), small_models.data_for(net)
    path = qat.export_tflite(model, tmp_path / "float.tflite")
    file = read_file(path)
    assert integer_mismatches(model, file) == []
    assert "CONV_2D" in file.float_operators()
    assert file.operator_counts()["CONV_2D"] == 2
    kernel = next(tensor for tensor in file.tensors if tensor.name == "middle/kernel")
    assert kernel.dtype == "float32"
    original = net.get_layer("middle").get_weights()[0]
    np.testing.assert_array_equal(kernel.data, original.transpose(3, 0, 1, 2))
    (expected,) = small_models.run_model(model, data)
    step = file.operators[-1].inputs[0].scale[0]
    for kernels in small_models.KERNELS:
        (actual,) = small_models.run_file(path, data, kernels)
        assert np.rint(np.abs(actual - expected) / step).max() <= 2


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softmax", "relu6", "linear"])
def test_an_activation_kept_in_float(activation, tmp_path):
    """Of a dense layer in the middle and of one at the end, beside a layer that stays integer."""

    def build(x):
        x = layers.Dense(6, activation="relu", name="first")(x)
        x = layers.Dense(6, activation=activation, name="middle")(x)
        return layers.Dense(4, activation=activation, name="end")(x)

    net = small_models.model_of(build, (5,))
    rules = [qat.Rule(layer=name, keep_float="sensitive") for name in ("middle", "end")]
    model = small_models.quantized(net, small_models.recipe(8, 8, *rules))
    data = small_models.data_for(net)
    path = qat.export_tflite(model, tmp_path / "float.tflite")
    operator = {"tanh": "TANH", "sigmoid": "LOGISTIC", "softmax": "SOFTMAX"}.get(activation)
    floats = read_file(path).float_operators()
    dense = ["FULLY_CONNECTED", *([operator] if operator else [])]
    assert [name for name in floats if name != "DEQUANTIZE"] == 2 * dense
    # The first layer's codes are the model's; float32 is all that is left to differ.
    (expected,), (actual,) = small_models.run_model(model, data), small_models.run_file(path, data)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Guards: one line, and nothing left behind.


def test_an_uncalibrated_model(tmp_path):
    net = small_models.model_of(lambda x: layers.Dense(3, name="dense")(x), (5,))
    with pytest.raises(ExportError) as error:
        qat.export_tflite(qat.quantize_model(net), tmp_path / "m.tflite")
    assert_one_line(error, "calibrate")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    net = small_models.model_of(lambda x: layers.Dense(3, name="dense")(x), (5,))
    model = small_models.quantized(net)
    for variable in model.weights:
        if "kernel:" in variable.name:
            variable.assign(np.full(variable.shape, value, np.float32))
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite")
    assert_one_line(error, "'dense'", "NaN")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("variable", ["bias", "gamma", "moving_variance"])
def test_other_variables_that_are_not_finite(tmp_path, variable):
    build = lambda x: layers.BatchNormalization(name="norm")(layers.Dense(3, name="dense")(x))  # noqa: E731
    model = small_models.quantized(small_models.model_of(build, (5,)))
    (found,) = [v for v in model.weights if v.name.split("/")[-1] == f"{variable}:0"]
    found.assign(np.full(found.shape, np.nan, np.float32))
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite")
    assert_one_line(error)
    assert os.listdir(tmp_path) == []


def test_a_range_that_is_not_finite(tmp_path):
    net = small_models.model_of(lambda x: layers.Dense(3, name="dense")(x), (5,))
    model = small_models.quantized(net)
    model.get_layer("in0_fake_quantize").quantizer_weights["maximum"].assign(np.inf)
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite")
    assert_one_line(error, "infinite range")


@pytest.mark.parametrize(
    ("option", "legal"),
    [("target", "litert, tflm"), ("io", "float32, int8, uint8"), ("weight_storage", "size, speed")],
)
def test_unknown_options(model, tmp_path, option, legal):
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite", **{option: "float16"})
    assert_one_line(error, option, "'float16'", legal)
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "missing" / "m.tflite", tmp_path / "file" / "m.tflite"):
        with pytest.raises(ExportError) as error:
            qat.export_tflite(model, path)
        assert_one_line(error, str(path))
    (tmp_path / "folder.tflite").mkdir()
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "folder.tflite")
    assert_one_line(error, "folder.tflite")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.tflite"]


UNSUPPORTED = {
    "LSTM": ((4, 3), lambda: layers.LSTM(2, name="odd")),
    "Masking": ((4, 3), lambda: layers.Masking(name="odd")),
    "Lambda": ((4,), lambda: layers.Lambda(lambda x: x + 1, name="odd")),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_layers_are_refused_before_training(kind):
    shape, make = UNSUPPORTED[kind]
    x = layers.Input(shape)
    y = make()(x)
    if len(shape) == 1:
        y = layers.Dense(2, name="dense")(y)
    with pytest.raises(UnsupportedLayerError) as error:
        qat.quantize_model(tf_keras.Model(x, y))
    assert_one_line(error, "odd", kind)


# Options without an operator: refused when the model is quantized, not after its training.
WITHOUT_OPERATOR = {
    "batch_axis": ([(4,)] * 2, lambda *x: layers.Concatenate(axis=0, name="odd")(list(x))),
    "dilated_transposed": (
        [(6, 6, 2)],
        lambda x: layers.Conv2DTranspose(2, 3, dilation_rate=2, name="odd")(x),
    ),
    "norm_of_rows": ([(6, 6, 2)], lambda x: layers.BatchNormalization(axis=1, name="odd")(x)),
    "softmax_of_rows": ([(6, 6, 2)], lambda x: layers.Softmax(axis=1, name="odd")(x)),
    "unknown_size": (
        [(None, None, 2)],
        lambda x: layers.Conv2D(2, 3, name="odd", padding="same")(x),
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_OPERATOR)
def test_options_without_an_operator_are_refused(tmp_path, kind):
    shapes, build = WITHOUT_OPERATOR[kind]
    net = small_models.model_of(build, *shapes)
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(4, *(n or 6 for n in shape))).astype(np.float32) for shape in shapes]
    with pytest.raises(QatError) as error:
        qat.export_tflite(small_models.quantized(net, data=data), tmp_path / "m.tflite")
    assert_one_line(error)
    assert "odd" in str(error.value) or "in0" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_an_eight_bit_boundary_needs_integers_there(tmp_path):
    net = small_models.model_of(classifier, IMAGE)
    recipe = small_models.recipe(8, 8, qat.Rule(layer="logits", keep_float="sensitive"))
    model = small_models.quantized(net, recipe, images(), input_range=(0, 255))
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite", io="int8")
    assert_one_line(error, "float32")
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_survives_a_failed_export(model, tmp_path, monkeypatch):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"the old file")
    monkeypatch.setattr(export_module, "to_bytes", lambda *_, **__: b"nonsense")
    with pytest.raises(QatError) as error:
        qat.export_tflite(model, path)
    assert_one_line(error)
    assert path.read_bytes() == b"the old file" and os.listdir(tmp_path) == ["m.tflite"]


# The check of the integers fails when anything differs.


def edited(content: bytes, change) -> bytes:
    """The file with `change(graph, buffers, tensors by name)` applied to its object tree."""
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    graph = model.subgraphs[0]
    change(graph, model.buffers, {tensor.name.decode(): tensor for tensor in graph.tensors})
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def flip_bit(name: str, position: int, bit: int = 1):
    def change(graph, buffers, tensors):
        buffer = buffers[tensors[name].buffer]
        buffer.data = np.asarray(buffer.data, np.uint8).copy()
        buffer.data[position] ^= bit

    return change


def scaled(name: str, factor: float, channel: int = 0):
    def change(graph, buffers, tensors):
        scale = np.asarray(tensors[name].quantization.scale, np.float32).copy()
        scale[channel] *= np.float32(factor)
        tensors[name].quantization.scale = scale

    return change


def shifted(name: str):
    def change(graph, buffers, tensors):
        zero_point = np.asarray(tensors[name].quantization.zeroPoint).copy()
        tensors[name].quantization.zeroPoint = zero_point + 1

    return change


def negate_channel(name: str):
    def change(graph, buffers, tensors):
        buffer, shape = buffers[tensors[name].buffer], tensors[name].shape
        assert tensors[name].type == schema.TensorType.INT8
        codes = np.asarray(buffer.data, np.uint8).view(np.int8).reshape(shape).copy()
        assert codes[0].any()
        codes[0] *= -1
        buffer.data = codes.reshape(-1).view(np.uint8)

    return change


def renamed(name: str):
    def change(graph, buffers, tensors):
        tensors[name].name = b"something_else"

    return change


TAMPERINGS = {
    "first_code": (flip_bit("conv/kernel", 0), "conv/kernel"),
    "last_code": (flip_bit("logits/kernel", -1, 128), "logits/kernel"),
    "sign_of_a_channel": (negate_channel("conv/kernel"), "conv/kernel"),
    "kernel_renamed": (renamed("conv/kernel"), "conv/kernel"),
    "output_scale": (scaled("relu", 1.0001), "relu"),
    "output_zero_point": (shifted("logits"), "logits"),
    "input_scale": (scaled("in0", 0.999), "in0"),
    "kernel_scale": (scaled("conv/kernel", 1.01, channel=1), "conv/kernel"),
    "kernel_zero_point": (shifted("conv/kernel"), "conv/kernel"),
    "bias": (flip_bit("logits/bias", 1), "logits/bias"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_the_integer_check_sees(model, files, tmp_path, kind):
    change, name = TAMPERINGS[kind]
    path = tmp_path / "tampered.tflite"
    content = files["int8"].read_bytes()
    if name == "in0":
        tensors = [tensor.name for tensor in read_file(files["int8"]).inputs]
        change = scaled(tensors[0], 0.999)
    path.write_bytes(edited(content, change))
    found = integer_mismatches(model, read_file(path))
    assert found and any(name in line for line in found)
    assert all("\n" not in line for line in found)


def test_an_unchanged_file_passes_the_integer_check(model, files, tmp_path):
    """So that the tamperings above fail by what they change, not by being rewritten."""
    path = tmp_path / "same.tflite"
    path.write_bytes(edited(files["int8"].read_bytes(), lambda *_: None))
    assert integer_mismatches(model, read_file(path)) == []


def test_another_models_file_fails_the_integer_check(files):
    net = small_models.model_of(classifier, IMAGE, seed=5)
    other = small_models.quantized(net, "w4a8", images(), input_range=(0, 255))
    found = integer_mismatches(other, read_file(files["float32"]))
    assert any(re.search("conv/kernel.*integers differ", line) for line in found)


def test_export_refuses_a_file_that_is_not_the_model(model, tmp_path, monkeypatch):
    """One code changed between lowering and file: export fails and leaves nothing."""
    to_bytes = export_module.to_bytes
    monkeypatch.setattr(
        export_module,
        "to_bytes",
        lambda *args, **options: edited(to_bytes(*args, **options), flip_bit("conv/kernel", 3)),
    )
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite")
    assert_one_line(error, "conv/kernel: 1 of 36 integers differ")
    assert os.listdir(tmp_path) == []


def test_export_refuses_a_file_that_the_interpreter_refuses(model, tmp_path, monkeypatch):
    to_bytes = export_module.to_bytes

    def no_input(graph, buffers, tensors):
        graph.operators[-1].inputs = []

    monkeypatch.setattr(
        export_module,
        "to_bytes",
        lambda *args, **options: edited(to_bytes(*args, **options), no_input),
    )
    with pytest.raises(ExportError) as error:
        qat.export_tflite(model, tmp_path / "m.tflite")
    assert_one_line(error, "LiteRT refuses")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [layers.Add, layers.Multiply])
def test_three_inputs_are_combined_in_pairs(kind, tmp_path):
    """Each pair has a grid of its own, so the file may differ by a step for each of the two."""
    inputs = [tf_keras.Input((6,)) for _ in range(3)]
    net = tf_keras.Model(inputs, kind(name="many")(inputs))
    values = [np.random.default_rng(n).uniform(-1, 1, (64, 6)).astype(np.float32) for n in range(3)]
    model = qat.quantize_model(net, "w8a8")
    qat.calibrate(model, tf.data.Dataset.from_tensors(((tuple(values)),)))
    path = qat.export_tflite(model, tmp_path / "many.tflite")
    batches = tf.data.Dataset.from_tensors((tuple(values),))
    found = qat.verify_tflite(path, model, batches, layer_examples=0)
    assert found.integers_match and found.float_operators == []
    assert found.operators[kind.__name__.upper()[:3]] == 2
    assert found.max_output_difference_lsb <= 2


def test_export_changes_nothing_in_the_model(model, tmp_path):
    before = [value.copy() for value in model.get_weights()]
    qat.export_tflite(model, tmp_path / "one.tflite")
    qat.export_tflite(model, tmp_path / "two.tflite")
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "one.tflite").read_bytes() == (tmp_path / "two.tflite").read_bytes()


def test_a_sequential_model_exports_too(tmp_path):
    net = tf_keras.Sequential([layers.Input((6,)), layers.Dense(4), layers.ReLU()])
    model = small_models.quantized(small_models.randomize(net))
    path = qat.export_tflite(model, str(tmp_path / "m.tflite"))
    assert path == tmp_path / "m.tflite" and tf.io.gfile.exists(str(path))


def test_a_model_that_tfmot_quantized_is_refused(tmp_path):
    keras = tfmot.quantization.keras
    inputs = layers.Input((8, 8, 3))
    annotated = keras.quantize_annotate_layer(layers.Conv2D(4, 3), qat.configs.uniform())(inputs)
    model = keras.quantize_apply(tf_keras.Model(inputs, annotated))
    with pytest.raises(QatError, match="TFMOT's own quantizer.*qat.quantize_model"):
        qat.export_tflite(model, tmp_path / "model.tflite")
    assert not any(tmp_path.iterdir())
