"""Target lce: bit-packed convolutions, their format, their check, and what Larq's kernels compute.

The last needs a Python with larq-compute-engine, named by QAT_LCE_PYTHON.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import small_models
import tf_keras
from ai_edge_litert.tools import flatbuffer_utils
from flatbuffers import flexbuffers
from small_models import layers

import models
import qat
from qat.errors import UserError
from qat.export.graph import ExportError
from qat.export.larq import pack
from qat.export.tflite import target_notes
from qat.integers import integer_mismatches
from qat.tflite_file import FileError, read_file
from qat.verify import larq

needs_larq = pytest.mark.skipif(
    larq.VARIABLE not in os.environ, reason=f"{larq.VARIABLE} names no Python with Larq's engine"
)
PADDINGS = {
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "same, stride 2": {"padding": "same", "strides": 2},
    "valid, stride 2": {"padding": "valid", "strides": 2},
    "same, stride 2 × 1": {"padding": "same", "strides": (2, 1)},
    "same, dilated": {"padding": "same", "dilation_rate": 2},
    "same, 1 × 1, stride 2": {"kernel_size": 1, "padding": "same", "strides": 2},
}


def block(x, filters: int = 24, name: str = "binary", **options):
    """Convolution and batch norm, with gammas of both signs, and ReLU."""
    options = {"kernel_size": 3, "use_bias": False} | options
    x = layers.Conv2D(filters, name=name, **options)(x)
    return layers.ReLU()(layers.BatchNormalization(name=f"{name}_norm")(x))


def binarized(build, *shapes, how="w1a1") -> tf_keras.Model:
    """Quantized everywhere, its biases settled; first and last layers are binary too."""
    net = small_models.model_of(build, *shapes)
    model = small_models.quantized(net, small_models.everywhere(how))
    qat.settle_biases(model)
    return model


def exported(model, folder, **options):
    return qat.export_tflite(model, folder / "lce.tflite", target="lce", **options)


def stack(x):
    """Several convolutions of one shape: no kernel may be taken for another's."""
    for i in range(4):
        x = block(x, 32, f"binary{i}", padding="same")
    return x


@pytest.fixture(scope="module")
def padded():
    return binarized(lambda x: block(x, padding="same"), (6, 6, 40))


@pytest.fixture(scope="module")
def padded_file(padded, tmp_path_factory):
    return exported(padded, tmp_path_factory.mktemp("lce"))


# --- format and integers, without the interpreter ---


def test_bits_are_the_signs():
    kernel = np.random.default_rng(0).choice([-7, 7], (3, 2, 2, 40))
    for balanced in (False, True):
        words = pack(kernel, balanced=balanced)
        assert words.shape == (3, 2, 2, 2) and words.dtype == np.int32
        bits = (words[..., None].astype(np.int64) >> np.arange(32)) & 1
        bits = bits.reshape(3, 2, 2, 64)
        np.testing.assert_array_equal(bits[..., :40], kernel < 0)
        assert (bits[..., 40:].sum(-1) == (12 if balanced else 0)).all()


def test_operators(padded_file):
    file = read_file(padded_file)
    names = [op.name for op in file.operators]
    packed = "LceQuantize PAD PADV2 CONCATENATION CONCATENATION LceBconv2d"
    assert names == ["QUANTIZE", *packed.split(), "DEQUANTIZE"]
    assert file.float_operators() == []


def test_options_are_a_flexbuffer(tmp_path):
    net = binarized(
        lambda x: block(x, padding="valid", strides=(2, 1), dilation_rate=1), (6, 6, 40)
    )
    content = exported(net, tmp_path).read_bytes()
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    codes = [model.operatorCodes[op.opcodeIndex] for op in model.subgraphs[0].operators]
    by_name = {
        code.customCode: op
        for code, op in zip(codes, model.subgraphs[0].operators, strict=True)
        if code.customCode
    }
    assert set(by_name) == {b"LceQuantize", b"LceBconv2d"}
    assert list(by_name[b"LceBconv2d"].inputs)[4] == -1
    options = flexbuffers.Loads(bytes(by_name[b"LceBconv2d"].customOptions))
    assert options == {
        "channels_in": 40,
        "dilation_height_factor": 1,
        "dilation_width_factor": 1,
        "fused_activation_function": 0,
        "pad_values": 0,
        "padding": 1,
        "stride_height": 2,
        "stride_width": 1,
    }


def test_weight_bytes_count_bits(padded_file):
    file = read_file(padded_file)
    kernel = next(t for op in file.operators for t in op.inputs if t.dtype == "bit")
    assert kernel.shape == (24, 3, 3, 40)
    # 40 channels take two words of 4 bytes; multipliers and biases are float32.
    assert kernel.bytes == 24 * 9 * 8
    assert file.weight_bytes() == kernel.bytes + 2 * 4 * 24
    assert file.float_weight_bytes() == 4 * (24 * 9 * 40 + 2 * 24)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("what", ["binary/kernel", "binary/multiplier", "binary/bias"])
def test_one_changed_number_is_found(tmp_path, padding, what):
    model = binarized(lambda x: block(x, padding=padding), (6, 6, 40))
    path = exported(model, tmp_path)
    assert integer_mismatches(model, read_file(path)) == []
    content = flatbuffer_utils.convert_bytearray_to_object(bytearray(path.read_bytes()))
    graph = content.subgraphs[0]
    tensor = next(tensor for tensor in graph.tensors if tensor.name == what.encode())
    data = content.buffers[tensor.buffer].data
    data = content.buffers[tensor.buffer].data = np.array(data, np.uint8)
    data[2] ^= 0x10
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(content))
    (mismatch,) = integer_mismatches(model, read_file(path))
    assert mismatch.startswith("binary/kernel: 1 of "), mismatch


def test_another_zero_point_is_found(tmp_path):
    model = binarized(block, (6, 6, 32))
    path = exported(model, tmp_path)
    file = read_file(path)
    assert integer_mismatches(model, file) == []

    def moved(op):
        shifted = dataclasses.replace(op.inputs[0], zero_point=op.inputs[0].zero_point + 1)
        return dataclasses.replace(op, inputs=(shifted,)) if op.name == "LceQuantize" else op

    changed = dataclasses.replace(file, operators=tuple(map(moved, file.operators)))
    (mismatch,) = integer_mismatches(model, changed)
    assert "another grid" in mismatch


def test_cnn5_weight_bytes(tmp_path):
    net = models.build("cnn5", (28, 28, 1), 10)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1)).astype(np.float32)
    model = small_models.quantized(net, "w1a1", [pixels], input_range=(0, 255))
    file = read_file(exported(model, tmp_path))
    assert file.operator_counts()["LceBconv2d"] == 4
    assert file.weight_bytes() * 20 <= file.float_weight_bytes()
    kernels = [t for op in file.operators for t in op.inputs if t.dtype == "bit"]
    assert [32 * t.bytes for t in kernels] == [4 * int(np.prod(t.shape)) for t in kernels]
    assert file.float_operators() == [] and target_notes(model, "lce") == {}


NOT_PACKED = {
    "grouped": (lambda x: block(x, groups=2), "w1a1", "grouped"),
    "depthwise": (
        lambda x: layers.DepthwiseConv2D(3, name="binary")(x),
        "w1a1",
        "no binary DEPTHWISE_CONV_2D",
    ),
    "dense": (
        lambda x: layers.Dense(8, name="binary")(layers.Flatten()(x)),
        "w1a1",
        "no binary FULLY_CONNECTED",
    ),
    "8-bit activations": (block, "w1a8", "not ±1"),
    "odd": (lambda x: block(x, padding="same"), "w1a1", "even number of input channels"),
}


@pytest.mark.parametrize("case", NOT_PACKED)
def test_what_is_not_packed_says_why(tmp_path, case):
    build, how, reason = NOT_PACKED[case]
    shape = (6, 6, 33) if case == "odd" else (6, 6, 32)
    model = binarized(build, shape, how=how)
    assert reason in target_notes(model, "lce")["binary"]
    file = read_file(exported(model, tmp_path))
    assert "LceBconv2d" not in file.operator_counts() and file.float_operators() == []
    assert target_notes(model, "litert") == {}


def test_missing_python_says_how_to_make_one(padded, padded_file, monkeypatch, tmp_path):
    data = small_models.batches(small_models.data_for(padded, 2))
    for value in ("", str(tmp_path / "none")):
        monkeypatch.setenv(larq.VARIABLE, value)
        with pytest.raises(UserError, match="pip install .*larq-compute-engine"):
            qat.verify_tflite(padded_file, padded, data)


def test_litert_target_is_as_before(padded, tmp_path):
    counts = read_file(qat.export_tflite(padded, tmp_path / "m.tflite")).operator_counts()
    assert set(counts) == {"QUANTIZE", "GREATER_EQUAL", "SELECT_V2", "CONV_2D", "DEQUANTIZE"}


# --- Larq's kernels ---


def steps_apart(model, path, kernels: str = "default", litert=None) -> np.ndarray:
    """Differences to the outputs of the model, or of a file for LiteRT, in steps of their grid."""
    data = small_models.data_for(model, 16)
    (output,) = larq.LarqRunner(path, kernels=kernels, threads=1).run(*data)
    (expected,) = (
        small_models.run_file(litert, data) if litert else small_models.run_model(model, data)
    )
    scales = [
        t.scale[0] for op in read_file(path).operators for t in op.outputs if t.dtype == "int8"
    ]
    return np.rint((output.values - expected) / scales[-1])


@needs_larq
@pytest.mark.parametrize("case", PADDINGS)
@pytest.mark.parametrize("channels", [32, 70])
def test_equals_model_and_litert(tmp_path, case, channels):
    model = binarized(lambda x: block(x, **PADDINGS[case]), (8, 10, channels))
    path = exported(model, tmp_path)
    assert read_file(path).operator_counts()["LceBconv2d"] == 1
    assert not steps_apart(model, path).any()
    litert = qat.export_tflite(model, tmp_path / "litert.tflite")
    assert not steps_apart(model, path, litert=litert).any()


@needs_larq
@pytest.mark.parametrize("kernels", ["optimized", "reference"])
def test_equal_on_all_kernels(padded, padded_file, kernels):
    assert not steps_apart(padded, padded_file, kernels).any()


@needs_larq
@pytest.mark.parametrize("how", ["w1a1", "w1a1-reactnet"])
def test_equal_shapes_keep_their_own_kernels(tmp_path, how):
    model = binarized(stack, (6, 6, 32), how=how)
    path = exported(model, tmp_path)
    assert read_file(path).operator_counts()["LceBconv2d"] == 4
    for _ in range(2):
        assert not steps_apart(model, path).any()


@needs_larq
def test_odd_channels_without_padding(tmp_path):
    model = binarized(block, (6, 6, 33))
    assert not steps_apart(model, exported(model, tmp_path)).any()


@needs_larq
@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_integer_boundaries(padded, tmp_path, io):
    path = exported(padded, tmp_path, io=io)
    assert not steps_apart(padded, path).any()


@needs_larq
def test_verify(tmp_path):
    def classifier(x):
        x = block(layers.ReLU()(layers.Conv2D(32, 3, name="first")(x)), 64, padding="same")
        return layers.Dense(5, name="logits")(layers.GlobalAveragePooling2D()(x))

    net = small_models.model_of(classifier, (8, 8, 3))
    model = small_models.quantized(net, "w1a1")
    qat.settle_biases(model)
    data = small_models.batches(small_models.data_for(model, 64))
    found = qat.verify_tflite(exported(model, tmp_path), model, data)
    assert found.integers_match and found.float_operators == []
    assert found.operators["LceBconv2d"] == 1 and found.num_examples == 64
    assert found.agreement >= 0.9


@needs_larq
def test_refused_files_say_why(padded_file, tmp_path):
    content = flatbuffer_utils.convert_bytearray_to_object(bytearray(padded_file.read_bytes()))
    for code in content.operatorCodes:
        if code.customCode == b"LceQuantize":
            code.customCode = b"LceNone"
    path = tmp_path / "m.tflite"
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(content))
    with pytest.raises(FileError, match="LceNone"):
        larq.LarqRunner(path)


def test_unknown_target(padded, tmp_path):
    with pytest.raises(ExportError, match="litert, tflm, lce"):
        qat.export_tflite(padded, tmp_path / "m.tflite", target="larq")
