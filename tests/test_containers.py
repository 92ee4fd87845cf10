"""Kernel containers: which one holds what, and that LiteRT computes the same from all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import small_models
import tf_keras
from small_models import KERNELS, everywhere, kernel_layers, layers
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapperV2,
)

import qat
from qat.errors import QatError
from qat.export.containers import Container, kernel_container, pack
from qat.export.target import LITERT
from qat.grid import Grid
from qat.integers import integer_mismatches
from qat.layers import FakeQuantize
from qat.quantizers import FixedRangeQuantizer
from qat.tflite_file import read_file
from qat.verify.integer import simulate

SIGNED = Grid(scale=np.float32(0.1), zero_point=np.float32(3), qmin=-128, qmax=127)
POSITIVE = Grid(scale=np.float32(0.1), zero_point=np.float32(-128), qmin=-128, qmax=127)
WIDE = Grid(scale=np.float32(0.1), zero_point=np.float32(0), qmin=-32767, qmax=32767)
PLUS_MINUS_SEVEN = np.asarray([[7, -7, -7, 7]])


def codes(low, high, row=4):
    return np.asarray([[low] + [high] * (row - 1)])


@pytest.mark.parametrize(
    ("operator", "kernel", "bits", "unit", "output", "storage", "expected"),
    [
        ("CONV_2D", codes(-127, 5), 8, 1, SIGNED, "size", Container("int8", "int8")),
        ("CONV_2D", codes(-7, 7), 4, 1, POSITIVE, "size", Container("int4", "int4")),
        ("CONV_2D", codes(-7, 7), 4, 1, WIDE, "size", Container("int4", "int4")),
        ("CONV_2D", codes(-7, 7), 4, 1, SIGNED, "size", Container("int4", "int4")),
        ("CONV_2D", codes(-7, 7), 4, 1, SIGNED, "speed", Container("int8", "int8")),
        ("CONV_2D", codes(-2, 1), 2, 1, POSITIVE, "size", Container("int2", "int8", factor=63)),
        # A negative gamma has turned -2 around.
        ("CONV_2D", codes(-1, 2), 2, 1, POSITIVE, "size", Container("int4", "int4")),
        ("CONV_2D", PLUS_MINUS_SEVEN, 4, 7, SIGNED, "size", Container("int2", "int8", 7, 127)),
        ("DEPTHWISE_CONV_2D", codes(-7, 7), 4, 1, POSITIVE, "size", Container("int4", "int4")),
        # DEPTHWISE_CONV_2D computes garbage of INT4 with int16 activations.
        ("DEPTHWISE_CONV_2D", codes(-7, 7), 4, 1, WIDE, "size", Container("int4", "int8", 1, 18)),
        ("TRANSPOSE_CONV", codes(-7, 7), 4, 1, POSITIVE, "size", Container("int4", "int8", 1, 18)),
        ("FULLY_CONNECTED", codes(-2, 1), 2, 1, SIGNED, "size", Container("int2", "int2")),
        ("FULLY_CONNECTED", codes(-2, 1), 2, 1, SIGNED, "speed", Container("int4", "int4")),
        ("FULLY_CONNECTED", codes(-2, 1), 2, 1, WIDE, "size", Container("int4", "int4")),
        ("FULLY_CONNECTED", PLUS_MINUS_SEVEN, 4, 7, SIGNED, "size", Container("int2", "int2", 7)),
        # Rows that do not fill whole bytes.
        ("FULLY_CONNECTED", codes(-2, 1, 6), 2, 1, SIGNED, "size", Container("int4", "int4")),
        ("FULLY_CONNECTED", codes(-2, 1, 5), 2, 1, SIGNED, "size", Container("int8", "int8")),
    ],
)
def test_containers(operator, kernel, bits, unit, output, storage, expected):
    found = kernel_container(
        kernel,
        bits=bits,
        unit=unit,
        operator=operator,
        output=output,
        storage=storage,
        target=LITERT,
    )
    assert found == expected


def test_codes_are_packed_low_bits_first():
    assert pack(np.asarray([1, -2, -1, 0, 1]), "int2").tolist() == [0b00111001, 0b00000001]
    assert pack(np.asarray([1, -2, 7]), "int4").tolist() == [0xE1, 0x07]


def test_an_unknown_storage_is_refused():
    model = small_models.model_of(lambda x: layers.Dense(2)(x), (4,))
    with pytest.raises(QatError, match="weight_storage 'tiny'.*size, speed"):
        qat.settle_biases(small_models.quantized(model), weight_storage="tiny")


KINDS = tuple(kernel_layers(None))


@pytest.mark.parametrize("storage", ["size", pytest.param("speed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["w1a8", "w2a8", "w4a8", "w4a4", "w2a2", "w2a16"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_what_was_trained(kind, activation, recipe, storage, tmp_path):
    """At most 1 code of 10,000 differs on LiteRT's default kernels, packed or not, where float32
    sums come near a half (5 of 8 bits without a ReLU, as that between a separable layer's two
    kernels, where the second rounding of fine steps is left as it is); the simulator gives the
    reference kernels' codes."""
    if kind == "separable" and recipe == "w2a16":
        pytest.skip("two kernels, and the bound for 16 bits is that of one")
    layer = kernel_layers(activation)[kind]
    model = small_models.quantized(small_models.model_of(layer, (9, 9, 4)), everywhere(recipe))
    qat.settle_biases(model, weight_storage=storage)
    path = qat.export_tflite(model, tmp_path / "model.tflite", weight_storage=storage)
    data = small_models.data_for(model, 64)
    (expected,) = small_models.run_model(model, data)
    step = float(model.layers[-1].quantizer.grid(model.layers[-1].quantizer_weights).scale)
    least = 3 if recipe == "w2a2" else 10
    assert len(np.unique(expected)) > least and read_file(path).float_operators() == []
    outputs = {kernels: small_models.run_file(path, data, kernels)[0] for kernels in KERNELS}
    difference = np.abs(outputs["default"] - expected) / step
    if recipe == "w2a16":
        # The int16 kernels cut their multipliers to 16 bits, of which the first is a one: a code c
        # moves by up to |c| / 2^15 <= 1. Float32 sums in training, and input codes that round the
        # other way at a half, move it by far less than another one. Reals less than 2 apart round
        # to codes at most 2 apart, and the share of codes that differ is their mean distance.
        assert np.rint(difference).max() <= 2
        assert (difference > 0.5).mean() <= np.abs(expected / step).mean() / 2**15 + 1e-3
    else:
        allowed = 5e-4 if activation is None or kind == "separable" else 1e-4
        assert difference.max() < 1.5 and (difference > 0.5).mean() <= allowed
    np.testing.assert_array_equal(simulate(path, *data)[0], outputs["reference"])


def exported(recipe, tmp_path):
    """A convolution without a ReLU in front of another, and the file they become."""
    net = small_models.model_of(
        lambda x: layers.Conv2D(2, 3)(layers.Conv2D(8, 3, name="conv")(x)), (9, 9, 4)
    )
    model = small_models.quantized(net, everywhere(recipe))
    qat.settle_biases(model)
    return model, read_file(qat.export_tflite(model, tmp_path / "model.tflite"))


@pytest.mark.parametrize("recipe", ["w4a4", "w2a8"])
def test_without_a_relu_codes_are_counted_from_the_lowest_and_brought_back(recipe, tmp_path):
    _, file = exported(recipe, tmp_path)
    convolution, _ = (op for op in file.operators if op.name == "CONV_2D")
    (add,) = (op for op in file.operators if convolution.outputs[0] in op.inputs)
    lowest = {"w4a4": 112, "w2a8": -128}[recipe]
    assert convolution.outputs[0].zero_point == lowest < add.outputs[0].zero_point
    assert add.name == "ADD" and add.outputs[0].scale == convolution.outputs[0].scale
    assert not any(op.name == "MAXIMUM" and add.outputs[0] in op.inputs for op in file.operators)


@pytest.mark.parametrize("what", ["constant", "scale", "reader", "output"])
def test_an_output_that_is_not_brought_back_is_found(what, tmp_path):
    model, file = exported("w4a4", tmp_path)
    assert integer_mismatches(model, file) == []
    index, add = next(
        (i, op) for i, op in enumerate(file.operators) if "from_lowest" in op.inputs[0].name
    )
    x, offset = add.inputs
    if what == "constant":
        offset = dataclasses.replace(offset, data=offset.data + 1)
    elif what == "scale":
        offset = dataclasses.replace(offset, scale=offset.scale * 2)
    name = "SUB" if what == "reader" else "ADD"
    (output,) = add.outputs
    if what == "output":
        output = dataclasses.replace(output, zero_point=output.zero_point + 1)
    changed = dataclasses.replace(add, name=name, inputs=(x, offset), outputs=(output,))
    operators = [*file.operators[:index], changed, *file.operators[index + 1 :]]
    found = integer_mismatches(model, dataclasses.replace(file, operators=operators))
    assert any("from_lowest" in line for line in found)


def test_a_layer_with_a_quantizer_of_its_own_for_its_output(tmp_path):
    """As TFMOT's wrapper has it, with no FakeQuantize behind the kernel."""
    config = qat.configs.uniform(weight_bits=4)
    inputs = layers.Input((9, 9, 4))
    x = FakeQuantize(FixedRangeQuantizer(minimum=-3.0, maximum=3.0), name="x_fake_quantize")(inputs)
    for index in range(2):
        x = QuantizeWrapperV2(layers.Conv2D(8, 3, name=f"conv{index}"), config)(x)
    model = tf_keras.Model(inputs, x)
    rng = np.random.default_rng(0)
    for _ in range(3):
        model(rng.normal(size=(16, 9, 9, 4)).astype(np.float32), training=True)
    qat.settle_biases(model)
    file = read_file(qat.export_tflite(model, tmp_path / "model.tflite"))
    assert integer_mismatches(model, file) == []
