"""What is affine in front of a kernel folds into it where that is the same function."""

from __future__ import annotations

import numpy as np
import pytest
import tf_keras

import qat
from qat.canonical.fold import fold_forward
from qat.operator_layers import Affine

layers = tf_keras.layers
MULTIPLIER, OFFSET = [0.5, 2.0, -1.0, 3.0], [1.0, -2.0, 0.0, 0.5]


def norm(trainable=False, **options):
    return layers.BatchNormalization(trainable=trainable, name="it", **options)


def affine():
    return Affine(MULTIPLIER, OFFSET, name="it")


def model_of(build, shape=(9, 8, 4)):
    inputs = tf_keras.Input(shape)
    model = tf_keras.Model(inputs, build(inputs))
    rng = np.random.default_rng(0)
    for variable in model.variables:
        low = 0.5 if "variance" in variable.name else -0.5
        variable.assign(rng.uniform(low, low + 1, variable.shape))
    return model


def fold(model, may_fold=lambda affine, kernel: True):
    """The folded model; the outputs before and after."""
    x = np.random.default_rng(1).normal(size=(3, *model.input_shape[1:])).astype(np.float32)
    expected = model(x).numpy()
    made = fold_forward(model, may_fold)
    return made, expected, made(x).numpy()


SEQUENCE = (9, 4)
FOLDED = {
    "conv": (lambda x: layers.Conv2D(3, 3)(affine()(x)), None),
    "conv without bias": (lambda x: layers.Conv2D(3, 3, use_bias=False)(affine()(x)), None),
    "strided 1x1": (lambda x: layers.Conv2D(3, 1, 2, padding="same")(affine()(x)), None),
    "depthwise": (lambda x: layers.DepthwiseConv2D(3, depth_multiplier=2)(affine()(x)), None),
    "dense": (lambda x: layers.Dense(3, use_bias=False)(affine()(x)), None),
    "sequence": (lambda x: layers.Conv1D(3, 3, dilation_rate=2)(affine()(x)), SEQUENCE),
    "one number": (lambda x: layers.Conv2D(3, 3)(Affine(-2.0, 1.0, name="it")(x)), None),
    "frozen norm": (lambda x: layers.Conv2D(3, 3)(norm()(x)), None),
    "norm without gamma": (lambda x: layers.Dense(3)(norm(scale=False, center=False)(x)), None),
}


@pytest.mark.parametrize("case", FOLDED)
def test_it_folds(case):
    build, shape = FOLDED[case]
    made, expected, actual = fold(model_of(build, shape or (9, 8, 4)))
    assert np.abs(expected - actual).max() <= 1e-5 * np.abs(expected).max()
    layer, kernel = made.layers[1:]
    assert (layer.name, type(layer).__name__, layer.into) == ("it", "FoldedAway", kernel.name)


def twice(x):
    conv = layers.Conv2D(4, 3, padding="valid")
    return conv(conv(affine()(x)))


def read_twice(x):
    y = affine()(x)
    return layers.Concatenate()([layers.Conv2D(3, 3)(y), layers.Cropping2D(1)(y)])


KEPT = {
    "padding": lambda x: layers.Conv2D(3, 3, padding="same")(affine()(x)),
    "in front of a pad": lambda x: layers.Conv2D(3, 3)(layers.ZeroPadding2D(1)(affine()(x))),
    "in front of a pool": lambda x: layers.MaxPooling2D(2, padding="same")(norm()(x)),
    "trained norm": lambda x: layers.Conv2D(3, 3)(norm(trainable=True)(x)),
    "relu": lambda x: layers.Conv2D(3, 3)(layers.ReLU()(norm()(x))),
    "behind a kernel": lambda x: layers.Conv2D(3, 3)(norm()(layers.Conv2D(2, 3)(x))),
    "groups": lambda x: layers.Conv2D(4, 3, groups=2)(affine()(x)),
    "transposed": lambda x: layers.Conv2DTranspose(3, 3)(affine()(x)),
    "the output": lambda x: affine()(x),
    "regularized": lambda x: layers.Conv2D(3, 3, kernel_regularizer="l2")(affine()(x)),
    "regularized depthwise": lambda x: layers.DepthwiseConv2D(3, depthwise_regularizer="l2")(
        affine()(x)
    ),
    "constrained": lambda x: layers.Dense(3, kernel_constraint="max_norm")(norm()(x)),
    "constrained bias": lambda x: layers.Conv2D(3, 3, bias_constraint="non_neg")(affine()(x)),
    "kernel called twice": twice,
    "read twice": read_twice,
}


@pytest.mark.parametrize("case", KEPT)
def test_it_stays(case):
    made, expected, actual = fold(model_of(KEPT[case]))
    np.testing.assert_array_equal(expected, actual)
    assert type(made.get_layer("it")).__name__ != "FoldedAway"


def test_it_stays_where_the_caller_says_so():
    asked = []
    made, *_ = fold(
        model_of(FOLDED["conv"][0]), lambda *pair: asked.append([la.name for la in pair])
    )
    assert asked == [["it", made.layers[-1].name]]
    assert type(made.get_layer("it")) is Affine


@pytest.mark.parametrize(("recipe", "folds"), [("w8a8", True), ("w8a16", True), ("w4a8", False)])
def test_kernels_of_8_bits_take_it_in_and_the_account_says_so(recipe, folds):
    rule = qat.Recipe.from_name(recipe).rules[-1]
    float_model = model_of(lambda x: layers.Conv2D(3, 3, name="conv")(norm()(x)))
    model = qat.quantize_model(float_model, qat.Recipe(name="x", rules=(rule,)))
    row = next(row for row in qat.quantization_report(model) if row.name == "it")
    assert row.type == "BatchNormalization"
    assert row.fused_into == ("conv" if folds else "")
