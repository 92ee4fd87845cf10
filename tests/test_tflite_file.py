"""Reading .tflite files: what the bytes say, and damaged or foreign files in one line."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from small_models import layers

import qat
from qat.tflite_file import FileError, read_bytes, read_file


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """conv (8 bits) → depthwise (4 bits, 27 weights) → dense (4 bits)."""

    def build(x):
        x = layers.Conv2D(3, 3, activation="relu", name="conv")(x)
        x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
        return layers.Dense(5, name="dense")(layers.Flatten()(x))

    net = small_models.model_of(build, (6, 6, 1))
    eight = qat.TensorSpec(bits=8)
    rule = qat.Rule(layer="conv", weights=eight, activations=eight)
    model = small_models.quantized(net, small_models.recipe(4, 8, rule))
    return qat.export_tflite(model, tmp_path_factory.mktemp("file") / "model.tflite")


def one_line(error) -> bool:
    return "\n" not in str(error.value)


def test_tensors_agree_with_the_interpreter(path):
    file = read_file(path)
    details = Interpreter(str(path)).get_tensor_details()
    by_name = {detail["name"]: detail for detail in details}
    assert len({tensor.name for tensor in file.tensors}) == len(file.tensors)
    for tensor in file.tensors:
        detail = by_name[tensor.name]
        assert tensor.shape == tuple(detail["shape"])
        scales = detail["quantization_parameters"]["scales"]
        np.testing.assert_array_equal(tensor.scale, scales)
        np.testing.assert_array_equal(
            tensor.zero_point, detail["quantization_parameters"]["zero_points"]
        )


def test_operators_and_boundary(path):
    file = read_file(path)
    names = [operator.name for operator in file.operators]
    assert names == [
        "QUANTIZE",
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "RESHAPE",
        "FULLY_CONNECTED",
        "DEQUANTIZE",
    ]
    assert file.operator_counts() == {name: 1 for name in names}
    assert list(file.operator_counts()) == sorted(names)
    assert [tensor.dtype for tensor in (*file.inputs, *file.outputs)] == ["float32"] * 2
    assert file.inputs[0] is file.operators[0].inputs[0]
    assert file.outputs[0] is file.operators[-1].outputs[0]
    assert file.float_operators() == [] and file.target == "litert"


def test_weight_bytes(path):
    # conv 3·3·1·3 int8; depthwise 3·3·3 = 27 nibbles in 14 bytes; dense 12·5 nibbles in 30;
    # biases of 3, 3 and 5 int32.
    assert read_file(path).weight_bytes() == 27 + 14 + 30 + 4 * (3 + 3 + 5)
    assert read_file(path).float_weight_bytes() == 4 * (27 + 27 + 60 + 3 + 3 + 5)


def test_int4_is_unpacked_low_nibble_first(tmp_path, path):
    packed = bytes([0x21, 0xF8, 0x07])  # nibbles 1, 2, 8, 15, 7 and one of padding
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(path.read_bytes()))
    graph = model.subgraphs[0]
    tensor = next(t for t in graph.tensors if t.type == schema.TensorType.INT4)
    tensor.shape, tensor.name = [5], b"edited"
    model.buffers[tensor.buffer].data = np.frombuffer(packed, np.uint8)
    edited = tmp_path / "edited.tflite"
    edited.write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    (found,) = [t for t in read_file(edited).tensors if t.name == "edited"]
    assert found.dtype == "int4" and found.bytes == 3
    assert found.data.dtype == np.int8
    np.testing.assert_array_equal(found.data, [1, 2, -8, -1, 7])


def test_a_file_of_the_tflite_converter(tmp_path):
    """A float file made elsewhere: float operators are named, sizes are right."""
    weights = tf.constant(np.random.default_rng(0).normal(size=(8, 4)), tf.float32)
    function = tf.function(lambda x: tf.nn.softmax(tf.matmul(x, weights)))
    concrete = function.get_concrete_function(tf.TensorSpec((1, 8), tf.float32))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    path = tmp_path / "float.tflite"
    path.write_bytes(converter.convert())
    file = read_file(path)
    assert file.float_operators() == ["FULLY_CONNECTED", "SOFTMAX"] and file.target is None
    kernel = file.operators[0].inputs[1]
    np.testing.assert_array_equal(kernel.data, weights.numpy().T)
    assert len(kernel.scale) == 0 and file.weight_bytes() >= kernel.bytes == 128


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no TFL3 mark"),
        (b"TFL3", "no TFL3 mark"),
        (b"PK\x03\x04 a zip, and long enough to hold a mark", "no TFL3 mark"),
        (b"\x1c\x00\x00\x00TFL3", "damaged"),
        (b"\x00\x00\x00\x00TFL3" + bytes(64), "damaged"),
        (b"\xff\xff\xff\x7fTFL3" + bytes(64), "damaged"),
    ],
)
def test_foreign_files(tmp_path, content, said):
    path = tmp_path / "foreign.tflite"
    path.write_bytes(content)
    with pytest.raises(FileError, match=said) as error:
        read_file(path)
    assert str(path) in str(error.value) and one_line(error)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "missing.tflite", tmp_path):
        with pytest.raises(FileError) as error:
            read_bytes(str(path))
        assert str(path) in str(error.value) and one_line(error)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_truncated_files(tmp_path, path, share):
    content = path.read_bytes()
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FileError) as error:
        read_file(cut)
    assert one_line(error)


@pytest.mark.parametrize("seed", range(40))
def test_bit_flips_never_crash_the_reader(tmp_path, path, seed):
    """A file with one byte changed is read, or refused in one line; nothing else."""
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    # Structure (offsets, tables) stands at the start and the end alike: any byte may be hit.
    content[int(rng.integers(8, len(content)))] ^= int(rng.integers(1, 256))
    flipped = tmp_path / "flipped.tflite"
    flipped.write_bytes(bytes(content))
    try:
        read_file(flipped)
    except FileError as error:
        assert "\n" not in str(error) and str(flipped) in str(error)
