"""The integer simulator on whole exported models: every tensor of the file, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras
from single_operator import reference
from small_models import data_for, model_of, quantized

import qat
from qat.verify.integer import Simulator

layers = tf_keras.layers
EXAMPLES = 4


def _branches(x):
    """All kinds of kernels, pools, joins and curves."""
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False)(x)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    z = layers.Conv2D(12, 3, padding="same", dilation_rate=2)(x)
    y = layers.ReLU()(layers.Add()([y, z]))
    pooled = layers.AveragePooling2D(3, strides=2, padding="same")(y)
    y = layers.Concatenate()([pooled, layers.MaxPooling2D(2, padding="same")(y)])
    y = layers.Conv2DTranspose(4, 3, strides=2, padding="same", name="up")(y)
    y = layers.Multiply()([y, layers.Activation("sigmoid")(y)])
    y = layers.Flatten()(layers.ZeroPadding2D(1)(y))
    y = layers.Dense(9, activation="tanh", name="hidden")(y)
    return layers.Dense(5, activation="softmax", name="classes")(y)


def _residual(x):
    """A residual block, which a binary recipe changes most, and a global mean."""

    def block(x, name):
        y = layers.Conv2D(8, 3, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(name=f"{name}_norm")(y)

    x = layers.ReLU()(block(x, "first"))
    y = block(layers.ReLU()(block(x, "second")), "third")
    x = layers.ReLU()(layers.Add()([x, y]))
    return layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(x))


@pytest.mark.parametrize(
    ("build", "recipe", "io"),
    [
        (_branches, "w8a8", "uint8"),
        (_branches, "w8a16", "float32"),
        (_residual, "w1a1", "int8"),
        pytest.param(_branches, "w4a6", "float32", marks=pytest.mark.slow),
        pytest.param(_residual, "w2a2", "float32", marks=pytest.mark.slow),
    ],
)
def test_every_tensor_of_an_exported_model(build, recipe, io, tmp_path):
    model = quantized(model_of(build, (11, 10, 3)), recipe)
    path = qat.export_tflite(model, tmp_path / "model.tflite", io=io)
    simulator = Simulator(path)
    (data,) = data_for(model, EXAMPLES)
    if io != "float32":
        (boundary,) = simulator.inputs
        low, high = (0, 255) if io == "uint8" else (-128, 127)
        codes = np.rint(data / boundary.scale) + boundary.zero_point
        data = np.clip(codes, low, high).astype(io)
    for example in data:
        theirs = reference(path.read_bytes(), example[None], every_tensor=True)
        for name, codes in simulator.tensors(example[None]).items():
            np.testing.assert_array_equal(codes, theirs[name], err_msg=name)
