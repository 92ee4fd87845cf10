"""Some layers quantized, others not: the operators of the file, and the account of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow_model_optimization as tfmot
import tf_keras
from small_models import layers

import qat
from qat.tflite_file import read_file

IMAGE = (8, 8, 3)
NAMES = ("one", "two", "three", "four")
KERNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
BITS = {2: "int2", 4: "int4", 8: "int8"}
keras = tfmot.quantization.keras


def chain(x):
    for name in NAMES:
        x = layers.Conv2D(4, 3, padding="same", activation="relu", name=name)(x)
    return layers.Dense(3, name="head")(layers.Flatten(name="flat")(x))


def kernel_types(file):
    """{layer: type of its kernel in the file}."""
    read = [op.inputs[1] for op in file.operators if op.name in KERNELS]
    return {kernel.name.removesuffix("/kernel"): kernel.dtype for kernel in read}


def by_rule(*selected, network=chain):
    net = small_models.model_of(network, IMAGE)
    eight = qat.TensorSpec(bits=8)
    rules = [qat.Rule(layer=f"{name}*", weights=eight, activations=eight) for name in selected]
    everything_else = qat.Rule(keep_float="not selected")
    model = qat.quantize_model(net, qat.Recipe(name="some", rules=(*rules, everything_else)))
    return qat.calibrate(model, small_models.batches(small_models.data_for(net)))


def by_annotation(*selected, network=chain):
    net = small_models.model_of(network, IMAGE)

    def annotated(layer):
        return keras.quantize_annotate_layer(layer) if layer.name in selected else layer

    copy = tf_keras.models.clone_model(net, clone_function=annotated)
    copy.set_weights(net.get_weights())
    model = keras.quantize_apply(copy, scheme=qat.scheme("w8a8"))
    return qat.calibrate(model, small_models.batches(small_models.data_for(net)))


REASONS = {by_rule: "not selected", by_annotation: "not annotated for quantization"}


@pytest.mark.parametrize("how", REASONS)
def test_selected_layers_are_integer_operators_and_others_float(how, tmp_path):
    """Neighbours stay integer between them; QUANTIZE and DEQUANTIZE stand at their ends alone."""
    model = how("two", "three")
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    file = read_file(path)
    assert kernel_types(file) == {
        "one": "float32", "two": "int8", "three": "int8", "four": "float32", "head": "float32",
    }  # fmt: skip
    assert [op.name for op in file.operators] == [
        "CONV_2D", "QUANTIZE", "CONV_2D", "CONV_2D", "DEQUANTIZE", "CONV_2D", "RESHAPE",
        "FULLY_CONNECTED",
    ]  # fmt: skip
    data = [np.random.default_rng(5).normal(0, 1, (6, *IMAGE)).astype(np.float32)]
    (expected,), (actual,) = small_models.run_model(model, data), small_models.run_file(path, data)
    assert np.abs(expected - actual).max() < 0.05 * np.ptp(expected)
    rows = {row.name: row for row in qat.quantization_report(model)}
    reason = REASONS[how]
    assert {name: rows[name].reason_if_float for name in (*NAMES, "head")} == {
        "one": reason, "two": None, "three": None, "four": reason, "head": reason,
    }  # fmt: skip


def curves(x):
    x = y = layers.Conv2D(4, 3, padding="same", name="one")(x)
    x = layers.Conv2D(4, 3, padding="same", name="two")(layers.Activation("swish", name="curve")(x))
    z = layers.Conv2D(4, 3, padding="same", name="between")(x)
    x = layers.ReLU(name="add_relu")(layers.Add(name="add")([z, y]))
    x = layers.Flatten(name="flat")(layers.Activation("tanh", name="bend")(x))
    return layers.Dense(3, activation="relu", name="head")(x)


@pytest.mark.parametrize("how", REASONS)
def test_layers_that_nobody_selected_are_float_with_their_reason(how, tmp_path):
    """Between integers and behind them: what is float in the file is so in the account."""
    model = how("one", "two", network=curves)
    rows = {row.name: row for row in qat.quantization_report(model)}
    floats = {name for name, row in rows.items() if row.reason_if_float == REASONS[how]}
    assert floats == {
        "curve_sigmoid", "curve_product", "between", "add", "add_relu", "bend", "flat", "head",
        "head_relu",
    }  # fmt: skip
    assert all(rows[name].activation_bits is None for name in floats)
    assert rows["one"].activation_bits == rows["two"].activation_bits == 8
    file = read_file(qat.export_tflite(model, tmp_path / "m.tflite"))
    operators = set(file.float_operators()) - {"QUANTIZE", "DEQUANTIZE", "RESHAPE"}
    assert operators == {"LOGISTIC", "MUL", "CONV_2D", "ADD", "TANH", "FULLY_CONNECTED"}


def test_widths_by_name_type_and_position(tmp_path):
    def widths(bits):
        return {"weights": qat.TensorSpec(bits=bits), "activations": qat.TensorSpec(bits=8)}

    net = small_models.model_of(chain, IMAGE)
    rules = (
        qat.Rule(position="last", **widths(8)),
        qat.Rule(layer="t*", keep_float="sensitive"),
        qat.Rule(type="Conv2D", position="first", **widths(8)),
        qat.Rule(type="Conv2D", **widths(4)),
        qat.Rule(**widths(8)),
    )
    model = small_models.quantized(net, qat.Recipe(name="mixed", rules=rules))
    file = read_file(qat.export_tflite(model, tmp_path / "m.tflite"))
    assert kernel_types(file) == {
        "one": "int8", "two": "float32", "three": "float32", "four": "int4", "head": "int8",
    }  # fmt: skip


def everything(x):
    """Kernels, fused and split layers, moves, identities, islands."""
    x = layers.Rescaling(1 / 255, name="rescale")(x)
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.PReLU(shared_axes=[1, 2], name="slopes")(layers.BatchNormalization(name="norm")(x))
    x = layers.LayerNormalization(name="layer_norm")(x)
    y = layers.DepthwiseConv2D(3, padding="same", activation="swish", name="depthwise")(x)
    x = layers.Maximum(name="larger")([x, y])
    x = layers.Dropout(0.2, name="drop")(layers.Activation("selu", name="curve")(x))
    x = layers.Permute((3, 1, 2), name="turn")(layers.Cropping2D(1, name="crop")(x))
    x = layers.Dense(5, activation="relu", name="dense")(layers.Flatten(name="flat")(x))
    return layers.Dense(3, name="head")(x)


# What a row that is not fused is in the file; nothing for layers that only name other shapes.
OPERATORS = {
    "conv": ["CONV_2D"],
    "slopes": ["PRELU"],
    "layer_norm": [
        "MEAN", "SQUARED_DIFFERENCE", "MEAN", "ADD", "RSQRT", "SUB", "MUL", "MUL", "ADD",
    ],
    "depthwise": ["DEPTHWISE_CONV_2D"],
    "depthwise_swish_sigmoid": ["LOGISTIC"],
    "depthwise_swish_product": ["MUL"],
    "larger": ["MAXIMUM"],
    "curve": ["CAST", "ADD", "GATHER"],
    "drop": [],
    "crop": ["SLICE"],
    "turn": ["TRANSPOSE"],
    "flat": ["RESHAPE"],
    "dense": ["FULLY_CONNECTED"],
    "head": ["FULLY_CONNECTED"],
}  # fmt: skip
FUSED = {"rescale": "conv", "norm": "conv", "dense_relu": "dense"}


def test_every_row_is_its_operators_of_the_file(tmp_path):
    net = small_models.model_of(everything, IMAGE)
    data = [np.random.default_rng(0).integers(0, 256, (8, *IMAGE)).astype(np.float32)]
    model = small_models.quantized(net, "w4a8", data, input_range=(0, 255))
    file = read_file(qat.export_tflite(model, tmp_path / "m.tflite"))
    rows = {row.name: row for row in qat.quantization_report(model)}
    assert {name: row.fused_into for name, row in rows.items() if row.fused_into} == FUSED
    assert set(rows) == {*OPERATORS, *FUSED}
    # 1. No operator of the file belongs to no row.
    expected = [name for row in rows for name in OPERATORS.get(row, [])]
    glue = ("QUANTIZE", "DEQUANTIZE")
    ends = ("/zero", "/offset")  # ADDs that requantize, and that belong to a convolution
    parts = [op for op in file.operators if op.inputs[-1].name.endswith(ends)]
    actual = [op.name for op in file.operators if op.name not in glue and op not in parts]
    assert sorted(actual) == sorted(expected)
    # 2. Weight bits are one kernel of that container each.
    for name, row in rows.items():
        kernels = [
            file.unpacked_constants().get(t.name, t)
            for op in file.operators if op.name in KERNELS
            for t in op.inputs if t.name.startswith(f"{name}/kernel")
        ]  # fmt: skip
        assert len(kernels) == (row.weight_bits is not None), name
        for kernel in kernels:
            assert kernel.dtype == BITS[row.weight_bits]
    # 3. Reasons are the float operators.
    reasons = {name for name, row in rows.items() if row.reason_if_float}
    assert reasons == {"layer_norm"}
    floats = [name for name in file.float_operators() if name not in glue]
    assert floats == OPERATORS["layer_norm"]
