"""Every supported layer: the file's outputs against the quantized Keras model's, in steps.

The layers of a group are branches of one model, each with an output of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import tempfile

import numpy as np
import pytest
import small_models
import tf_keras
from small_models import layers

import qat
from qat.integers import integer_mismatches
from qat.tflite_file import FileModel, FileTensor, read_file

IMAGE, SEQUENCE, VECTOR = (9, 8, 4), (11, 4), (12,)


def then(*chain):
    """The layers one after another."""
    return lambda x: functools.reduce(lambda value, layer: layer(value), chain, x)


def conv(**options):
    return layers.Conv2D(6, options.pop("kernel_size", 3), **options)


def transposed(**options):
    return layers.Conv2DTranspose(5, options.pop("kernel_size", 3), **options)


norm, depthwise = layers.BatchNormalization, layers.DepthwiseConv2D
WITH_KERNELS = {
    "conv": (
        [IMAGE],
        {
            "valid": lambda x: conv()(x),
            "same": lambda x: conv(padding="same")(x),
            "strided_same": lambda x: conv(strides=2, padding="same")(x),
            "strided_valid": lambda x: conv(strides=(2, 1), kernel_size=(3, 2))(x),
            "dilated": lambda x: conv(dilation_rate=2)(x),
            "dilated_same": lambda x: conv(dilation_rate=(1, 2), padding="same")(x),
            "groups": lambda x: conv(groups=2)(x),
            "no_bias": lambda x: conv(use_bias=False)(x),
            "pointwise": lambda x: conv(kernel_size=1)(x),
            "relu": lambda x: conv(activation="relu")(x),
            "relu6": then(conv(), layers.ReLU(6.0)),
            "norm": then(conv(), norm()),
            "norm_relu": then(conv(use_bias=False, padding="same"), norm(), layers.ReLU()),
            "norm_without_gamma": then(conv(), norm(scale=False)),
        },
    ),
    "depthwise": (
        [IMAGE],
        {
            "valid": lambda x: depthwise(3)(x),
            "multiplier_same": lambda x: depthwise(3, depth_multiplier=2, padding="same")(x),
            "strided": lambda x: depthwise(3, strides=2, padding="same", use_bias=False)(x),
            "dilated": lambda x: depthwise(2, dilation_rate=2)(x),
            "norm_relu6": then(depthwise(3, use_bias=False), norm(), layers.ReLU(6.0)),
            "multiplier_norm": then(depthwise(3, depth_multiplier=2), norm()),
            "separable": lambda x: layers.SeparableConv2D(5, 3, depth_multiplier=2)(x),
            "separable_norm": then(
                layers.SeparableConv2D(5, 3, padding="same", use_bias=False), norm(), layers.ReLU()
            ),
        },
    ),
    "transposed": (
        [IMAGE],
        {
            "same": lambda x: transposed(padding="same")(x),
            "valid": lambda x: transposed()(x),
            "strided_same": lambda x: transposed(strides=2, padding="same")(x),
            "strided_valid": lambda x: transposed(strides=2, kernel_size=2)(x),
            "no_bias_relu": lambda x: transposed(use_bias=False, activation="relu")(x),
            "norm": then(transposed(strides=2, padding="same"), norm()),
        },
    ),
    "sequence": (
        [SEQUENCE],
        {
            "conv": lambda x: layers.Conv1D(5, 3)(x),
            "conv_same_strided": lambda x: layers.Conv1D(5, 3, strides=2, padding="same")(x),
            "conv_dilated": lambda x: layers.Conv1D(5, 3, dilation_rate=2, use_bias=False)(x),
            "conv_groups": lambda x: layers.Conv1D(6, 3, groups=2)(x),
            "conv_norm_relu": then(layers.Conv1D(5, 3), norm(), layers.ReLU()),
            "dense": lambda x: layers.Dense(7)(x),
            "dense_norm": then(layers.Dense(7), norm()),
        },
    ),
    "vector": (
        [VECTOR],
        {
            "dense": lambda x: layers.Dense(7)(x),
            "no_bias": lambda x: layers.Dense(7, use_bias=False)(x),
            "relu": lambda x: layers.Dense(7, activation="relu")(x),
            "norm": then(layers.Dense(7), norm()),
            "norm_relu": then(layers.Dense(7, use_bias=False), norm(), layers.ReLU()),
        },
    ),
}
PLAIN = {
    "values": (
        [IMAGE],
        {
            "norm": lambda x: norm()(x),
            "norm_relu": then(norm(), layers.ReLU()),
            "relu": lambda x: layers.ReLU()(x),
            "relu6": lambda x: layers.Activation("relu6")(x),
            "softmax": lambda x: layers.Softmax()(x),
            "sigmoid": lambda x: layers.Activation("sigmoid")(x),
            "tanh": lambda x: layers.Activation("tanh")(x),
            "conv_sigmoid": lambda x: conv(activation="sigmoid")(x),
            "dropout": lambda x: layers.Dropout(0.5)(x),
            "rescaling": lambda x: layers.Rescaling(-0.4, offset=0.3)(x),
            "zero_padding": lambda x: layers.ZeroPadding2D(((1, 2), (0, 3)))(x),
            "flatten": lambda x: layers.Flatten()(x),
            "reshape": lambda x: layers.Reshape((4, -1))(x),
        },
    ),
    "pools": (
        [IMAGE],
        {
            "max": lambda x: layers.MaxPooling2D()(x),
            "max_same": lambda x: layers.MaxPooling2D(3, 2, padding="same")(x),
            "average": lambda x: layers.AveragePooling2D()(x),
            "average_same": lambda x: layers.AveragePooling2D(3, 2, padding="same")(x),
            "global_average": lambda x: layers.GlobalAveragePooling2D()(x),
            "global_average_kept": lambda x: layers.GlobalAveragePooling2D(keepdims=True)(x),
            "global_max": lambda x: layers.GlobalMaxPooling2D()(x),
            "global_max_kept": lambda x: layers.GlobalMaxPooling2D(keepdims=True)(x),
        },
    ),
    "sequence": (
        [SEQUENCE],
        {
            "norm": lambda x: norm()(x),
            "max": lambda x: layers.MaxPooling1D()(x),
            "max_same": lambda x: layers.MaxPooling1D(3, 2, padding="same")(x),
            "average": lambda x: layers.AveragePooling1D()(x),
            "average_same": lambda x: layers.AveragePooling1D(3, 2, padding="same")(x),
            "global_average": lambda x: layers.GlobalAveragePooling1D()(x),
            "global_average_kept": lambda x: layers.GlobalAveragePooling1D(keepdims=True)(x),
            "global_max": lambda x: layers.GlobalMaxPooling1D()(x),
            "global_max_kept": lambda x: layers.GlobalMaxPooling1D(keepdims=True)(x),
            "zero_padding": lambda x: layers.ZeroPadding1D((1, 2))(x),
            "softmax": lambda x: layers.Softmax()(x),
        },
    ),
    "pairs": (
        [IMAGE, IMAGE],
        {
            "add": lambda x, y: layers.Add()([x, y]),
            "add_relu": lambda x, y: layers.ReLU()(layers.Add()([x, y])),
            "subtract": lambda x, y: layers.Subtract()([x, y]),
            "multiply": lambda x, y: layers.Multiply()([x, y]),
            "concatenate": lambda x, y: layers.Concatenate()([x, y]),
            "concatenate_rows": lambda x, y: layers.Concatenate(axis=1)([x, y]),
            "concatenate_convs": lambda x, y: layers.Concatenate()([conv()(x), depthwise(3)(y)]),
        },
    ),
    "vector": ([VECTOR], {"norm": lambda x: norm()(x), "softmax": lambda x: layers.Softmax()(x)}),
}
# Activations of 2 to 4 bits on the grid of the convolution that makes them: no operator between.
NARROW = (
    [IMAGE],
    {
        "conv": lambda x: conv()(x),
        "pointwise_norm": then(conv(kernel_size=1, use_bias=False), norm()),
        "depthwise": lambda x: depthwise(3, padding="same")(x),
        "depthwise_norm_relu": then(depthwise(3), norm(), layers.ReLU()),
        "transposed": lambda x: transposed(strides=2)(x),
        "pooled": then(layers.MaxPooling2D(), conv()),
        "dense": then(layers.Flatten(), layers.Dense(5)),
    },
)


def narrow_group():
    """The branches behind one 8-bit convolution with 4-bit (or narrower) outputs."""
    shapes, cases = NARROW
    trunk = {}

    def behind(build):
        def branch(x):
            if id(x) not in trunk:
                trunk.clear()
                trunk[id(x)] = conv(activation="relu", name="trunk")(x)
            return build(trunk[id(x)])

        return branch

    return shapes, {case: behind(build) for case, build in cases.items()}


GROUPS = {
    "narrow": narrow_group(),
    **{f"kernels/{group}": content for group, content in WITH_KERNELS.items()},
    **{f"plain/{group}": content for group, content in PLAIN.items()},
}
RECIPES = {
    "w8a8": tuple(group for group in GROUPS if group != "narrow"),
    "w4a8": tuple(f"kernels/{group}" for group in WITH_KERNELS),
    "w1a1": tuple(f"kernels/{group}" for group in WITH_KERNELS),
    "w4a4": ("narrow",),
    "w8a3": ("narrow",),
    "w2a2": ("narrow",),
    "w8a16": ("kernels/conv", "kernels/depthwise"),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A group's model and file, and the outputs of both."""

    model: tf_keras.Model
    file: FileModel
    expected: list[np.ndarray]
    actual: dict[str, list[np.ndarray]]


@functools.cache
def exported(recipe: str, group: str) -> Exported:
    shapes, cases = GROUPS[group]
    net = small_models.model_of(lambda *x: [build(*x) for build in cases.values()], *shapes)
    data = small_models.data_for(net, 24)
    bits = (int(part) for part in recipe[1:].split("a"))
    eight = qat.TensorSpec(bits=8)
    rules = [qat.Rule(layer="trunk", weights=eight, activations=eight)] * (group == "narrow")
    model = small_models.quantized(net, small_models.recipe(*bits, *rules), data)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.tflite")
        qat.export_tflite(model, path)
        return Exported(
            model,
            read_file(path),
            small_models.run_model(model, data),
            {kind: small_models.run_file(path, data, kind) for kind in small_models.KERNELS},
        )


# Operators without a kernel: (steps, share of outputs) that file and model may differ by.
# What moves, picks or averages codes is exact.
# MEAN, ADD, MUL and QUANTIZE multiply by a fixed-point number; curves are tables or float.
PLAIN_DRIFT = {
    **dict.fromkeys(("dropout", "zero_padding", "flatten", "reshape"), (0, 0.0)),
    **dict.fromkeys(("max", "max_same", "global_max", "global_max_kept"), (0, 0.0)),
    **dict.fromkeys(("average", "average_same"), (0, 0.0)),
    **dict.fromkeys(("global_average", "global_average_kept"), (1, 0.45)),
    **dict.fromkeys(("add", "add_relu", "subtract"), (1, 0.05)),
    **dict.fromkeys(("multiply", "relu", "relu6"), (1, 0.02)),
    **dict.fromkeys(("softmax", "sigmoid", "tanh"), (1, 0.01)),
    # Steps of 1/256 after input steps of s: the slope 1/4 makes a step of the input 64 s steps.
    "conv_sigmoid": (4, 0.05),
    # The two inputs go onto one grid by a QUANTIZE each, whose XNNPACK multiplier has 8 bits after
    # the point: 2^-9 of codes up to 128, a quarter of a step at most.
    **dict.fromkeys(("concatenate", "concatenate_rows", "concatenate_convs"), (1, 0.12)),
}
MOVES = ("DEQUANTIZE", "RESHAPE", "MAXIMUM", "MAX_POOL_2D", "GREATER_EQUAL")
KERNEL_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")


def drift_of(file: FileModel, tensor: FileTensor) -> tuple[float, float]:
    """How many steps a tensor's codes can differ by, and the share of them that do.

    One operator differs before its rounding by half a unit of the int32 bias, which is M output
    steps, and by the fixed-point multiplier's own rounding, at most min(M, 1/2); 16-bit kernels
    keep 16 bits of the multiplier, half a step at the top of the range. Two reals d steps apart
    lie on two sides of a rounding boundary with probability d. Codes that differ already pass
    through a kernel at most at its largest weight, two at once.
    """
    operator = next((op for op in file.operators if op.outputs[0] is tensor), None)
    if operator is None or (operator.name == "QUANTIZE" and not len(operator.inputs[0].scale)):
        return 0.0, 0.0
    if operator.name == "SELECT_V2":
        _, share = drift_of(file, operator.inputs[0])
        return (2.0 if share else 0.0), share
    moved = operator.name == "ADD" and operator.inputs[0].name.endswith("/from_lowest")
    if moved or operator.name in MOVES:
        return drift_of(file, operator.inputs[0])
    assert operator.name in KERNEL_OPERATORS, f"no tolerance is known for {operator.name}"
    kernel = next(tensor for tensor in operator.inputs if len(tensor.scale) > 1)
    x = operator.inputs[2 if operator.name == "TRANSPOSE_CONV" else 0]
    ratio = float((x.scale * kernel.scale).max() / tensor_scale(operator.outputs[0]))
    size, share = drift_of(file, x)
    stored = file.unpacked_constants().get(kernel.name, kernel)
    finer = float(stored.scale.max() / kernel.scale.max())
    passed = ratio * finer * float(np.abs(stored.data).max())
    taps = stored.data.size // len(kernel.scale)
    own = 0.5 * ratio + min(ratio, 0.5) + (0.5 if x.dtype == "int16" else 0.0)
    return own + 2 * math.ceil(size) * passed, own + share * taps * passed


def tensor_scale(tensor: FileTensor) -> float:
    (scale,) = tensor.scale
    return float(scale)


GROUP_RECIPES = [(recipe, group) for recipe, groups in RECIPES.items() for group in groups]
CASES = [(recipe, group, case) for recipe, group in GROUP_RECIPES for case in GROUPS[group][1]]


SLOW_RECIPES = ("w8a16", "w8a3", "w4a8", "w2a2", "w1a1")


def marked(cases):
    """Parameters; the recipes that others resemble run with the slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=slow if case[0] in SLOW_RECIPES else ()) for case in cases]


@pytest.mark.parametrize(("recipe", "group"), marked(GROUP_RECIPES))
def test_integers_match_and_nothing_computes_in_float(recipe, group):
    found = exported(recipe, group)
    assert integer_mismatches(found.model, found.file) == []
    assert found.file.float_operators() == []
    assert len(found.file.outputs) == len(GROUPS[group][1])


@pytest.mark.parametrize("kernels", small_models.KERNELS)
@pytest.mark.parametrize(("recipe", "group", "case"), marked(CASES))
def test_outputs(recipe, group, case, kernels):
    found, index = exported(recipe, group), list(GROUPS[group][1]).index(case)
    expected, actual = found.expected[index], found.actual[kernels][index]
    output = found.file.outputs[index]
    scale = next(op.inputs[0].scale[0] for op in found.file.operators if op.outputs[0] is output)
    drift = PLAIN_DRIFT.get(case) if group.startswith("plain/") else None
    limit, share = drift or drift_of(found.file, output)
    if drift is None:
        # Four standard deviations of a share in a sample, and two strays. Sums of few low-bit
        # products take few values, whose fractions are not spread evenly: half as much again.
        share = 1.5 * share + 4 * math.sqrt(share / expected.size) + 2 / expected.size
        # Sums of signs take no more values than there are products: the most frequent one in one
        # of five channels, as a tie, is up to half of the channel.
        share += 0.1 if recipe == "w1a1" else 0.0
    assert actual.shape == expected.shape
    assert np.ptp(expected) > 3 * scale, "the model's output is constant: nothing is compared"
    steps = np.abs(np.rint(actual / scale) - np.rint(expected / scale))
    assert steps.max() <= math.ceil(limit)
    assert (steps > 0).mean() <= share
