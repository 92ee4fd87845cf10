"""Target tflm: files that tflite-micro runs as LiteRT's reference kernels do, and their sources."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_models
import tensorflow as tf
from small_models import layers

import models
import qat
from qat import pipeline
from qat.export import micro
from qat.export.c_source import c_sources
from qat.export.convert import convert
from qat.export.flatbuffer import to_bytes
from qat.export.graph import ExportError
from qat.export.micro import arena_bytes, micro_check
from qat.files import write_together
from qat.integers import integer_mismatches
from qat.reactnet import LearnedShift
from qat.tflite_file import read_file
from qat.verify.larq import open_runner

needs_micro = pytest.mark.skipif(
    not micro.importlib.util.find_spec("tflite_micro"), reason="tflite-micro is not installed"
)
IMAGE = (16, 16, 3)
REACTNET = "w1a1-reactnet"
# Prints the outputs of a file for the examples of an .npz, run in a process of its own.
RUN = """
import sys, numpy as np
from tflite_micro import runtime
interpreter = runtime.Interpreter.from_file(sys.argv[1], arena_size=int(sys.argv[3]))
outputs = []
for example in zip(*np.load(sys.argv[2]).values()):
    for number, x in enumerate(example):
        interpreter.set_input(x[None], number)
    interpreter.invoke()
    outputs.append(interpreter.get_output(0)[0])
np.save(sys.argv[2] + ".npy", outputs)
"""


def mixed(x):
    """Convolutions, an unfused dense layer with a 3-D input, pools, joins and curves."""
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x)))
    x = layers.Add()([x, layers.Conv2D(6, 1)(y)])
    x = layers.Concatenate()([layers.AveragePooling2D(2)(x), layers.MaxPooling2D(2)(x)])
    x = layers.Dense(7, activation="relu", name="pixels")(layers.Reshape((16, 12))(x))
    x = layers.Dense(9, activation="tanh", name="hidden")(layers.Flatten()(x))
    return layers.Dense(5, activation="softmax", name="classes")(x)


def dense(x):
    return layers.Dense(300, name="wide")(layers.Dense(200, activation="relu", name="first")(x))


def run_micro(path, data, arena) -> np.ndarray:
    inputs = path.with_suffix(".npz")
    np.savez(inputs, *data)
    subprocess.run([sys.executable, "-c", RUN, path, inputs, str(arena)], check=True)
    return np.load(f"{inputs}.npy")


def exported(folder, build, shape, recipe, **options):
    model = small_models.quantized(small_models.model_of(build, shape), recipe)
    return model, qat.export_tflite(model, folder / "model.tflite", target="tflm", **options)


# What the file holds, and that tflite-micro computes it.


@needs_micro
@pytest.mark.parametrize(
    ("build", "shape", "recipe"),
    [
        (mixed, IMAGE, "w4a8"),
        pytest.param(mixed, IMAGE, "w8a8", marks=pytest.mark.slow),
        pytest.param(mixed, IMAGE, "w1a1", marks=pytest.mark.slow),
        (dense, (64,), "w4a8"),
        pytest.param(dense, (64,), "w8a8", marks=pytest.mark.slow),
        pytest.param(mixed, IMAGE, "w2a4", marks=pytest.mark.slow),
    ],
)
def test_all_codes_are_the_reference_kernels(tmp_path, build, shape, recipe):
    how = recipe if recipe == "w1a1" else small_models.everywhere(recipe)
    model, path = exported(tmp_path, build, shape, how)
    file = read_file(path)
    assert integer_mismatches(model, file) == [] and file.float_operators() == []
    assert "FULLY_CONNECTED" not in file.operator_counts()
    assert "int2" not in {tensor.dtype for tensor in file.tensors}
    assert any(tensor.dtype == "int4" for tensor in file.tensors) == (recipe != "w8a8")
    data = small_models.data_for(model, 16)
    (expected,) = small_models.run_file(path, data, "reference")
    np.testing.assert_array_equal(run_micro(path, data, arena_bytes(path)), expected)
    (real,) = small_models.run_model(model, data)
    assert expected.shape == real.shape and len(np.unique(expected)) > 5


def layer_of(kind, activation):
    if kind != "affine":
        return small_models.kernel_layers(activation)[kind]
    norm = layers.BatchNormalization()
    return norm if activation is None else lambda x: layers.Activation(activation)(norm(x))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@needs_micro
@pytest.mark.parametrize(
    ("kind", "recipe", "storage", "allowed"),
    [
        ("convolution", "w8a8", "size", 1e-4),
        ("depthwise", "w8a8", "size", 1e-4),
        ("convolution", "w4a8", "size", 5e-4),
        slow("depthwise", "w4a8", "size", 5e-4),
        slow("convolution", "w4a8", "speed", 1e-4),
        slow("transposed", "w8a8", "size", 1e-4),
        slow("dense", "w8a8", "size", 1e-4),
        slow("dense", "w4a8", "size", 5e-4),
        # Its bias is not settled: off by up to half a step of the accumulator, M = 1/127 where the
        # output's range is the input's times the largest factor, which moves M / 2 of the codes.
        slow("affine", "w8a8", "size", 0.5 / 127),
    ],
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_file_computes_what_was_trained(kind, recipe, storage, allowed, activation, tmp_path):
    """On the reference kernels, which round twice, at most `allowed` of the codes differ."""
    shape = (17, 17, 32 if kind == "affine" else 4)
    build = small_models.model_of(layer_of(kind, activation), shape)
    model = small_models.quantized(build, small_models.everywhere(recipe))
    options = {"target": "tflm", "weight_storage": storage}
    qat.settle_biases(model, **options)
    path = qat.export_tflite(model, tmp_path / "model.tflite", **options)
    assert integer_mismatches(model, read_file(path)) == []
    data = small_models.data_for(model, 64)
    (expected,) = small_models.run_model(model, data)
    step = float(model.layers[-1].quantizer.grid(model.layers[-1].quantizer_weights).scale)
    (found,) = small_models.run_file(path, data, "reference")
    assert expected.size > 10**5 and len(np.unique(expected)) > 100
    (opened,) = open_runner(path).run(*data)  # what verification and evaluation take
    for codes in (found, opened.values):
        assert (np.abs(codes - expected) > step / 2).mean() <= allowed


@needs_micro
def test_learned_shifts_are_brought_back_onto_their_grid(tmp_path):
    model = small_models.quantized(small_models.model_of(small_models.residual, IMAGE), REACTNET)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, LearnedShift):
            layer.shift.assign(rng.normal(0, 0.3, layer.shift.shape))
    qat.settle_biases(model, target="tflm")
    path = qat.export_tflite(model, tmp_path / "model.tflite", target="tflm")
    file = read_file(path)
    assert integer_mismatches(model, file) == [] and file.float_operators() == []
    assert any("out/from_lowest" in tensor.name for tensor in file.tensors)
    (layer, *_) = (layer for layer in model.layers if isinstance(layer, LearnedShift))
    layer.shift.assign_add(tf.fill(layer.shift.shape, 0.05))
    assert any(layer.name in line for line in integer_mismatches(model, file))


@needs_micro
def test_a_file_for_other_kernels_is_told_apart(tmp_path):
    """Biases of a convolution's int8 kernel are lower for kernels that round twice."""
    model, path = exported(tmp_path, lambda x: layers.Conv2D(8, 3)(x), IMAGE, "w8a8")
    file = read_file(path)
    assert file.target == "tflm" and integer_mismatches(model, file) == []
    found = integer_mismatches(model, dataclasses.replace(file, target="litert"))
    assert any("differs" in line for line in found)
    exact = qat.ExactModel(model, target="tflm")
    data = small_models.data_for(model, 8)
    np.testing.assert_array_equal(
        exact.predict(data[0], verbose=0), small_models.run_file(path, data, "reference")[0]
    )


@needs_micro
@pytest.mark.parametrize("io", ["int8", "uint8"])
@pytest.mark.slow
def test_eight_bit_boundaries(tmp_path, io):
    model, path = exported(tmp_path, mixed, IMAGE, "w4a8", io=io)
    data = [np.random.default_rng(0).integers(0, 256, (8, *IMAGE)).astype(np.uint8)]
    data = [data[0].view(np.int8)] if io == "int8" else data
    (expected,) = small_models.run_file(path, data, "reference")
    np.testing.assert_array_equal(run_micro(path, data, arena_bytes(path)), expected)


@needs_micro
@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
@pytest.mark.slow
def test_sixteen_bits(tmp_path, recipe):
    """Beside int16 tflite-micro unpacks no kernel."""
    model, path = exported(tmp_path, mixed, IMAGE, small_models.everywhere(recipe))
    file = read_file(path)
    assert {tensor.dtype for tensor in file.tensors} <= {
        "float32", "int8", "int16", "int32", "int64"
    }  # fmt: skip
    data = small_models.data_for(model, 8)
    (expected,) = small_models.run_file(path, data, "reference")
    np.testing.assert_array_equal(run_micro(path, data, arena_bytes(path)), expected)


@needs_micro
def test_a_layer_kept_in_float(tmp_path):
    recipe = small_models.recipe(8, 8, qat.Rule(layer="pixels", keep_float="sensitive"))
    model, path = exported(tmp_path, mixed, IMAGE, recipe)
    assert "CONV_2D" in read_file(path).float_operators()
    assert integer_mismatches(model, read_file(path)) == []


@needs_micro
@pytest.mark.slow
def test_the_arena_of_one_file_is_sought_once(tmp_path, monkeypatch):
    model, path = exported(tmp_path, dense, (8,), "w8a8")
    monkeypatch.setattr(micro._Trial, "arena", None)
    assert arena_bytes(path) % 16 == 0


@needs_micro
@pytest.mark.slow
def test_the_arena_suffices_and_less_does_not(tmp_path):
    """Wide layers take more while they are set up than what is used in the end."""
    model, path = exported(tmp_path, dense, (64,), "w8a8")
    data, arena = small_models.data_for(model, 2), arena_bytes(path)
    assert arena % 16 == 0 and micro_check(path.read_bytes()) == arena
    run_micro(path, data, arena)
    with pytest.raises(subprocess.CalledProcessError):
        run_micro(path, data, 9 * arena // 10)


@needs_micro
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w1a1"])
@pytest.mark.parametrize(("name", "channels"), [("lenet", 1), ("resnet20", 3), ("mobilenet_v2", 3)])
def test_whole_networks(tmp_path, name, channels, recipe):
    data = pixels((16, 16, channels))
    net = with_statistics(models.build(name, (16, 16, channels), 10), data)
    model = small_models.quantized(net, recipe, data, input_range=(0, 255))
    path = qat.export_tflite(model, tmp_path / "model.tflite", target="tflm")
    (expected,) = small_models.run_file(path, data, "reference")
    np.testing.assert_array_equal(run_micro(path, data, arena_bytes(path)), expected)
    assert len(np.unique(expected)) > 20 and len(np.unique(expected, axis=0)) == len(expected)


def pixels(shape) -> list[np.ndarray]:
    """32 images of 0 to 255, coarse stripes of different brightness."""
    rng = np.random.default_rng(5)
    stripes = rng.uniform(0, 255, (32, 1, shape[1] // 4, shape[2])).repeat(4, axis=2)
    noise = rng.normal(0, 20, (32, *shape))
    return [np.clip(np.rint(stripes + noise), 0, 255).astype(np.float32)]


def with_statistics(net, data):
    """The network with moving statistics of the data."""
    for layer in net.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.5
    for _ in range(8):
        net(data[0], training=True)
    return net


# What tflite-micro refuses.


@needs_micro
@pytest.mark.parametrize(
    ("build", "recipe", "words"),
    [
        (lambda x: layers.ReLU(6.0)(layers.MaxPooling2D()(x)), "w8a8", ["RELU6 of 're", "fuses"]),
        (lambda x: layers.GlobalMaxPooling2D()(x), "w8a16", ["REDUCE_MAX", "8-bit activations"]),
    ],
)  # fmt: skip
def test_refusals_name_operator_layer_and_way_out(tmp_path, build, recipe, words):
    wrapped = lambda x: build(layers.Conv2D(4, 3)(x))  # noqa: E731
    with pytest.raises(ExportError) as error:
        exported(tmp_path, wrapped, IMAGE, small_models.everywhere(recipe))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in ["tflite-micro", *words])
    assert os.listdir(tmp_path) == []


@needs_micro
def test_a_litert_file_with_int4_dense_layers_is_refused():
    model = small_models.quantized(
        small_models.model_of(dense, (64,)), small_models.everywhere("w4a8")
    )
    with pytest.raises(ExportError, match="refuses FULLY_CONNECTED of 'first"):
        micro_check(to_bytes(convert(model), description="for LiteRT", target="litert"))


@needs_micro
def test_a_crash_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text("import os; os.abort()")
    monkeypatch.setattr(micro, "_SCRIPT", tmp_path / "crash.py")
    with pytest.raises(ExportError, match="crashed with signal 6; export it for target litert"):
        exported(tmp_path, dense, (64,), "w8a8")
    assert os.listdir(tmp_path) == ["crash.py"]


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    monkeypatch.setattr(micro.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'pip install -e "\.\[micro\]"'):
        exported(tmp_path, dense, (64,), "w8a8")
    job = pipeline.Job(
        dataset="digits",
        model="lenet",
        recipe=qat.Recipe.from_name("w8a8"),
        output_dir=tmp_path / "run",
        target="tflm",
    )
    with pytest.raises(ExportError, match="micro"):  # before hours of training
        pipeline.run(job)
    assert os.listdir(tmp_path) == []


# Sources beside the file.


@needs_micro
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_sources_compile_and_hold_the_file(tmp_path):
    model, path = exported(tmp_path, mixed, IMAGE, "w8a8")
    path = path.rename(tmp_path / "copy.tflite")  # the sources need it no more
    (tmp_path / "main.cc").write_text("""
#include <cstdint>
#include <cstdio>
#include "model.h"
int main() {
  auto address = reinterpret_cast<std::uintptr_t>(model_tflite);
  std::printf("%zu %zu %zu\\n", model_tflite_size, model_arena_size, (size_t)(address % 16));
  for (std::size_t i = 0; i < model_tflite_size; ++i) std::printf("%d ", model_tflite[i]);
}
""")
    compiler = ["g++", "-std=c++17", "-Wall", "-Werror", "main.cc", "model.cc", "-o", "main"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    run = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True)
    numbers, content = run.stdout.split("\n")
    expected = path.read_bytes()
    assert numbers.split() == [str(len(expected)), str(arena_bytes(path)), "0"]
    assert bytes(map(int, content.split())) == expected


def test_the_header_lists_the_operators_and_names_are_identifiers(tmp_path):
    model = small_models.quantized(small_models.model_of(mixed, IMAGE), "w8a8")
    graph = convert(model)
    sources = c_sources(tmp_path / "2nd-net.v1.tflite", b"\1\2", graph, 4096)
    source, header = (content.decode() for content in sources.values())
    assert [path.name for path in sources] == ["2nd-net.v1.cc", "2nd-net.v1.h"]
    assert '#include "2nd-net.v1.h"' in source and "_2nd_net_v1_arena_size = 4096;" in header
    methods = re.findall(r"resolver\.(\w+)\(\);", header)
    assert f"MicroMutableOpResolver<{len(methods)}>" in header
    assert {"AddConv2D", "AddDepthwiseConv2D", "AddMaxPool2D", "AddSoftmax"} <= set(methods)
    with pytest.raises(ExportError, match="ending in .tflite"):
        c_sources(tmp_path / "net.cc", b"", graph, 0)


def test_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "b").mkdir()
    contents = {tmp_path / "a": b"1", tmp_path / "b": b"2"}
    with pytest.raises(IsADirectoryError):
        write_together(contents)
    assert os.listdir(tmp_path) == ["b"]
    (tmp_path / "b").rmdir()

    def refuse(written):
        raise ExportError("no")

    with pytest.raises(ExportError):
        write_together(contents, refuse)
    assert os.listdir(tmp_path) == []
    write_together(contents)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}
