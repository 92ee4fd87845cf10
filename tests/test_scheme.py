"""The scheme: which tensor of a whole model gets which quantizer, by TFMOT's own functions."""

from __future__ import annotations

import contextlib
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs, quantizers
from qat.apply import quantize_model
from qat.canonical import calls
from qat.decision import NOT_ANNOTATED
from qat.errors import ModelError
from qat.layers import FakeQuantize, ReplacedBySign
from qat.operator_layers import (
    Affine,
    Buckets,
    ChannelScale,
    MatMul,
    Pad,
    ReduceMax,
    ReduceMean,
    Slice,
    hard_sigmoid6,
)
from qat.quantizers import (
    BinaryActivationQuantizer,
    BinaryWeightQuantizer,
    FixedRangeQuantizer,
    MovingAverageQuantizer,
)
from qat.recipe import Recipe, RecipeError, Rule, TensorSpec
from qat.roles import ROLES, Role, UnsupportedLayerError
from qat.scheme import QuantizeScheme, scheme

keras = tfmot.quantization.keras
layers = tf_keras.layers
EVERYTHING = Rule(weights=TensorSpec(), activations=TensorSpec())


def model_of(build, shape=(8, 8, 3)):
    inputs = tf_keras.Input(shape, name="image")
    model = tf_keras.Model(inputs, build(inputs), name="net")
    rng = np.random.default_rng(0)
    for variable in model.variables:
        positive = "variance" in variable.name or "gamma" in variable.name
        low, high = (0.5, 2.0) if positive else (-0.7, 0.7)
        variable.assign(rng.uniform(low, high, variable.shape))
    return model


def placed(model, recipe="w8a8", **options):
    """The model with its activation quantizers: TFMOT's layout transform of our scheme alone."""
    transform = scheme(recipe, **options).get_layout_transformer()
    everything = {layer.name: {"quantize_config": None} for layer in model.layers}
    return transform.apply(model, everything)[0]


def images(model, count=6, scale=1.0):
    x = np.random.default_rng(1).normal(0, scale, (count, *model.input_shape[1:]))
    return x.astype(np.float32)


def wrappers(model):
    """{name of the user's layer: TFMOT wrapper}."""
    found = [layer for layer in model.layers if isinstance(layer, QuantizeWrapper)]
    return {wrapper.layer.name: wrapper for wrapper in found}


def kernel_quantizers(model):
    """{name: kernel quantizer} of the layers whose kernel is quantized."""
    return {
        name: wrapper._weight_vars[0][1]
        for name, wrapper in wrappers(model).items()
        if wrapper._weight_vars
    }


def name_of(layer):
    return layer.layer.name if isinstance(layer, QuantizeWrapper) else layer.name


def walk(model):
    """What each call reads and gives: [(layer name, FakeQuantize layers read, ones behind it)].

    A FakeQuantize belongs to the tensor it makes; names are the user's.
    """
    made_by, found = {}, []
    listed = calls(model)
    for call in listed:
        made_by[id(call.output)] = call.layer
    for call in listed:
        if isinstance(call.layer, FakeQuantize):
            continue
        reads = [made_by.get(id(tensor)) for tensor in call.inputs]
        behind = [
            other.layer
            for other in listed
            if isinstance(other.layer, FakeQuantize) and other.inputs[0] is call.output
        ]
        found.append((name_of(call.layer), reads, behind))
    return found


def behind(model, name):
    """The FakeQuantize layers right behind a layer, for a layer that is called once."""
    ((_, _, found),) = [entry for entry in walk(model) if entry[0] == name]
    return found


# The layers that move or keep values: what reads behind them reads the grid in front of them.
MOVES = (layers.Flatten, layers.Dropout, layers.MaxPooling2D)


def read_by(model, name):
    """The layers that make the tensors which a layer reads, seen through those that move values."""
    ((_, found, _),) = [entry for entry in walk(model) if entry[0] == name]
    return [read_by(model, maker.name)[0] if isinstance(maker, MOVES) else maker for maker in found]


def output_of(model, layer):
    """The symbolic tensor of a layer that is called once in this model."""
    (call,) = [call for call in calls(model) if call.layer is layer]
    return call.output


@contextlib.contextmanager
def unchanged(model):
    """Puts the weights back afterwards, for models that tests share."""
    weights = model.get_weights()
    try:
        yield model
    finally:
        model.set_weights(weights)


def input_quantizer(model):
    (found,) = [
        call.layer
        for call in calls(model)
        if isinstance(call.layer, FakeQuantize) and call.inputs[0] is model.inputs[0]
    ]
    return found


def bits_read(model):
    """{name: width of the tensor that its kernel reads}."""
    names = {name for name, *_ in walk(model)}
    kernels = {name_of(la) for la in model.layers if configs.kernels(getattr(la, "layer", la))}
    return {name: read_by(model, name)[0].quantizer.num_bits for name in names & kernels}


# ---------------------------------------------------------------------------------------------
# One model with a bit of everything.


def everything(x):
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(x))
    y = layers.SeparableConv2D(6, 3, padding="same", activation="relu6", name="sep")(x)
    y = layers.Conv2D(6, 3, padding="same", name="body")(y)
    x = layers.ReLU(name="sum_relu")(layers.Add(name="sum")([x, y]))
    a = layers.AveragePooling2D(name="average")(x)
    m = layers.MaxPooling2D(name="max")(x)
    a = layers.Conv2D(3, 1, activation="relu", name="left")(a)
    m = layers.Conv2D(3, 1, name="right")(m)
    x = layers.Concatenate(name="cat")([a, m])
    x = layers.Dense(5, use_bias=False, name="dense")(layers.Flatten(name="flat")(x))
    x = layers.ReLU(name="dense_relu")(layers.BatchNormalization(name="dense_bn")(x))
    return layers.Dense(3, name="logits")(layers.Dropout(0.3, name="drop")(x))


RECIPES = ["w8a8", "w4a4", "w1a1"]
by_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def float_model():
    return model_of(everything)


@pytest.fixture(scope="module")
def snapshot(float_model):
    """What the float model was before anything was made of it."""
    nodes = {
        la.name: (len(la._inbound_nodes), len(la._outbound_nodes)) for la in float_model.layers
    }
    return nodes, float_model.get_config(), [w.copy() for w in float_model.get_weights()]


@pytest.fixture(scope="module")
def models(float_model, snapshot):
    return {recipe: quantize_model(float_model, recipe) for recipe in RECIPES}


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w1a1"])
def test_quantize_apply_gives_the_same_model(float_model, models, recipe):
    """`quantize_model` gives what TFMOT's annotate and apply give with our scheme."""
    annotated = keras.quantize_annotate_model(float_model)
    applied = keras.quantize_apply(annotated, scheme=scheme(recipe))
    x = images(float_model)
    with unchanged(models[recipe]) as ours:
        assert [la.name for la in applied.layers] == [la.name for la in ours.layers]
        ours.get_layer("drop").rate = applied.get_layer("drop").rate = 0.0
        for scale in (1.0, 3.0):  # the second time the ranges have been observed
            expected = ours(scale * x, training=True)
            np.testing.assert_array_equal(applied(scale * x, training=True), expected)
        np.testing.assert_array_equal(applied(x), ours(x))
        assert np.ptp(ours(x)) > 0  # an untrained TFMOT model gives zeros


def test_the_scheme_is_a_tfmot_scheme():
    made = scheme("w4a8", input_range=(0, 255))
    assert isinstance(made, QuantizeScheme) and isinstance(made, keras.QuantizeScheme)
    assert made.recipe == Recipe.from_name("w4a8")
    registry = made.get_quantize_registry()
    assert registry.supports(layers.Conv2D(2, 3)) and not registry.supports(layers.ReLU())
    config = registry.get_quantize_config(layers.Conv2D(2, 3))
    assert config == configs.LayerQuantizeConfig(weights=TensorSpec(bits=4))
    assert config.weights.method == "lsq"


def test_the_float_model_is_untouched(float_model, snapshot, models):
    nodes, config, weights = snapshot
    with unchanged(models["w4a4"]) as quantized:
        for variable in quantized.variables:
            variable.assign(tf.zeros_like(variable))
    now = {la.name: (len(la._inbound_nodes), len(la._outbound_nodes)) for la in float_model.layers}
    assert now == nodes
    assert float_model.get_config() == config
    for before, after in zip(weights, float_model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not {id(v) for v in float_model.variables} & {id(v) for v in quantized.variables}


def own_name(variable):
    return variable.name.split(":")[0].split("/")[-1]


@by_recipe
def test_weights_are_copied(float_model, models, recipe):
    """TFMOT's own rebuilding functions lose them."""
    made = {}
    for layer in models[recipe].layers:
        made |= {(name_of(layer), own_name(v)): v.numpy() for v in layer.weights}
    origin = {
        ("sep", "depthwise_kernel"): ("sep_depthwise", "depthwise_kernel"),
        ("sep", "pointwise_kernel"): ("sep_pointwise", "kernel"),
        ("sep", "bias"): ("sep_pointwise", "bias"),
    }
    for layer in float_model.layers:
        for variable in layer.weights:
            key = layer.name, own_name(variable)
            np.testing.assert_array_equal(made[origin.get(key, key)], variable)


@by_recipe
def test_every_kernel_is_quantized(models, recipe):
    found = kernel_quantizers(models[recipe])
    names = {"stem", "sep_depthwise", "sep_pointwise", "body", "left", "right", "dense", "logits"}
    assert set(found) == names
    width = int(recipe[1])
    for name, quantizer in found.items():
        # First and last layers keep eight bits.
        assert quantizer.num_bits == (8 if name in ("stem", "logits") else width)
        assert isinstance(quantizer, BinaryWeightQuantizer) == (quantizer.num_bits == 1)
        assert quantizer.channel_axes == ((-2, -1) if name == "sep_depthwise" else (-1,))


def test_narrow_activations_belong_to_what_kernels_read(models):
    assert bits_read(models["w8a8"]) == dict.fromkeys(bits_read(models["w8a8"]), 8)
    for recipe, width in (("w4a4", 4), ("w1a1", 1)):
        read = bits_read(models[recipe])
        assert read.pop("stem") == read.pop("logits") == 8
        assert read == dict.fromkeys(read, width)


def test_other_tensors_keep_eight_bits(models):
    for recipe in ("w4a4", "w1a1"):
        model = models[recipe]
        assert input_quantizer(model).quantizer.num_bits == 8
        # What the residual addition reads, what the pools read and what the caller reads.
        assert [la.quantizer.num_bits for la in behind(model, "body")] == [8]
        assert [la.quantizer.num_bits for la in behind(model, "logits")] == [8]
        for pool in ("average", "max"):
            (source,) = grids_of(model, pool)
            assert source.quantizer.num_bits == 8
        assert {la.quantizer.num_bits for la in grids_of(model, "sum")} == {8}


def grids_of(model, name):
    """As `read_by`, and seen through the identities that stand where a sign replaced a ReLU."""
    found = []
    for maker in read_by(model, name):
        replaced = isinstance(maker, ReplacedBySign)
        found += grids_of(model, maker.name) if replaced else [maker]
    return found


def test_sixteen_bits_are_everywhere_and_symmetric(float_model):
    model = placed(float_model, "w4a16")
    found = [la.quantizer for la in model.layers if isinstance(la, FakeQuantize)]
    assert len(found) > 8 and all(q.num_bits == 16 and q.symmetric for q in found)


def test_one_grid_behind_each_fused_group(models):
    """Dense+BN+ReLU gets one output grid, not one after each layer, as TFMOT gives it."""
    for recipe in ("w8a8", "w4a4"):
        model = models[recipe]
        for inner in ("stem", "stem_bn", "sum", "left", "dense", "dense_bn"):
            assert behind(model, inner) == []
        for last in ("stem_relu", "sep_depthwise", "sep_relu6", "body", "sum_relu"):
            assert behind(model, last)
        assert len(behind(model, "dense_relu")) == len(behind(model, "logits")) == 1


def test_concatenated_tensors_share_one_quantizer(models):
    for recipe in RECIPES:
        model = models[recipe]
        assert not any(isinstance(layer, FakeQuantize) for layer in read_by(model, "cat"))
        assert behind(model, "left_relu") == behind(model, "right") == []
        (quantizer,) = behind(model, "cat")
        # Dense alone reads it; signs are made of eight bits.
        spec = TensorSpec(bits={"w8a8": 8, "w4a4": 4, "w1a1": 8}[recipe])
        assert quantizer.quantizer == configs.activation_quantizer(spec)


def test_average_pooling_keeps_its_inputs_grid(models):
    for recipe in ("w8a8", "w4a4"):
        model = models[recipe]
        (source,) = read_by(model, "average")
        assert source in behind(model, "average")
        # The second call does not move the range.
        twice = [call for call in calls(model) if call.layer is source]
        assert [call.arguments[1].get("observe", True) for call in twice] == [True, False]
        assert behind(model, "max") in ([], [read_by(model, "right")[0]])


def test_averages_are_not_observed(models):
    with unchanged(models["w8a8"]) as model:
        model(images(model), training=True)
        (source,) = read_by(model, "average")
        weight = float(source.quantizer_weights["observed"])
    assert weight == pytest.approx(1 - source.quantizer.decay, rel=1e-6)  # one step, not two


def test_a_sign_takes_the_place_of_the_relu(models):
    model = models["w1a1"]
    for name in ("sep_depthwise", "sep_pointwise", "body", "left", "right", "dense"):
        (sign,) = read_by(model, name)
        assert isinstance(sign.quantizer, BinaryActivationQuantizer)
    # The ReLUs in front of a sign are the identity now; the one in front of the logits is not.
    for name, replaced in (("stem_relu", "ReLU"), ("sep_relu6", "Activation")):
        layer = model.get_layer(name)
        assert isinstance(layer, ReplacedBySign) and layer.replaced == replaced
        x = tf.constant([-1.5, 0.0, 9.0])
        np.testing.assert_array_equal(layer(x), x)
    assert isinstance(model.get_layer("dense_relu"), layers.ReLU)
    for recipe in ("w8a8", "w4a4"):
        assert isinstance(models[recipe].get_layer("stem_relu"), layers.ReLU)


def test_signs_see_negative_numbers(models):
    model = models["w1a1"]
    (sign,) = read_by(model, "body")
    probe = tf_keras.Model(model.inputs, output_of(model, sign))
    np.testing.assert_array_equal(np.unique(probe(images(model))), [-1, 1])


@by_recipe
def test_h5_needs_only_tfmots_scope(models, recipe, tmp_path):
    path = str(tmp_path / "model.h5")
    x = images(models[recipe])
    with unchanged(models[recipe]) as model:
        model.get_layer("drop").rate = 0.0
        model(x, training=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras calls the format legacy
            model.save(path)
        with keras.quantize_scope():
            restored = tf_keras.models.load_model(path)
        np.testing.assert_array_equal(restored(x), model(x))
        # Training goes on alike: shared quantizers are shared, unobserved calls unobserved.
        for scale in (0.5, 4.0):
            expected = model(scale * x, training=True)
            np.testing.assert_array_equal(restored(scale * x, training=True), expected)
        for one, two in zip(model.get_weights(), restored.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_configs_are_json(models, recipe):
    model = models[recipe]
    config = json.loads(json.dumps(model.get_config()))
    with keras.quantize_scope():
        restored = tf_keras.Model.from_config(config)
    restored.set_weights(model.get_weights())
    x = images(model)
    np.testing.assert_array_equal(restored(x), model(x))


@pytest.mark.parametrize("recipe", ["w4a4-minmax", "w4a4-lsq"])
def test_training_in_a_graph(recipe):
    model = quantize_model(model_of(chain), recipe)
    x = images(model, 16)
    model.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = {v.name: v.numpy() for v in model.trainable_variables}
    history = model.fit(x, np.arange(16) % 2, batch_size=8, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    still = [v.name for v in model.trainable_variables if (v.numpy() == before[v.name]).all()]
    assert still == []
    observed = [
        float(la.quantizer_weights["observed"])
        for la in model.layers
        if isinstance(la, FakeQuantize) and isinstance(la.quantizer, MovingAverageQuantizer)
    ]
    assert len(observed) >= 3
    assert observed == pytest.approx([1 - 0.99**4] * len(observed), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Roles: what stands behind each kind of layer.

OWN, SAME, NONE = "a grid of its own", "the grid of its input", "no quantizer behind it"
ROLE_CASES = {
    "Conv1D": ((8, 3), lambda x: layers.Conv1D(3, 3, name="it")(x), OWN),
    "Conv2D": ((8, 8, 3), lambda x: layers.Conv2D(3, 3, name="it")(x), OWN),
    "DepthwiseConv2D": ((8, 8, 3), lambda x: layers.DepthwiseConv2D(3, name="it")(x), OWN),
    "Conv2DTranspose": ((8, 8, 3), lambda x: layers.Conv2DTranspose(3, 3, name="it")(x), OWN),
    "Dense": ((8,), lambda x: layers.Dense(3, name="it")(x), OWN),
    "BatchNormalization": ((8, 8, 3), lambda x: layers.BatchNormalization(name="it")(x), OWN),
    "ReLU": ((8, 8, 3), lambda x: layers.ReLU(name="it")(x), OWN),
    "ReLU6": ((8, 8, 3), lambda x: layers.ReLU(6.0, name="it")(x), OWN),
    "relu": ((8, 8, 3), lambda x: layers.Activation("relu", name="it")(x), OWN),
    "linear": ((8, 8, 3), lambda x: layers.Activation("linear", name="it")(x), NONE),
    "Dropout": ((8, 8, 3), lambda x: layers.Dropout(0.5, name="it")(x), NONE),
    "SpatialDropout1D": ((8, 3), lambda x: layers.SpatialDropout1D(0.5, name="it")(x), NONE),
    "SpatialDropout2D": ((8, 8, 3), lambda x: layers.SpatialDropout2D(0.5, name="it")(x), NONE),
    "GaussianNoise": ((8, 8, 3), lambda x: layers.GaussianNoise(0.5, name="it")(x), NONE),
    "GaussianDropout": ((8, 8, 3), lambda x: layers.GaussianDropout(0.5, name="it")(x), NONE),
    "AlphaDropout": ((8, 8, 3), lambda x: layers.AlphaDropout(0.5, name="it")(x), NONE),
    "ActivityRegularization": (
        (8,),
        lambda x: layers.ActivityRegularization(0.1, name="it")(x),
        NONE,
    ),
    "RandomBrightness": ((8, 8, 3), lambda x: layers.RandomBrightness(0.5, name="it")(x), NONE),
    "RandomContrast": ((8, 8, 3), lambda x: layers.RandomContrast(0.5, name="it")(x), NONE),
    "RandomFlip": ((8, 8, 3), lambda x: layers.RandomFlip(name="it")(x), NONE),
    "RandomRotation": ((8, 8, 3), lambda x: layers.RandomRotation(0.5, name="it")(x), NONE),
    "RandomTranslation": (
        (8, 8, 3),
        lambda x: layers.RandomTranslation(0.5, 0.5, name="it")(x),
        NONE,
    ),
    "RandomZoom": ((8, 8, 3), lambda x: layers.RandomZoom(0.5, name="it")(x), NONE),
    "Permute": ((8, 8, 3), lambda x: layers.Permute((3, 1, 2), name="it")(x), NONE),
    "Resizing": (
        (8, 8, 3),
        lambda x: layers.Resizing(3, 5, interpolation="nearest", name="it")(x),
        NONE,
    ),
    "Resizing bilinear": ((8, 8, 3), lambda x: layers.Resizing(3, 5, name="it")(x), SAME),
    "Pad": ((8, 3), lambda x: Pad([[1, 2], [0, 1]], name="it")(x), NONE),
    "Slice": ((8, 3), lambda x: Slice([[1, 2, 1], [None] * 3], name="it")(x), NONE),
    "ReduceMax": ((8, 3), lambda x: ReduceMax([2], name="it")(x), NONE),
    "MatMul": ((8, 3), lambda x: MatMul(transpose_b=True, name="it")([x, x]), OWN),
    "Buckets": ((8,), lambda x: Buckets([0.0, 1.5], name="it")(x), (0.0, 255.0)),
    "ReduceMean": ((8, 3), lambda x: ReduceMean([2], name="it")(x), OWN),
    "Affine": ((8, 8, 3), lambda x: Affine(2.0, name="it")(x), OWN),
    "ChannelScale": ((8, 8, 3), lambda x: ChannelScale(name="it")(x), OWN),
    "hard_sigmoid6": ((8,), lambda x: layers.Activation(hard_sigmoid6, name="it")(x), (0.0, 1.0)),
    "MaxPooling1D": ((8, 3), lambda x: layers.MaxPooling1D(name="it")(x), NONE),
    "MaxPooling2D": ((8, 8, 3), lambda x: layers.MaxPooling2D(name="it")(x), NONE),
    "GlobalMaxPooling1D": ((8, 3), lambda x: layers.GlobalMaxPooling1D(name="it")(x), NONE),
    "GlobalMaxPooling2D": ((8, 8, 3), lambda x: layers.GlobalMaxPooling2D(name="it")(x), NONE),
    "Flatten": ((8, 8, 3), lambda x: layers.Flatten(name="it")(x), NONE),
    "Reshape": ((8, 8, 3), lambda x: layers.Reshape((64, 3), name="it")(x), NONE),
    "ZeroPadding1D": ((8, 3), lambda x: layers.ZeroPadding1D(name="it")(x), NONE),
    "ZeroPadding2D": ((8, 8, 3), lambda x: layers.ZeroPadding2D(name="it")(x), NONE),
    "AveragePooling1D": ((8, 3), lambda x: layers.AveragePooling1D(name="it")(x), SAME),
    "AveragePooling2D": ((8, 8, 3), lambda x: layers.AveragePooling2D(name="it")(x), SAME),
    "Concatenate": ((8, 8, 3), lambda x: layers.Concatenate(name="it")([x, x]), OWN),
    "Add": ((8, 8, 3), lambda x: layers.Add(name="it")([x, x]), OWN),
    "Subtract": ((8, 8, 3), lambda x: layers.Subtract(name="it")([x, x]), OWN),
    "Multiply": ((8, 8, 3), lambda x: layers.Multiply(name="it")([x, x]), OWN),
    "GlobalAveragePooling1D": (
        (8, 3),
        lambda x: layers.GlobalAveragePooling1D(name="it")(x),
        OWN,
    ),
    "GlobalAveragePooling2D": (
        (8, 8, 3),
        lambda x: layers.GlobalAveragePooling2D(name="it")(x),
        OWN,
    ),
    "Rescaling": ((8, 8, 3), lambda x: layers.Rescaling(0.5, 1.0, name="it")(x), OWN),
    "Softmax": ((8,), lambda x: layers.Softmax(name="it")(x), (0.0, 255 / 256)),
    "softmax": ((8,), lambda x: layers.Activation("softmax", name="it")(x), (0.0, 255 / 256)),
    "sigmoid": ((8,), lambda x: layers.Activation("sigmoid", name="it")(x), (0.0, 255 / 256)),
    "tanh": ((8,), lambda x: layers.Activation("tanh", name="it")(x), (-1.0, 127 / 128)),
    "Conv1DTranspose": ((8, 3), lambda x: layers.Conv1DTranspose(3, 3, name="it")(x), OWN),
    "DepthwiseConv1D": ((8, 3), lambda x: layers.DepthwiseConv1D(3, name="it")(x), OWN),
    "LeakyReLU": ((8, 8, 3), lambda x: layers.LeakyReLU(name="it")(x), OWN),
    "ReLU with a slope": ((8, 8, 3), lambda x: layers.ReLU(negative_slope=0.1, name="it")(x), OWN),
    "PReLU": ((8, 8, 3), lambda x: layers.PReLU(name="it")(x), OWN),
    "elu": ((8, 8, 3), lambda x: layers.Activation("elu", name="it")(x), OWN),
    "SpatialDropout3D": ((4, 4, 4, 2), lambda x: layers.SpatialDropout3D(0.5, name="it")(x), NONE),
    "Identity": ((8, 8, 3), lambda x: layers.Identity(name="it")(x), NONE),
    "MaxPooling3D": ((4, 4, 4, 2), lambda x: layers.MaxPooling3D(name="it")(x), NONE),
    "GlobalMaxPooling3D": ((4, 4, 4, 2), lambda x: layers.GlobalMaxPooling3D(name="it")(x), NONE),
    "RepeatVector": ((8,), lambda x: layers.RepeatVector(3, name="it")(x), NONE),
    "Cropping1D": ((8, 3), lambda x: layers.Cropping1D(name="it")(x), NONE),
    "Cropping2D": ((8, 8, 3), lambda x: layers.Cropping2D(name="it")(x), NONE),
    "Cropping3D": ((4, 4, 4, 2), lambda x: layers.Cropping3D(name="it")(x), NONE),
    "UpSampling1D": ((8, 3), lambda x: layers.UpSampling1D(name="it")(x), NONE),
    "UpSampling2D": ((8, 8, 3), lambda x: layers.UpSampling2D(name="it")(x), NONE),
    "UpSampling3D": ((4, 4, 4, 2), lambda x: layers.UpSampling3D(name="it")(x), NONE),
    "ZeroPadding3D": ((4, 4, 4, 2), lambda x: layers.ZeroPadding3D(name="it")(x), NONE),
    "AveragePooling3D": ((4, 4, 4, 2), lambda x: layers.AveragePooling3D(name="it")(x), SAME),
    "GlobalAveragePooling3D": (
        (4, 4, 4, 2),
        lambda x: layers.GlobalAveragePooling3D(name="it")(x),
        OWN,
    ),
    "Maximum": ((8, 8, 3), lambda x: layers.Maximum(name="it")([x, x]), OWN),
    "Minimum": ((8, 8, 3), lambda x: layers.Minimum(name="it")([x, x]), OWN),
}


@pytest.mark.parametrize("kind", ROLE_CASES)
def test_what_stands_behind_each_layer(kind):
    shape, build, expected = ROLE_CASES[kind]
    model = placed(model_of(lambda x: build(layers.ReLU(name="before")(x)), shape))
    found, (source,) = behind(model, "it"), behind(model, "before")
    assert len([la for la in model.layers if isinstance(la, FakeQuantize)]) == 2 + (
        expected not in (NONE, SAME)
    )
    if expected == NONE:
        assert found == []
    elif expected == SAME:
        assert found == [source]
    else:
        (layer,) = found
        assert layer is not source and layer.quantizer.num_bits == 8
        if expected == OWN:
            assert isinstance(layer.quantizer, MovingAverageQuantizer)
        else:
            assert isinstance(layer.quantizer, FixedRangeQuantizer)
            assert (layer.quantizer.minimum, layer.quantizer.maximum) == expected


def test_every_supported_layer_is_a_case_above():
    """But for SeparableConv2D, which the canonical form splits, what placement itself makes, what
    has no integer operator, and Embedding, which reads no activation."""
    names = {kind.__name__ for kind, found in ROLES.items() if found is not Role.FLOAT}
    names -= {"SeparableConv2D", "ReplacedBySign", "QuantizedPReLU", "Embedding", "FoldedAway"}
    assert names <= set(ROLE_CASES)


FUSED = {
    "conv relu": lambda x: layers.ReLU(name="z")(layers.Conv2D(3, 3, name="a")(x)),
    "conv bn relu6": lambda x: layers.ReLU(6.0, name="z")(
        layers.BatchNormalization(name="b")(layers.Conv2D(3, 3, name="a")(x))
    ),
    "conv bn": lambda x: layers.BatchNormalization(name="z")(layers.Conv2D(3, 3, name="a")(x)),
    "conv scale": lambda x: ChannelScale(name="z")(layers.Conv2D(3, 3, name="a")(x)),
    "affine relu": lambda x: layers.ReLU(name="z")(Affine(2.0, 1.0, name="a")(x)),
    "bn relu": lambda x: layers.ReLU(name="z")(layers.BatchNormalization(name="a")(x)),
    "add relu": lambda x: layers.ReLU(name="z")(layers.Add(name="a")([x, x])),
    "depthwise bn relu": lambda x: layers.ReLU(name="z")(
        layers.BatchNormalization(name="b")(layers.DepthwiseConv2D(3, name="a")(x))
    ),
    "transpose bn relu": lambda x: layers.ReLU(name="z")(
        layers.BatchNormalization(name="b")(layers.Conv2DTranspose(3, 3, name="a")(x))
    ),
}


@pytest.mark.parametrize("build", FUSED.values(), ids=FUSED)
def test_fused_groups_have_one_grid(build):
    model = placed(model_of(build))
    assert behind(model, "a") == []
    (last,) = behind(model, "z")
    assert {la for la in model.layers if isinstance(la, FakeQuantize)} == {
        last,
        input_quantizer(model),
    }


def test_a_separate_relu_does_not_cost_the_kernel_its_quantizer():
    """TFMOT leaves the kernel in float when a ReLU follows without batch normalization."""

    def build(x):
        x = layers.ReLU(name="r1")(layers.Conv2D(3, 3, name="conv")(x))
        x = layers.ReLU(name="r2")(layers.DepthwiseConv2D(3, name="depth")(x))
        return layers.ReLU(name="r3")(layers.Dense(4, name="dense")(layers.Flatten()(x)))

    model = quantize_model(model_of(build), "w2a8")
    model(images(model))
    assert {name: q.num_bits for name, q in kernel_quantizers(model).items()} == {
        "conv": 8,
        "depth": 2,
        "dense": 8,
    }
    kernel = wrappers(model)["depth"].layer.depthwise_kernel.numpy()
    assert max(len(np.unique(kernel[:, :, c])) for c in range(kernel.shape[2])) <= 3


@pytest.mark.parametrize("width", [1, 2, 4])
def test_an_inner_tensor_that_is_read_twice_has_a_grid(width):
    def build(x):
        x = layers.Conv2D(3, 3, padding="same", name="conv")(x)
        y = layers.ReLU(name="relu")(x)
        return layers.Add(name="add")([x, layers.Conv2D(3, 1, name="next")(y)])

    rule = Rule(weights=TensorSpec(), activations=TensorSpec(bits=width))
    model = placed(model_of(build), Recipe(name="x", rules=(rule,)))
    assert [la.quantizer.num_bits for la in behind(model, "conv")] == [8]
    assert [la.quantizer.num_bits for la in read_by(model, "next")] == [width]
    assert [la.quantizer.num_bits for la in read_by(model, "add")] == [8, 8]


def test_a_narrow_tensor_is_made_once_for_all_that_read_it():
    def build(x):
        x = layers.ReLU(name="relu")(layers.Conv2D(3, 3, padding="same", name="conv")(x))
        left, right = layers.Conv2D(3, 1, name="left")(x), layers.Conv2D(3, 1, name="right")(x)
        return layers.Add(name="add")([x, left, right])

    rules = [
        Rule(layer="conv", weights=TensorSpec(), activations=TensorSpec()),
        Rule(weights=TensorSpec(), activations=TensorSpec(bits=3)),
    ]
    model = placed(model_of(build), Recipe(name="x", rules=rules))
    (left,), (right,) = read_by(model, "left"), read_by(model, "right")
    assert left is right and left.quantizer.num_bits == 3
    assert read_by(model, "add")[0].quantizer.num_bits == 8


def test_a_gain_in_front_of_kernels_only_relabels_the_scale():
    def build(x):
        return layers.Conv2D(3, 3, name="conv")(layers.Rescaling(1 / 255, name="gain")(x))

    model = placed(model_of(build), "w8a8", input_range=(0, 255))
    assert behind(model, "gain") == []
    source = input_quantizer(model).quantizer
    assert source == FixedRangeQuantizer(minimum=0, maximum=255)
    # An offset is arithmetic.
    model = placed(
        model_of(lambda x: layers.Conv2D(3, 3)(layers.Rescaling(1 / 255, -0.5, name="it")(x)))
    )
    assert len(behind(model, "it")) == 1


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "tanh"])
def test_sixteen_bit_outputs_are_on_tflites_prescribed_grid(activation):
    """The int16 kernels of SOFTMAX and LOGISTIC take no output scale but 1/32768."""
    model = placed(model_of(lambda x: layers.Activation(activation, name="it")(x), (8,)), "w8a16")
    (layer,) = behind(model, "it")
    grid = layer.quantizer.grid(layer.quantizer_weights)
    assert float(grid.zero_point) == 0.0
    assert float(grid.scale) == pytest.approx(1 / 32768, rel=1e-6)


# ---------------------------------------------------------------------------------------------
# Shared layers, and kinds of models.


def test_shared_layers_have_one_kernel_and_a_grid_for_each_call():
    conv = layers.Conv2D(3, 3, padding="same", name="conv")
    float_model = model_of(lambda x: layers.Flatten()(conv(layers.ReLU(name="relu")(conv(x)))))
    model = quantize_model(float_model, "w8a16")
    trainable = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert trainable == float_model.count_params()
    assert len(wrappers(model)) == 1
    assert behind(model, "relu") and len(walk(model)) == 4
    x = images(float_model)
    error = np.abs(model(x).numpy() - float_model(x).numpy()).max()
    assert error < 0.03 * np.ptp(float_model(x))  # 8-bit kernels, twice


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w1a1"])
def test_a_shared_relu_can_be_replaced_by_signs(recipe):
    def build(x):
        relu = layers.ReLU(name="relu")
        for name in ("one", "two", "three", "four"):
            x = relu(layers.Conv2D(3, 3, padding="same", name=name)(x))
        return layers.Dense(2, name="head")(layers.Flatten(name="flat")(x))

    model = placed(model_of(build), recipe)
    width = {"w8a8": 8, "w4a4": 4, "w1a1": 1}[recipe]
    assert bits_read(model) == {"one": 8, "two": width, "three": width, "four": width, "head": 8}


def test_sequential_models():
    sequential = tf_keras.Sequential(
        [layers.Conv2D(3, 3, activation="relu"), layers.Flatten(), layers.Dense(2)]
    )
    sequential.build((None, 8, 8, 3))
    model = quantize_model(sequential, "w8a16")
    x = images(model)
    assert model.name == sequential.name
    np.testing.assert_allclose(model(x), sequential(x), atol=0.03 * np.ptp(sequential(x)))


def test_frozen_layers_stay_frozen():
    """A frozen backbone must not train once it is quantized."""
    float_model = model_of(chain)
    for name in ("one", "relu1", "two"):
        float_model.get_layer(name).trainable = False
    model = quantize_model(float_model, "w8a8")
    assert sorted(v.name for v in model.trainable_variables) == ["three/bias:0", "three/kernel:0"]
    wrappers(model)["three"].trainable = False
    assert model.trainable_variables == []


def test_heads_keep_their_order():
    def build(x):
        x = layers.Flatten()(x)
        return [layers.Dense(2, name="second")(x), layers.Dense(3, name="first")(x)]

    model = placed(model_of(build))
    assert [tensor.shape[-1] for tensor in model.outputs] == [2, 3]
    assert [len(behind(model, name)) for name in ("second", "first")] == [1, 1]


def test_several_inputs_have_ranges_of_their_own():
    one, two = tf_keras.Input((4,), name="one"), tf_keras.Input((4,), name="two")
    model = tf_keras.Model([one, two], layers.Subtract(name="it")([one, two]))
    model = quantize_model(model)
    x = np.ones((2, 4), np.float32)
    model([x, 100 * x], training=True)
    scales = [float(la.quantizer.grid(la.quantizer_weights).scale) for la in read_by(model, "it")]
    assert scales == pytest.approx([1 / 255, 100 / 255], rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Layers that stay float.


def chain(x):
    x = layers.ReLU(name="relu1")(layers.Conv2D(3, 3, name="one")(x))
    x = layers.ReLU(name="relu2")(layers.Conv2D(3, 3, name="two")(x))
    return layers.Dense(2, name="three")(layers.Flatten(name="flat")(x))


def test_keep_float_by_rule():
    recipe = Recipe.from_name("w4a8").with_rules(Rule(layer="two", keep_float="sensitive"))
    float_model = model_of(chain)
    model = quantize_model(float_model, recipe)
    assert set(kernel_quantizers(model)) == {"one", "three"}
    assert wrappers(model)["two"].quantize_config.keep_float == "sensitive"
    model(images(model))
    kernel = float_model.get_layer("two").kernel
    np.testing.assert_array_equal(wrappers(model)["two"].layer.kernel, kernel)
    # The tensors around it are on grids, for its neighbours are integer operators.
    assert len(behind(model, "relu1")) == len(behind(model, "relu2")) == 1


def test_no_quantizer_stands_between_float_layers():
    rules = [
        Rule(layer="two", keep_float="x"),
        Rule(layer="relu2", keep_float="x"),
        Rule(layer="flat", keep_float="x"),
        Rule(layer="three", keep_float="x"),
        EVERYTHING,
    ]
    model = placed(model_of(chain), Recipe(name="x", rules=rules))
    for name in ("two", "relu2", "flat", "three"):
        assert behind(model, name) == []
    assert len(behind(model, "relu1")) == 1  # the producer is an integer operator


@pytest.mark.parametrize("name", ["relu2", "bn"])
def test_an_integer_operator_in_front_of_a_float_layer_has_a_grid(name):
    """Without one the convolution would be computed in float, and no account would say so."""

    def build(x):
        x = layers.BatchNormalization(name="bn")(layers.Conv2D(3, 3, name="two")(x))
        x = layers.ReLU(name="relu2")(x)
        return layers.Conv2D(2, 3, name="three")(x)

    rules = [Rule(layer=name, keep_float="x"), EVERYTHING]
    model = placed(model_of(build), Recipe(name="x", rules=rules))
    before = {"relu2": "bn", "bn": "two"}[name]
    assert len(behind(model, before)) == 1


@tf_keras.utils.register_keras_serializable("tests")
class Unknown(layers.Layer):
    """Nothing that qat has heard of."""

    def call(self, inputs):
        return tf.abs(inputs)


def unknown(x):
    x = layers.Conv2D(3, 3, name="conv")(x)
    x = Unknown(name="unknown")(x)
    return layers.Dense(2, name="head")(layers.Flatten(name="flat")(x))


def test_unsupported_layers_are_named():
    with pytest.raises(UnsupportedLayerError, match="'unknown' \\(Unknown\\)") as error:
        quantize_model(model_of(unknown))
    assert "\n" not in str(error.value)


def test_an_unsupported_layer_can_stay_float():
    recipe = Recipe.from_name("w8a8").with_rules(Rule(type="Unknown", keep_float="no operator"))
    model = quantize_model(model_of(unknown), recipe)
    assert set(kernel_quantizers(model)) == {"conv", "head"}
    # What it reads and gives crosses between float and integers.
    assert len(behind(model, "conv")) == len(behind(model, "unknown")) == 1


def test_an_unsupported_layer_can_be_left_unannotated():
    inputs = tf_keras.Input((8, 8, 3))
    x = keras.quantize_annotate_layer(layers.Conv2D(3, 3, name="conv"))(inputs)
    x = layers.Flatten(name="flat")(Unknown(name="unknown")(x))
    model = tf_keras.Model(inputs, layers.Dense(2, name="head")(x))
    applied = keras.quantize_apply(model, scheme=scheme("w8a8"))
    assert set(kernel_quantizers(applied)) == {"conv"}


UNSUPPORTED = {
    "area": lambda: layers.Resizing(4, 4, interpolation="area", name="it"),
    "cropped resizing": lambda: layers.Resizing(4, 4, crop_to_aspect_ratio=True, name="it"),
    "cubic": lambda: layers.UpSampling2D(interpolation="bicubic", name="it"),
    "dilated transposed": lambda: layers.Conv2DTranspose(2, 3, dilation_rate=2, name="it"),
    "softmax over pixels": lambda: layers.Softmax(axis=1, name="it"),
}


@pytest.mark.parametrize("make", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_options_without_an_operator_are_refused(make):
    with pytest.raises(UnsupportedLayerError, match="'it'") as error:
        placed(model_of(lambda x: make()(x)))
    assert "\n" not in str(error.value)


def test_partially_annotated_models():
    inputs = tf_keras.Input((8, 8, 3), name="image")
    x = layers.ReLU(name="relu1")(layers.Conv2D(3, 3, name="one")(inputs))
    x = keras.quantize_annotate_layer(layers.Conv2D(3, 3, name="two"))(x)
    x = keras.quantize_annotate_layer(layers.ReLU(name="relu2"))(x)
    model = tf_keras.Model(inputs, layers.Dense(2, name="three")(layers.Flatten(name="flat")(x)))
    applied = keras.quantize_apply(model, scheme=scheme("w8a8"))
    assert set(kernel_quantizers(applied)) == set(wrappers(applied)) == {"two"}
    assert behind(applied, "one") == behind(applied, "three") == []
    assert len(behind(applied, "relu1")) == len(behind(applied, "relu2")) == 1
    assert not any(
        call.inputs[0] is applied.inputs[0]
        for call in calls(applied)
        if isinstance(call.layer, FakeQuantize)
    )
    assert NOT_ANNOTATED == "not annotated for quantization"
    # The kernel of the first layer is really float: the output is that of the float layer.
    x = images(applied)
    first = tf_keras.Model(applied.inputs, output_of(applied, applied.get_layer("one")))
    float_first = tf_keras.Model(model.inputs, model.get_layer("one").output)
    np.testing.assert_array_equal(first(x), float_first(x))


@pytest.mark.parametrize("first", ["an input", "an annotated layer"])
def test_a_sequential_model_annotated_in_part(first):
    """As TFMOT's guide writes it."""
    head = [layers.Input((8, 8, 1))] if first == "an input" else []
    shape = {} if head else {"input_shape": (8, 8, 1)}
    conv = keras.quantize_annotate_layer(layers.Conv2D(4, 3, name="conv", **shape))
    rest = [layers.ReLU(), layers.Flatten(), layers.Dense(3, name="dense")]
    applied = keras.quantize_apply(tf_keras.Sequential([*head, conv, *rest]), scheme("w8a8"))
    assert set(kernel_quantizers(applied)) == {"conv"}
    assert applied(np.ones((2, 8, 8, 1), np.float32)).shape == (2, 3)


def test_an_annotated_model_is_told_the_way_to_go():
    inputs = tf_keras.Input((8, 8, 1))
    x = keras.quantize_annotate_layer(layers.Conv2D(4, 3, name="conv"))(inputs)
    with pytest.raises(ModelError, match="'conv' is annotated.*quantize_apply"):
        quantize_model(tf_keras.Model(inputs, x))


def test_a_given_config_goes_before_the_recipe():
    inputs = tf_keras.Input((8, 8, 3))
    config = configs.LayerQuantizeConfig(weights=TensorSpec(bits=3, per_channel=False))
    x = keras.quantize_annotate_layer(
        layers.SeparableConv2D(3, 3, activation="relu", name="sep"), config
    )(inputs)
    x = layers.Flatten()(x)
    x = keras.quantize_annotate_layer(layers.Dense(3, name="mid"), configs.binary())(x)
    x = keras.quantize_annotate_layer(layers.Dense(3, name="plain"))(x)
    x = keras.quantize_annotate_layer(layers.Dense(3, name="float"), configs.keep_float("why"))(x)
    annotated = keras.quantize_annotate_model(tf_keras.Model(inputs, x))
    model = keras.quantize_apply(annotated, scheme=scheme(Recipe(name="x", rules=(EVERYTHING,))))
    found = kernel_quantizers(model)
    assert {name: quantizer.num_bits for name, quantizer in found.items()} == {
        "sep_depthwise": 3,
        "sep_pointwise": 3,
        "mid": 1,
        "plain": 8,
    }
    assert found["sep_depthwise"].channel_axes is None
    assert wrappers(model)["float"].quantize_config.keep_float == "why"


# ---------------------------------------------------------------------------------------------
# Options and errors of quantize_model.


def test_input_range_is_fixed():
    float_model = model_of(lambda x: layers.Conv2D(2, 3)(x))
    model = placed(float_model, "w8a8", input_range=(-1.0, 3.0))
    layer = input_quantizer(model)
    assert layer.quantizer == FixedRangeQuantizer(minimum=-1, maximum=3)
    model = placed(float_model, "w8a16", input_range=(-1.0, 3.0))
    assert input_quantizer(model).quantizer.symmetric


def test_rules_reach_single_layers():
    recipe = Recipe.from_name("w8a8").with_rules(
        Rule(layer="tw?", weights=TensorSpec(bits=2), activations=TensorSpec(bits=5)),
        Rule(type="Dense", position="last", weights=TensorSpec(bits=6)),
    )
    model = quantize_model(model_of(chain), recipe)
    assert bits_read(model) == {"one": 8, "two": 5, "three": 8}
    bits = {name: quantizer.num_bits for name, quantizer in kernel_quantizers(model).items()}
    assert bits == {"one": 8, "two": 2, "three": 6}


@pytest.mark.parametrize("conditions", [{"layer": "sep"}, {"type": "SeparableConv2D"}])
def test_a_rule_reaches_a_layer_that_is_split(conditions):
    """A recipe speaks of the user's layers, not of what the canonical form makes of them."""

    def build(x):
        return layers.Conv2D(2, 3, name="next")(layers.SeparableConv2D(2, 3, name="sep")(x))

    rules = [Rule(weights=TensorSpec(bits=2), **conditions), EVERYTHING]
    model = quantize_model(model_of(build), Recipe(name="x", rules=rules))
    assert {name: quantizer.num_bits for name, quantizer in kernel_quantizers(model).items()} == {
        "sep_depthwise": 2,
        "sep_pointwise": 2,
        "next": 8,
    }


def test_a_rule_reaches_an_activation_that_is_split():
    def build(x):
        x = layers.Conv2D(2, 3, activation="relu", name="conv")(x)
        return layers.Conv2D(2, 3, activation="relu", name="last")(x)

    rules = [Rule(layer="conv", keep_float="x"), EVERYTHING]
    model = quantize_model(model_of(build), Recipe(name="x", rules=rules))
    # All of the user's layer is float, so that its caller reads no grid of its own.
    reasons = {name: w.quantize_config.keep_float for name, w in wrappers(model).items()}
    assert reasons.get("conv") == reasons.get("conv_relu") == "x"


def test_rules_that_match_nothing_are_errors():
    float_model = model_of(chain)
    recipe = Recipe.from_name("w8a8").with_rules(Rule(layer="bodi", keep_float="typo"))
    with pytest.raises(RecipeError, match="layer='bodi'.*matches no layer") as error:
        quantize_model(float_model, recipe)
    assert "\n" not in str(error.value)


def test_sixteen_bits_are_not_mixed():
    float_model = model_of(chain)
    recipe = Recipe.from_name("w8a8").with_rules(
        Rule(layer="two", weights=TensorSpec(), activations=TensorSpec(bits=16))
    )
    with pytest.raises(
        RecipeError, match="16-bit activations cannot be mixed with \\[8\\]"
    ) as error:
        quantize_model(float_model, recipe)
    assert "\n" not in str(error.value)


def test_a_quantized_model_is_not_quantized_again(models):
    with pytest.raises(ValueError, match="'net' is already quantized") as error:
        quantize_model(models["w8a8"])
    assert "\n" not in str(error.value)


def absolute(x):
    return layers.Conv2D(2, 1)(tf.abs(x))


def hidden(x):
    inner = tf_keras.Sequential([layers.Conv2D(2, 1), layers.Lambda(tf.abs, name="mine")])
    return inner(x)


class Doubled(layers.Layer):
    def call(self, inputs):
        return 2.0 * inputs


@pytest.mark.parametrize(
    ("build", "name"),
    [(absolute, "tf.math.abs"), (hidden, "mine"), (Doubled(name="mine"), "mine")],
    ids=["operator", "nested", "custom"],
)
def test_what_cannot_be_quantized_is_named_in_one_line(build, name):
    with pytest.raises(ValueError, match=name) as error:
        quantize_model(model_of(build))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains(policy):
    """TFMOT's fake quantizers are float32 only and fail."""
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        float_model = model_of(chain)
        model = quantize_model(float_model, "w8a8")
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    x = images(model)
    y = model(x, training=True)
    assert np.isfinite(y.numpy().astype(np.float32)).all()
    # The integers are those of the float32 kernel, not of one rounded to 16 bits first. Rounded
    # afterwards, a code of up to 127 is off by 2^-9 of it at most.
    kernel = float_model.get_layer("two").kernel
    grid = np.abs(kernel).max((0, 1, 2)) / np.float32(127)
    used = wrappers(model)["two"].layer.kernel
    codes = np.rint(np.asarray(used, np.float32) / grid)
    np.testing.assert_array_equal(codes, np.rint(kernel / grid))


# ---------------------------------------------------------------------------------------------
# FakeQuantize alone.


def test_layers_can_be_tapped():
    """Keras users cut models at `layer.output`; a layer called once has one."""
    model = quantize_model(model_of(chain), "w8a8")
    for layer in model.layers:
        tap = tf_keras.Model(model.inputs, layer.output)
        assert tap(images(model)).shape[1:] == layer.output.shape[1:]


def test_fake_quantize_in_every_training_phase():
    for training in (True, tf.constant(True), 1):
        layer = FakeQuantize(MovingAverageQuantizer(decay=0.5))
        layer(tf.constant([-1.0, 3.0]), training=training)
        assert float(layer.quantizer_weights["observed"]) == 0.5
        layer(tf.constant([-9.0, 9.0]), training=training, observe=False)
        for inference in (False, None, tf.constant(False)):
            layer(tf.constant([-9.0, 9.0]), training=inference)
        assert float(layer.quantizer_weights["observed"]) == 0.5
        assert layer.quantizer.range(layer.quantizer_weights, None)[1] == 3.0


def test_averages_are_rounded_as_average_pooling_rounds_codes():
    """Halves away from code 0, not from real 0, and not to even."""
    layer = FakeQuantize(quantizers.FixedRangeQuantizer(minimum=-1.0, maximum=0.7))
    layer(tf.zeros([1]))
    grid = layer.quantizer.grid(layer.quantizer_weights).numpy()
    assert grid.zero_point not in (-128, 0)
    rng = np.random.default_rng(0)
    for count in (2, 4, 9, 196):
        codes = rng.integers(-128, 128, (count, 2000))
        average = codes.mean(axis=0)
        expected = np.sign(average) * np.floor(np.abs(average) + 0.5)
        reals = ((codes - grid.zero_point) * grid.scale).astype(np.float32)
        found = layer(tf.reduce_mean(reals, axis=0), observe=False, averages=True)
        found = np.rint(found / grid.scale) + grid.zero_point
        np.testing.assert_array_equal(found, expected)


def test_fake_quantize_survives_its_config():
    layer = FakeQuantize(quantizers.MovingAverageQuantizer(num_bits=3, decay=0.5), name="here")
    config = json.loads(json.dumps(layer.get_config()))
    restored = FakeQuantize.from_config(config)
    assert (restored.name, restored.quantizer) == ("here", layer.quantizer)
    assert layer.compute_output_shape((None, 4, 3)) == (None, 4, 3)


def test_fake_quantize_takes_our_quantizers_only():
    theirs = keras.quantizers.LastValueQuantizer(8, False, True, False)
    for quantizer in (theirs, None, "w8a8"):
        with pytest.raises(ValueError, match="'here' needs a qat.quantizers quantizer"):
            FakeQuantize(quantizer, name="here")
