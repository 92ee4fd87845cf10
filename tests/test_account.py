"""The account against the operators of the exported file: no layer missing, none made up."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
from small_models import layers

import qat
from qat.errors import ModelError
from qat.tflite_file import read_file

IMAGE = (8, 8, 2)
BITS = {"int2": 2, "int4": 4, "int8": 8}


def network(x):
    x = layers.Rescaling(1 / 255, name="rescale")(x)
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="first")(x)
    x = layers.ReLU(name="first_relu")(layers.BatchNormalization(name="first_norm")(x))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    y = layers.BatchNormalization(name="depthwise_norm")(y)
    x = layers.ReLU(name="add_relu")(layers.Add(name="add")([x, y]))
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.SeparableConv2D(4, 3, activation="relu", name="separable")(x)
    x = layers.Conv2D(4, 2, activation="relu", name="sensitive")(x)
    x = layers.Dropout(0.1, name="drop")(layers.Flatten(name="flat")(x))
    x = layers.BatchNormalization(name="alone")(x)
    return layers.Dense(3, activation="softmax", name="logits")(x)


@pytest.fixture(scope="module")
def net():
    return small_models.model_of(network, IMAGE)


@pytest.fixture(scope="module")
def model(net):
    eight = qat.TensorSpec(bits=8)
    recipe = small_models.recipe(
        4,
        8,
        qat.Rule(position="first", weights=eight, activations=eight),
        qat.Rule(layer="sensitive", keep_float="loses accuracy"),
        qat.Rule(layer="depthwise", weights=qat.TensorSpec(bits=1), activations=eight),
    )
    data = [np.random.default_rng(0).integers(0, 256, (16, *IMAGE)).astype(np.float32)]
    return small_models.quantized(net, recipe, data, input_range=(0, 255))


@pytest.fixture(scope="module")
def rows(model):
    return {row.name: row for row in qat.quantization_report(model)}


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return read_file(qat.export_tflite(model, tmp_path_factory.mktemp("account") / "m.tflite"))


def test_no_layer_is_missing_and_none_made_up(net, rows):
    users = [layer.name for layer in net.layers[1:]]
    split = {
        "separable": ["separable_depthwise", "separable_pointwise", "separable_relu"],
        "sensitive": ["sensitive", "sensitive_relu"],
        "logits": ["logits", "logits_softmax"],
    }
    expected = [name for user in users for name in split.get(user, [user])]
    assert sorted(rows) == sorted(expected)
    order = list(rows)
    assert order[:4] == ["rescale", "first", "first_norm", "first_relu"]
    assert order[-2:] == ["logits", "logits_softmax"]


def test_types_are_the_layers_own(net, rows):
    for layer in net.layers[1:]:
        if layer.name in rows:
            assert rows[layer.name].type == type(layer).__name__
    assert rows["separable_depthwise"].type == "DepthwiseConv2D"


def test_fused_layers(rows):
    assert {name: row.fused_into for name, row in rows.items() if row.fused_into} == {
        "rescale": "first",
        "first_norm": "first",
        "first_relu": "first",
        "depthwise_norm": "depthwise",
        "add_relu": "add",
        "separable_relu": "separable_pointwise",
        "sensitive_relu": "sensitive",
    }


def test_rows_without_fusion_are_the_operators(rows, file):
    """Each row of its own is one operator of the file; layers that do nothing are none."""
    operator = {
        "Conv2D": "CONV_2D",
        "DepthwiseConv2D": "DEPTHWISE_CONV_2D",
        "BatchNormalization": "DEPTHWISE_CONV_2D",
        "Dense": "FULLY_CONNECTED",
        "Add": "ADD",
        "MaxPooling2D": "MAX_POOL_2D",
        "Activation": "SOFTMAX",
    }
    own = [row for row in rows.values() if not row.fused_into]
    expected = [operator[row.type] for row in own if row.type in operator]
    glue = ("QUANTIZE", "DEQUANTIZE", "RESHAPE")
    # An ADD of a constant belongs to the convolution in front of it.
    parts = [op for op in file.operators if op.inputs[-1].name.endswith("/offset")]
    actual = [op.name for op in file.operators if op.name not in glue and op not in parts]
    assert sorted(actual) == sorted(expected)
    assert {row.type for row in own} - set(operator) == {"Flatten", "Dropout"}


def test_weight_bits_are_those_of_the_file(rows, file):
    kernels = {t.name: t for t in file.tensors if t.name.endswith("/kernel")}
    with_bits = {name: row.weight_bits for name, row in rows.items() if row.weight_bits}
    assert with_bits == {
        "first": 8,
        "depthwise": 1,
        "separable_depthwise": 4,
        "separable_pointwise": 4,
        "logits": 4,
    }
    for name, bits in with_bits.items():
        kernel = kernels[f"{name}/kernel"]
        assert BITS[kernel.dtype] == max(2, bits)
        assert len(np.unique(kernel.data)) <= 2**bits
    floats = {t.name for t in kernels.values() if t.dtype == "float32"}
    assert floats == {"sensitive/kernel"}


def test_methods(rows):
    assert rows["depthwise"].method == "binary"
    assert rows["first"].method == "minmax" and rows["logits"].method == "lsq"
    assert rows["first_norm"].method == "" and rows["drop"].method == ""


def test_reasons_name_the_float_operators(rows, file):
    reasons = {name: row.reason_if_float for name, row in rows.items() if row.reason_if_float}
    assert reasons == {"sensitive": "loses accuracy", "sensitive_relu": "loses accuracy"}
    row = rows["sensitive"]
    assert row.weight_bits is None and row.activation_bits is None
    float_operators = [name for name in file.float_operators() if name != "DEQUANTIZE"]
    assert [name for name in float_operators if name != "QUANTIZE"] == ["CONV_2D"]


def test_activation_bits(rows):
    bits = {name: row.activation_bits for name, row in rows.items()}
    assert all(bits[name] == 8 for name in ("first", "depthwise", "separable_pointwise", "logits"))
    assert all(bits[name] == 8 for name in ("add_relu", "pool", "logits_softmax"))


def three_convolutions(x):
    for name in ("first", "middle", "last"):
        x = layers.Conv2D(4, 3, activation="relu", name=name)(x)
    return x


MIDDLE = [  # recipe, weight and activation bits of the layer between, its kernel's method
    ("w4a2", 4, 2, "lsq"),
    ("w5a8", 5, 8, "minmax"),
    ("w4a16", 4, 16, "lsq"),
    ("wta8", 2, 8, "twn"),
    ("wta8-lsq", 2, 8, "lsq"),
    ("wta4-twn", 2, 4, "twn"),
    ("wta8-ttq", 2, 8, "ttq"),
    ("w4a4-minmax", 4, 4, "minmax"),
    ("w4a4-ewgs", 4, 4, "ewgs"),
    ("w3a3-dsq", 3, 3, "dsq"),
    ("w4a4-dorefa", 4, 4, "dorefa"),
    ("w2a8-statsq", 2, 8, "statsq"),
    ("w4a4-pact", 4, 4, "lsq"),
    ("w1a1", 1, 1, "binary"),
    ("w1a8-xnor", 1, 8, "xnor"),
    ("w1a4-bwn", 1, 4, "bwn"),
    ("w1a1-reactnet", 1, 1, "reactnet"),
]


@pytest.mark.parametrize(("name", "weight_bits", "activation_bits", "method"), MIDDLE)
def test_widths_and_methods_are_the_recipes(name, weight_bits, activation_bits, method):
    """First and last layers keep 8 bits, or 16; what a kernel reads is what its row says."""
    model = qat.quantize_model(small_models.model_of(three_convolutions, IMAGE), name)
    rows = {row.name: row for row in qat.quantization_report(model)}
    kernels = [rows[layer] for layer in ("first", "middle", "last")]
    edge = max(8, activation_bits)
    assert [row.activation_bits for row in kernels] == [edge, activation_bits, edge]
    assert [row.weight_bits for row in kernels] == [8, weight_bits, 8]
    assert all(type(row.weight_bits) is int for row in kernels)
    assert [row.method for row in kernels] == ["minmax", method, "minmax"]


@pytest.mark.parametrize("method", ["lsq", "lsqplus", "pact", "ewgs", "dsq", "dorefa", "minmax"])
def test_methods_of_activations(method):
    """The ReLU's row names the quantizer of what the next kernel reads."""
    model = qat.quantize_model(small_models.model_of(three_convolutions, IMAGE), f"w4a4-{method}")
    rows = {row.name: row for row in qat.quantization_report(model)}
    assert rows["first_relu"].method == method
    assert rows["last_relu"].method == "minmax"


def joined(x):
    """Sums inside a concatenation and a fused ReLU, a value read by a sign and by an addition."""
    x = layers.Conv2D(4, 3, padding="same", name="first")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(x))
    y = layers.Conv2D(4, 3, padding="same", name="middle")(x)
    y = layers.BatchNormalization(name="middle_norm")(y)
    added = layers.Add(name="added")([x, y])
    averaged = layers.AveragePooling2D(2, 1, padding="same", name="averaged")(y)
    summed = layers.Add(name="summed")([averaged, added])
    x = layers.Concatenate(name="joined")([summed, layers.ReLU(name="again")(added)])
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D(name="mean")(x))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w1a1", "w1a1-reactnet"])
def test_no_layer_of_a_wholly_quantized_network_is_float(recipe, tmp_path):
    net = small_models.model_of(joined, IMAGE)
    model = small_models.quantized(net, recipe)
    rows = qat.quantization_report(model)
    assert [row.name for row in rows if row.reason_if_float] == []
    assert len(rows) == len(net.layers) - 1
    file = read_file(qat.export_tflite(model, tmp_path / "m.tflite"))
    assert file.float_operators() == []


def test_a_float_model_is_refused(net):
    with pytest.raises(ModelError, match="quantize_model") as error:
        qat.quantization_report(net)
    assert "\n" not in str(error.value)
