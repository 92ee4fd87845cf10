"""Operator calls and helper layers become plain layers of the same float function."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras.src.applications.convnext import LayerScale, StochasticDepth
from tf_keras.src.applications.inception_resnet_v2 import CustomScaleLayer

from qat.canonical import as_layers, canonicalize
from qat.canonical.operators import operators_to_layers

layers = tf_keras.layers
IMAGE = (8, 6, 4)
VECTOR = np.asarray([0.5, 2, -3, 4], np.float32)


def model_of(build, count=1, shape=IMAGE):
    inputs = [tf_keras.Input(shape) for _ in range(count)]
    model = tf_keras.Model(inputs, build(*inputs))
    rng = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(rng.uniform(0.5, 2, variable.shape))
    return model


def assert_same_function(model, other):
    """To 1e-5 of the largest output."""
    rng = np.random.default_rng(1)
    x = [rng.normal(0, 4, (3, *i.shape[1:])).astype(np.float32) for i in model.inputs]
    x = x[0] if len(x) == 1 else x
    pairs = zip(tf.nest.flatten(model(x)), tf.nest.flatten(other(x)), strict=True)
    for expected, actual in pairs:
        assert expected.shape == actual.shape and np.ptp(expected) > 0
        assert np.abs(expected - actual).max() <= 1e-5 * np.abs(expected).max()


def kinds(model):
    return [type(layer).__name__ for layer in model.layers if type(layer) is not layers.InputLayer]


# What is written: (function, the layers that it becomes); two arguments are two inputs.
ARITHMETIC = {
    "add": (lambda x, y: x + y, "Add"),
    "add a number": (lambda x: 3.0 + x, "Affine"),
    "add a vector": (lambda x: x + tf.constant(VECTOR), "Affine"),
    "bias_add": (lambda x: tf.nn.bias_add(x, VECTOR), "Affine"),
    "add_n": (lambda x, y: tf.add_n([x, y]), "Add"),
    "subtract": (lambda x, y: x - y, "Subtract"),
    "subtract a vector": (lambda x: x - VECTOR, "Affine"),
    "subtract from a number": (lambda x: 1 - x, "Affine"),
    "multiply": (lambda x, y: x * y, "Multiply"),
    "multiply by a vector": (lambda x: x * VECTOR[None, None], "Affine"),
    "broadcast": (
        lambda x: x * tf.reduce_mean(x, [1, 2], keepdims=True),
        "GlobalAveragePooling2D Multiply",
    ),
    "negative": (lambda x: -x, "Affine"),
    "square": (lambda x: x**2, "Multiply"),
    "scale": (lambda x: x / 2, "Rescaling"),
    "scale and shift": (lambda x: x / 127.5 - 1.0, "Affine"),
    "scale a rescaled": (lambda x: layers.Rescaling(2.0, 1.0)(x) * 3.0, "Affine"),
    "negative scale": (lambda x: x * -2.0, "Affine"),
    "maximum": (lambda x, y: tf.maximum(x, y), "Maximum"),
    "minimum": (lambda x, y: tf.minimum(x, y), "Minimum"),
    "mean": (lambda x: tf.reduce_mean(x, [1, 2]), "GlobalAveragePooling2D"),
    "mean over channels": (lambda x: tf.reduce_mean(x, -1, keepdims=True), "ReduceMean"),
    "max": (lambda x: tf.reduce_max(x, [-2, 1], keepdims=True), "GlobalMaxPooling2D"),
    "max over rows": (lambda x: tf.reduce_max(x, 1), "ReduceMax"),
    "sum": (lambda x: tf.reduce_sum(x, axis=3), "ReduceMean Rescaling"),
    "avg_pool": (lambda x: tf.nn.avg_pool(x, 3, [1, 2, 2, 1], "SAME"), "AveragePooling2D"),
    "max_pool2d": (lambda x: tf.nn.max_pool2d(x, (2, 3), 2, "VALID"), "MaxPooling2D"),
}
ACTIVATIONS = {
    "relu": (lambda x: tf.nn.relu(x), "Activation"),
    "relu6": (lambda x: tf.nn.relu6(x), "ReLU"),
    "bounds": (lambda x: tf.clip_by_value(x, 0, 6), "ReLU"),
    "one bound": (lambda x: tf.maximum(0.0, x), "ReLU"),
    "one bound each": (lambda x: tf.minimum(tf.maximum(x, 0.0), 6.0), "ReLU"),
    "leaky_relu": (lambda x: tf.nn.leaky_relu(x, 0.1), "LeakyReLU"),
    "elu": (lambda x: tf.nn.elu(x), "Activation"),
    "selu": (lambda x: tf.nn.selu(x), "Activation"),
    "silu": (lambda x: tf.nn.silu(x), "Activation"),
    "gelu": (lambda x: tf.nn.gelu(x), "Activation"),
    "softplus": (lambda x: tf.math.softplus(x), "Activation"),
    "sigmoid": (lambda x: tf.sigmoid(x), "Activation"),
    "tanh": (lambda x: tf.nn.tanh(x), "Activation"),
    "softmax": (lambda x: tf.nn.softmax(x, axis=3), "Softmax"),
}
MOVES = {
    "rows": (lambda x: x[:, 1:], "Slice"),
    "reversed": (lambda x: x[:, ::2, 1:-1, ::-1], "Slice"),
    "one channel": (lambda x: x[..., 1], "Slice Reshape"),
    "the last row": (lambda x: x[:, -1], "Slice Reshape"),
    "a new axis": (lambda x: x[:, None], "Reshape"),
    "split": (lambda x: tf.split(x, 2, axis=-1), "Slice Slice"),
    "uneven split": (lambda x: tf.split(x, [1, -1], axis=3), "Slice Slice"),
    "unstack": (lambda x: tf.unstack(x, axis=1)[2:4], "Slice Slice Reshape Reshape"),
    "concat": (lambda x, y: tf.concat([x, y], 1), "Concatenate"),
    "stack": (lambda x, y: tf.stack([x, y], -1), "Reshape Reshape Concatenate"),
    "tile": (lambda x: tf.tile(x, [1, 2, 1, 3]), "Concatenate Concatenate"),
    "resize": (lambda x: tf.image.resize(x, (5, 12)), "Resizing"),
    "nearest": (lambda x: tf.image.resize(x, (16, 3), method="nearest"), "Resizing"),
    "pad": (lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 3], [0, 0]]), "ZeroPadding2D"),
    "pad channels": (lambda x: tf.pad(x, [[0, 0], [0, 0], [0, 0], [2, 1]]), "Pad"),
    "reshape": (lambda x: tf.reshape(x, [-1, 12, 16]), "Reshape"),
    "reshape, keep batch": (lambda x: tf.reshape(x, [tf.shape(x)[0], -1]), "Reshape"),
    "transpose": (lambda x: tf.transpose(x, [0, 3, 1, 2]), "Permute"),
    "expand_dims": (lambda x: tf.expand_dims(x, -1), "Reshape"),
    "squeeze": (lambda x: tf.squeeze(x[:, :1], 1), "Slice Reshape"),
    "depth_to_space": (lambda x: tf.nn.depth_to_space(x, 2), "Reshape Permute Reshape"),
    "space_to_depth": (lambda x: tf.nn.space_to_depth(x, 2), "Reshape Permute Reshape"),
    "identity": (lambda x: tf.identity(tf.cast(x, tf.float32)) + 1.0, "Affine"),
}
HELPERS = {
    "Normalization": (
        lambda x: layers.Normalization(mean=[1.0, 2, 3, 4], variance=[4.0, 3, 2, 1])(x),
        "Affine",
    ),
    "center": (lambda x: layers.CenterCrop(5, 6)(x), "Cropping2D"),
    "bins": (lambda x: tf.cast(layers.Discretization([-0.5, 0.0, 0.7])(x), tf.float32), "Buckets"),
    "inverse": (lambda x: layers.Normalization(mean=1.0, variance=4.0, invert=True)(x), "Affine"),
    "LayerScale": (lambda x: LayerScale(1e-6, 4)(x), "ChannelScale"),
    "StochasticDepth": (lambda x: StochasticDepth(0.2)(x), "Dropout"),
    "RandomCrop": (lambda x: layers.RandomCrop(8, 6)(x) + 1.0, "Affine"),
    "CustomScaleLayer": (lambda x, y: CustomScaleLayer(0.3)([x, y]), "Rescaling Add"),
}
GROUPS = {
    "arithmetic": ARITHMETIC,
    "activations": ACTIVATIONS,
    "moves": MOVES,
    "helpers": HELPERS,
}


@functools.cache
def rewritten(group):
    """All cases of a group as branches of one model: (before, after, origins)."""

    def build(x, y):
        return {
            case: branch(x, y) if branch.__code__.co_argcount == 2 else branch(x)
            for case, (branch, _) in GROUPS[group].items()
        }

    model = model_of(build, 2)
    return model, *as_layers(model)


@pytest.mark.parametrize("group", GROUPS)
def test_operators_keep_the_function(group):
    model, made, origins = rewritten(group)
    assert_same_function(model, made)
    old = {layer.name for layer in model.layers}
    assert {name for known in origins.values() for name, _ in known} <= old


def behind(tensors):
    """The kinds of the layers that tensors are computed by, the inputs' own left out."""
    found, waiting = {}, list(tf.nest.flatten(tensors))
    while waiting:
        node = waiting.pop().node
        if not node.is_input:
            found[id(node.layer)] = type(node.layer).__name__
            waiting += node.keras_inputs
    return sorted(found.values())


@pytest.mark.parametrize(
    ("group", "case"), [(group, case) for group, cases in GROUPS.items() for case in cases]
)
def test_operators_become_layers(group, case):
    _, made, _ = rewritten(group)
    expected = GROUPS[group][case][1]
    assert behind(made.output[case]) == sorted(expected.split())


def hard_sigmoid(x):
    return layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)


HARD = {
    "MobileNetV3": (lambda x: layers.Multiply()([x, hard_sigmoid(x)]), "hard_swish"),
    "gate first": (lambda x: (tf.nn.relu6(3.0 + x) / 6.0) * x, "hard_swish"),
    "divided last": (lambda x: x * tf.nn.relu6(x + 3) / 6, "hard_swish"),
    "divided first": (lambda x: (x / 6) * layers.Activation("relu6")(x + 3), "hard_swish"),
    "sigmoid": (hard_sigmoid, "hard_sigmoid6"),
    "tf_keras's": (lambda x: tf_keras.activations.hard_sigmoid(x), "hard_sigmoid"),
}


@pytest.mark.parametrize("case", HARD)
def test_hard_activations_are_recognized(case):
    build, expected = HARD[case]
    model = model_of(build)
    made, origins = as_layers(model)
    assert_same_function(model, made)
    (layer,) = made.layers[1:]
    assert layer.activation.__name__ == expected
    # A recipe may name any of the layers that it is made of.
    assert {name for name, _ in origins[layer.name]} == {la.name for la in model.layers[1:]}


NOT_HARD = {
    "gate of another": lambda x, y: y * tf.nn.relu6(x + 3) / 6,
    "another shift": lambda x: x * tf.nn.relu6(x + 2) / 6,
    "another factor": lambda x: tf.nn.relu6(x + 3) / 5,
    "vector": lambda x: tf.nn.relu6(x + 3) * (VECTOR / 6),
}


@pytest.mark.parametrize("case", NOT_HARD)
def test_others_are_not_taken_for_hard_activations(case):
    build = NOT_HARD[case]
    model = model_of(build, build.__code__.co_argcount)
    made, _ = as_layers(model)
    assert_same_function(model, made)
    assert "Activation" not in kinds(made)


def test_a_gate_that_is_read_elsewhere_stays():
    def build(x):
        gate = hard_sigmoid(x)
        return [x * gate, gate]

    model = model_of(build)
    made, _ = as_layers(model)
    assert_same_function(model, made)
    assert kinds(made) == ["Activation", "Activation"]


def test_adapted_statistics_are_taken():
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 2, (50, *IMAGE)).astype(np.float32))
    inputs = tf_keras.Input(IMAGE)
    model = tf_keras.Model(inputs, normalization(inputs))
    made, _ = canonicalize(model)
    assert kinds(made) == ["Affine"]
    assert_same_function(model, made)


def test_a_drop_path_drops_whole_examples_in_training():
    model = model_of(lambda x: StochasticDepth(0.5)(x), shape=(3,))
    made, _ = as_layers(model)
    x = np.ones((400, 3), np.float32)
    kept = made(x, training=True).numpy()
    assert set(np.unique(kept)) == {0.0, 2.0} and (kept == kept[:, :1]).all()
    assert 0.4 < kept.mean() / 2 < 0.6


REFUSED = {
    "constant per pixel": (lambda x: x + np.ones((8, 6, 4), np.float32), "(8, 6, 4)"),
    "division": (lambda x, y: x / y, "float only"),
    "power": (lambda x: x**3, "only x ** 2"),
    "ranks": (lambda x: x + tf.reduce_mean(x, [1, 2]), "reshape"),
    "bounds": (lambda x: tf.clip_by_value(x, -1, 1), "bounds from below"),
    "upper bound": (lambda x: tf.minimum(x, 1.0), "bounds from above"),
    "matmul": (lambda x: tf.matmul(x, np.ones((8, 4, 5), np.float32)), "use Dense"),
    "matmul of examples": (
        lambda x, y: tf.matmul(x[:, 0, 0], y[:, 0, 0], transpose_b=True),
        "the batch",
    ),
    "broadcast matmul": (lambda x, y: tf.matmul(x, y[:, :1], transpose_b=True), "example by"),
    "bins as counts": (
        lambda x: layers.Discretization([0.0], output_mode="count", name="tf_bins")(x[:, 0, 0]),
        "output_mode='int'",
    ),
    "many bins": (
        lambda x: layers.Discretization([0.1 * i for i in range(256)], name="tf_bins")(x),
        "256 boundaries",
    ),
    "cropped too far": (lambda x: layers.CenterCrop(9, 6)(x), "no smaller than its own"),
    "shape": (lambda x: x * tf.cast(tf.shape(x)[1], tf.float32), "give them as numbers"),
    "batch": (lambda x: x[0], "the batch"),
    "transposed batch": (lambda x: tf.transpose(x), "the batch"),
    "mixed batch": (lambda x: tf.reshape(x, [-1, 4]), "between examples"),
    "reflection": (lambda x: tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], "REFLECT"), "zeros"),
    "bicubic": (lambda x: tf.image.resize(x, (4, 4), "bicubic"), "'bilinear'"),
    "unknown": (lambda x: tf.abs(x), "tf.math.abs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_operators_are_refused_in_one_line(case):
    build, words = REFUSED[case]
    model = model_of(build, build.__code__.co_argcount)
    with pytest.raises(ValueError, match="layer '(tf|center).*cannot be quantized") as error:
        operators_to_layers(model)
    assert words in str(error.value) and "\n" not in str(error.value)


SPELLINGS = {
    "tf relu": (tf.nn.relu, tf_keras.activations.relu),
    "tf softmax": (tf.nn.softmax, tf_keras.activations.softmax),
    "gelu": (tf.nn.gelu, tf_keras.activations.gelu),
    "relu6": (tf.nn.relu6, tf.nn.relu6),
    "layer": (layers.LeakyReLU(0.3), layers.LeakyReLU),
    "leaky_relu": (tf.nn.leaky_relu, layers.LeakyReLU),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_activations_have_one_spelling(case):
    written, expected = SPELLINGS[case]
    made, origins = canonicalize(
        model := model_of(
            lambda x: layers.Activation(written, name="alone")(
                layers.Conv2D(4, 3, activation=written, name="conv")(x)
            )
        )
    )
    assert_same_function(model, made)
    found = made.layers[2:]
    assert [origins[layer.name] for layer in found] == ["conv", "alone"]
    assert all(getattr(layer, "activation", type(layer)) is expected for layer in found)


@pytest.mark.parametrize("written", (tf.nn.swish, "silu", tf_keras.activations.swish))
def test_swish_is_a_sigmoid_and_a_product(written):
    made, origins = canonicalize(
        model := model_of(
            lambda x: layers.Activation(written, name="alone")(
                layers.Conv2D(4, 3, activation=written, name="conv")(x)
            )
        )
    )
    assert_same_function(model, made)
    found = [(origins[layer.name], type(layer).__name__) for layer in made.layers[2:]]
    assert found == [(by, kind) for by in ("conv", "alone") for kind in ("Activation", "Multiply")]


def test_an_activation_with_weights_is_refused():
    model = model_of(lambda x: layers.Conv2D(4, 3, activation=layers.PReLU(), name="conv")(x))
    with pytest.raises(ValueError, match="'conv_activation' is a PReLU with weights"):
        canonicalize(model)


@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
def test_separable_convolutions_of_sequences_are_split(padding):
    model = model_of(
        lambda x: layers.SeparableConv1D(
            5, 3, padding=padding, dilation_rate=2, depth_multiplier=2, activation="tanh"
        )(x),
        shape=(9, 4),
    )
    made, origins = canonicalize(model)
    assert_same_function(model, made)
    pad = ["ZeroPadding1D"] * (padding == "causal")
    assert kinds(made) == [*pad, "DepthwiseConv1D", "Conv1D", "Activation"]
    assert {origins[layer.name] for layer in made.layers[1:]} == {model.layers[1].name}
