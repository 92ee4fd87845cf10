from __future__ import annotations

import ast
import functools
import importlib
import pathlib
import re

import numpy as np
import pytest
import tf_keras

import models
import qat
from qat.reactnet import LearnedSlope

SHAPES = ((8, 8, 1), (28, 28, 1), (33, 47, 3))
# resnet32 and resnet56 share resnet20's module.
WITH_WIDTH = tuple(n for n in models.MODELS if n not in ("lenet", "resnet32", "resnet56"))


@functools.cache
def built(name: str, shape: tuple[int, int, int], num_classes: int) -> tf_keras.Model:
    return models.build(name, shape, num_classes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", models.MODELS)
def test_logits_are_finite_and_shaped(name, shape):
    num_classes = 10 if shape == (28, 28, 1) else 3
    model = built(name, shape, num_classes)
    images = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.float32)
    logits = model(images, training=False).numpy()
    assert model.input_shape == (None, *shape)
    assert logits.shape == (2, num_classes)
    assert np.isfinite(logits).all()
    assert not np.array_equal(logits[0], logits[1]), "the logits ignore the image"


@pytest.mark.parametrize("name", models.MODELS)
def test_layers_follow_the_contract(name):
    model = built(name, (28, 28, 1), 10)
    names = [layer.name for layer in model.layers]
    assert len(set(names)) == len(names)
    # A name that Keras made up ends in a running number that changes with every model built.
    assert all(re.fullmatch(r"[a-z]+\d*(_[a-z]+\d*|_\d)*", layer) for layer in names), names
    assert not any(re.match(r"(conv2d|batch_norm|re_lu|dense_\d|add_\d)", layer) for layer in names)

    first, last = model.layers[1], model.layers[-1]
    assert (first.name, type(first).__name__) == ("rescale", "Rescaling")
    np.testing.assert_allclose(first(np.float32([0, 255])), [0, 1], rtol=1e-6)
    assert (last.name, last.units, last.use_bias) == ("logits", 10, True)
    assert last.activation is tf_keras.activations.linear

    for layer in model.layers:
        if isinstance(layer, tf_keras.layers.Conv2D):  # DepthwiseConv2D is one, too
            assert not layer.use_bias and layer.activation is tf_keras.activations.linear
            (node,) = layer.outbound_nodes
            assert isinstance(node.outbound_layer, tf_keras.layers.BatchNormalization)
            assert node.outbound_layer.momentum == 0.9
            assert node.outbound_layer.epsilon == 1e-3


def test_relu6_is_what_the_mobilenets_use():
    for name in models.MODELS:
        relus = [
            layer
            for layer in built(name, (28, 28, 1), 10).layers
            if isinstance(layer, tf_keras.layers.ReLU)
        ]
        expected = 6.0 if name.startswith("mobilenet") else None
        assert relus and all(layer.max_value == expected for layer in relus), name


@pytest.mark.parametrize("name", models.MODELS)
def test_parameter_counts_are_the_documented_ones(name):
    documented = re.findall(
        r"([\d,]+) parameters for \(([\d, ]+)\) and (\d+) classes",
        importlib.import_module(f"models.{name}").__doc__,
    )
    assert documented
    for count, shape, num_classes in documented:
        model = built(name, tuple(int(size) for size in shape.split(",")), int(num_classes))
        assert model.count_params() == int(count.replace(",", ""))


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_resnet_has_the_size_that_the_paper_implies(name, depth):
    # He et al., section 4.2: weights of 3x3 convolutions, 2n layers in each stage, counted by hand.
    n = (depth - 2) // 6
    kernels = 9 * (3 * 16 + 2 * n * 16 * 16)
    kernels += 9 * (16 * 32 + (2 * n - 1) * 32 * 32) + 9 * (32 * 64 + (2 * n - 1) * 64 * 64)
    kernels += 16 * 32 + 32 * 64  # the two projections
    model = built(name, (32, 32, 3), 10)
    convolutions = [x for x in model.layers if isinstance(x, tf_keras.layers.Conv2D)]
    assert sum(layer.kernel.shape.num_elements() for layer in convolutions) == kernels
    assert len(convolutions) + 1 == depth + 2


@pytest.mark.slow
def test_spatial_sizes_follow_the_stride_policy():
    def first_and_last(name, shape):
        sizes = [
            layer.output_shape[1:3]
            for layer in models.build(name, shape, 2, width=0.25).layers
            if isinstance(layer, tf_keras.layers.Conv2D)
        ]
        return sizes[0], sizes[-1]

    assert first_and_last("mobilenet_v2", (32, 32, 3)) == ((32, 32), (8, 8))
    assert first_and_last("mobilenet_v2", (65, 64, 3)) == ((33, 32), (5, 4))
    assert first_and_last("mobilenet_v1", (64, 64, 3)) == ((64, 64), (8, 8))
    assert first_and_last("mobilenet_v1", (96, 96, 3)) == ((48, 48), (6, 6))
    assert first_and_last("birealnet", (33, 47, 3)) == ((33, 47), (9, 12))
    assert first_and_last("quicknet", (28, 28, 1)) == ((28, 28), (7, 7))
    assert first_and_last("quicknet", (65, 96, 3)) == ((33, 48), (9, 12))
    assert first_and_last("reactnet", (28, 28, 1)) == ((28, 28), (7, 7))
    assert first_and_last("reactnet", (65, 96, 3)) == ((33, 48), (9, 12))


@pytest.mark.parametrize(("name", "count"), [("birealnet", 12), ("quicknet", 5)])
def test_every_binary_convolution_has_its_own_relu_and_shortcut(name, count):
    model = built(name, (28, 28, 1), 10)
    convolutions = [x for x in model.layers if re.fullmatch(r"stage\d_conv\d", x.name)]
    assert len(convolutions) == count
    for layer in convolutions:
        assert model.get_layer(f"{layer.name}_relu").output is layer.input
        main, shortcut = model.get_layer(f"{layer.name}_add").input
        assert main is model.get_layer(f"{layer.name}_bn").output
        if layer.strides == (1, 1):  # the identity shortcut starts in front of the ReLU
            assert shortcut is model.get_layer(f"{layer.name}_relu").input


def test_reactnets_shortcuts_carry_what_its_relus_give():
    model = built("reactnet", (28, 28, 1), 10)
    convolutions = [x for x in model.layers if re.fullmatch(r"stage\d_conv\d", x.name)]
    assert len(convolutions) == 5
    for layer in convolutions:
        add = model.get_layer(f"{layer.name}_add")
        main, shortcut = add.input
        assert main is model.get_layer(f"{layer.name}_bn").output and shortcut is layer.input
        assert model.get_layer(f"{layer.name}_relu").input is add.output
    eight = qat.TensorSpec(bits=8)
    real = [qat.Rule(layer=x, weights=eight, activations=eight) for x in ("stem_*", "transition*")]
    recipe = qat.Recipe.from_name("w1a1-reactnet").with_rules(*real)
    quantized = qat.quantize_model(model, recipe)
    slopes = [x for x in quantized.layers if isinstance(x, LearnedSlope)]
    assert len(slopes) == 5  # each ReLU in front of a 3x3 convolution


@pytest.mark.parametrize("name", WITH_WIDTH)
def test_width_scales_the_filters(name):
    wide = built(name, (8, 8, 1), 3)
    narrow = models.build(name, (8, 8, 1), 3, width=0.5)
    pairs = [
        (a.filters, b.filters)
        for a, b in zip(wide.layers, narrow.layers, strict=True)
        if type(a).__name__ == "Conv2D" and not a.name.endswith("_expand")
    ]
    # Half of a multiple of 8, to the nearest multiple of 8, ties up (24 becomes 16).
    assert pairs and all(half == (full + 8) // 16 * 8 for full, half in pairs)
    with pytest.raises(ValueError, match="width must be above 0, got 0"):
        models.build(name, (8, 8, 1), 3, width=0)


def test_a_name_may_carry_options():
    assert models.chosen("cnn5") == ("cnn5", {})
    assert models.chosen("cnn5:width=2") == ("cnn5", {"width": 2.0})
    named = models.build("cnn5:width=0.5", (8, 8, 1), 3)
    assert named.name == "cnn5" and named.get_layer("conv1").filters == 16
    assert models.build("cnn5:width=0.5", (8, 8, 1), 3, width=1).get_layer("conv1").filters == 32


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("resnet50", (8, 8, 1), 3), {}, "unknown model 'resnet50'; legal names: lenet, cnn5,"),
        (("lenet", (8, 8, 1), 3), {"width": 2}, "no option 'width'; its options: none"),
        (("cnn5", (8, 8, 1), 3), {"depth": 2}, "no option 'depth'; its options: width"),
        (("cnn5:depth=2", (8, 8, 1), 3), {}, "no option 'depth'; its options: width"),
        (("cnn5:width=wide", (8, 8, 1), 3), {}, "width must be a number above 0, e.g. .*'wide'"),
        (("cnn5:width=nan", (8, 8, 1), 3), {}, "width must be a number above 0"),
        (("cnn5:width=2;width=3", (8, 8, 1), 3), {}, "has .width. twice"),
        (("cnn5:width", (8, 8, 1), 3), {}, "width must be a number above 0, e.g. .* got ''"),
        (("cnn5:=2", (8, 8, 1), 3), {}, "no option ''; its options: width"),
        (("cnn5", (8, 8), 3), {}, "must be .height, width, channels., got .8, 8."),
        (("cnn5", (None, 8, 1), 3), {}, "must be .height, width, channels."),
        (("cnn5", (8, 8, 1), 1), {}, "num_classes must be at least 2, got 1"),
    ],
)
def test_mistakes_get_one_helpful_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        models.build(*arguments, **options)
    assert "\n" not in str(error.value)


def test_models_import_nothing_of_qat():
    files = sorted(pathlib.Path(models.__file__).parent.glob("*.py"))
    assert len(files) >= len(models.MODELS)
    roots = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"relative import in {file.name}"
                roots.add(node.module.split(".")[0])
    assert roots <= {"__future__", "inspect", "models", "tf_keras"}
