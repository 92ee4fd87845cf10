"""Custom layers that qat is taught: what the file holds of them."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from small_models import layers

import qat
from qat.errors import UserError
from qat.export.pending import Elementwise
from qat.tflite_file import read_file

IMAGE = (6, 6, 3)
keras_serializable = tf_keras.utils.register_keras_serializable("tests")


@keras_serializable
class Snake(layers.Layer):
    def call(self, inputs):
        return inputs + tf.square(tf.sin(inputs))


@keras_serializable
class RandomDepth(layers.Layer):
    def call(self, inputs, training=None):
        return inputs * 0.9 if training else inputs


@keras_serializable
class Wave(layers.Layer):
    def call(self, inputs):
        return tf.cos(tf.reduce_sum(inputs, -1, keepdims=True)) + inputs


@keras_serializable
class Twice(layers.Layer):
    def call(self, inputs):
        return inputs + inputs


@keras_serializable
def bump(x):
    return tf.exp(-x * x)


def lower_twice(builder, layer, inputs, shape):
    def options(fused):
        made = schema.AddOptionsT()
        made.potScaleInt16 = False
        return made

    return Elementwise(
        name=layer.name, shape=shape, inputs=(inputs[0], inputs[0]), operator="ADD", options=options
    )


@pytest.fixture(scope="module", autouse=True)
def taught():
    qat.register(Snake, "pointwise")
    qat.register(RandomDepth, "identity")
    qat.register(Wave, "float", reason="no integer cosine")
    qat.register(Twice, "compute", lowering=lower_twice)
    qat.register(bump, "pointwise")


CASES = {  # layer, its operators in the file, those in float
    "pointwise": (lambda: Snake(name="it"), {"CAST", "ADD", "GATHER"}, False),
    "function": (lambda: layers.Activation(bump, name="it"), {"CAST", "ADD", "GATHER"}, False),
    "identity": (lambda: RandomDepth(name="it"), set(), False),
    "compute": (lambda: Twice(name="it"), {"ADD"}, False),
    "float": (lambda: Wave(name="it"), {"COS", "SUM", "ADD"}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_what_was_said(case, tmp_path):
    make, expected, is_float = CASES[case]

    def build(x):
        x = layers.Conv2D(4, 3, name="before")(x)
        return layers.Dense(3, name="behind")(make()(x))

    net = small_models.model_of(build, IMAGE)
    data = small_models.data_for(net, 8)
    model = small_models.quantized(net, "w8a8", data)
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    file = read_file(path)
    others = {"CONV_2D", "FULLY_CONNECTED", "QUANTIZE", "DEQUANTIZE"}
    assert set(file.operator_counts()) - others == expected
    assert bool(file.float_operators()) == is_float
    row = next(row for row in qat.quantization_report(model) if row.name == "it")
    assert row.reason_if_float == ("no integer cosine" if is_float else None)
    (wanted,), (actual,) = small_models.run_model(model, data), small_models.run_file(path, data)
    scale = file.operators[-1].inputs[0].scale[0]
    assert np.abs(np.rint(actual / scale) - np.rint(wanted / scale)).max() <= 3


WRONG = {
    "unknown role": ((Snake, "magic"), {}, "legal: identity"),
    "no lowering": ((Snake, "pass"), {}, "needs a lowering"),
    "no reason": ((Snake, "float"), {}, "needs a reason"),
    "no class": (("Snake", "identity"), {}, "no tf_keras layer class"),
    "function": ((bump, "identity"), {}, "can only be registered as 'pointwise'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case):
    arguments, options, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        qat.register(*arguments, **options)
    assert "\n" not in str(error.value)
