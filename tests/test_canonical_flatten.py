"""Nested models become layers: same function, the user's names, frozen layers stay frozen."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import qat
from qat.canonical import calls
from qat.canonical.flatten import flatten

layers = tf_keras.layers


def randomized(model):
    rng = np.random.default_rng(0)
    for variable in model.variables:
        low = 0.5 if "variance" in variable.name else -0.5
        variable.assign(rng.uniform(low, low + 1, variable.shape))
    return model


def assert_same_function(model, other, training=False):
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(3, *i.shape[1:])).astype(np.float32) for i in model.inputs]
    x = x[0] if len(x) == 1 else x
    pairs = zip(
        tf.nest.flatten(model(x, training=training)),
        tf.nest.flatten(other(x, training=training)),
        strict=True,
    )
    for expected, actual in pairs:
        assert np.abs(expected - actual).max() <= 1e-5 * np.abs(expected).max()


def backbone(name="backbone"):
    inputs = tf_keras.Input((6, 6, 3), name="pixels")
    x = layers.BatchNormalization(name="bn")(
        layers.Conv2D(3, 3, padding="same", name="conv")(inputs)
    )
    return tf_keras.Model(inputs, [tf.nn.relu(x), x], name=name)


def outer(**call):
    """Two levels, a Sequential, a nested model called twice, and colliding names."""
    inputs = tf_keras.Input((6, 6, 3))
    shared = backbone()
    x, _ = shared(inputs, **call)
    y, z = shared(layers.Conv2D(3, 1, name="conv")(x), **call)
    middle = tf_keras.Input((6, 6, 3))
    head = tf_keras.Sequential([layers.Flatten(), layers.Dense(3, name="conv")], name="head")
    box = tf_keras.Model(middle, head(layers.ReLU(name="relu")(middle)), name="box")
    return randomized(tf_keras.Model(inputs, box(y + z), name="net"))


@pytest.fixture(scope="module")
def flat():
    model = outer()
    return model, *flatten(model)


def test_the_function_stays(flat):
    model, made, _ = flat
    assert_same_function(model, made)
    assert_same_function(model, made, training=True)
    assert not any(isinstance(layer, tf_keras.Model) for layer in made.layers)
    assert made.count_params() == model.count_params()


def test_the_model_called_twice_shares_its_layers(flat):
    _, made, origins = flat
    names = [call.layer.name for call in calls(made)]
    (shared,) = [name for name, known in origins.items() if ("backbone/conv", "Conv2D") in known]
    assert names.count(shared) == names.count("bn") == 2


def test_names_that_are_taken_get_the_models_in_front(flat):
    _, made, origins = flat
    named = {layer.name for layer in made.layers}
    assert {"conv", "backbone_conv", "head_conv", "bn", "relu"} <= named
    assert "conv" not in origins
    assert origins["backbone_conv"] == (
        ("conv", "Conv2D"),
        ("backbone/conv", "Conv2D"),
        ("backbone", "Functional"),
    )
    assert ("box/head/conv", "Dense") in origins["head_conv"]
    assert ("head", "Sequential") in origins["head_conv"]


def test_the_original_is_untouched():
    model = outer()
    before = {layer.name: len(layer._inbound_nodes) for layer in model.layers}
    weights = [weight.tobytes() for weight in model.get_weights()]
    made, _ = flatten(model)
    for variable in made.variables:
        variable.assign(tf.zeros_like(variable))
    assert before == {layer.name: len(layer._inbound_nodes) for layer in model.layers}
    assert weights == [weight.tobytes() for weight in model.get_weights()]


def test_several_named_inputs():
    one, two = tf_keras.Input((4,), name="one"), tf_keras.Input((4,), name="two")
    inner = tf_keras.Model([one, two], layers.Subtract()([two, one]), name="inner")
    named = tf_keras.Model({"b": one, "a": two}, layers.Subtract()([two, one]), name="named")
    p, q = tf_keras.Input((4,)), tf_keras.Input((4,))
    model = tf_keras.Model(
        [p, q], [inner([p, q]), inner({"two": p, "one": q}), named({"a": p, "b": q})]
    )
    assert_same_function(model, flatten(model)[0])


@pytest.mark.parametrize("how", [((), {"training": True}), ((True,), {})])
def test_the_mode_of_an_inner_call_goes_before_that_of_the_outer_one(how):
    x = tf_keras.Input((4,))
    inner = layers.BatchNormalization(name="kept")(x, training=False)
    nested = tf_keras.Model(x, layers.BatchNormalization(name="free")(inner), name="nested")
    args, kwargs = how
    made, _ = flatten(tf_keras.Model(x, nested(x, *args, **kwargs)))
    modes = {call.layer.name.split("/")[-1]: call.chosen_mode for call in calls(made)}
    assert modes == {"kept": False, "free": True}


def test_frozen_backbones_stay_frozen():
    model = outer()
    model.get_layer("backbone").trainable = False
    made, _ = flatten(model)
    trained = {variable.name.split("/")[0] for variable in made.trainable_variables}
    assert trained == {"conv", "head_conv"}


def test_statistics_stay_when_a_backbone_is_called_for_inference():
    """`backbone(x, training=False)`: its batch norms never learn, and quantizing keeps that."""
    inputs = tf_keras.Input((6, 6, 3))
    model = randomized(tf_keras.Model(inputs, backbone()(inputs, training=False)[0]))
    made, _ = flatten(model)
    assert_same_function(model, made, training=True)
    quantized = qat.quantize_model(model)
    x = np.random.default_rng(0).normal(5, 2, (4, 6, 6, 3)).astype(np.float32)
    statistics = [v for v in quantized.variables if "moving_mean" in v.name and "bn/" in v.name]
    before = [variable.numpy() for variable in statistics]
    quantized(x, training=True)
    assert statistics
    for old, variable in zip(before, statistics, strict=True):
        np.testing.assert_array_equal(old, variable)


@pytest.mark.parametrize(
    ("conditions", "low"),
    [
        ({"layer": "backbone"}, {"backbone_conv"}),
        ({"layer": "backbone/*"}, {"backbone_conv"}),
        ({"layer": "box/head/conv"}, {"head_conv"}),
        ({"type": "Sequential"}, {"head_conv"}),
        ({"layer": "conv"}, {"conv", "backbone_conv", "head_conv"}),
    ],
)
def test_rules_know_the_users_names(flat, conditions, low):
    from qat.scheme import decide

    _, made, origins = flat
    rule = qat.Rule(weights=qat.TensorSpec(bits=4), **conditions)
    recipe = qat.Recipe(name="x", rules=(rule, *qat.Recipe.from_name("w8a8").rules))
    names = {layer.name: None for layer in made.layers[1:]}
    found = decide(made, recipe, names, aliases=origins)
    kernels = {"conv", "backbone_conv", "head_conv"}
    assert {name for name in kernels if found[name].weights.bits == 4} == low
