"""The canonical form: the same float function, one operator a layer, the original untouched."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras

import qat
from qat.canonical import calls, canonicalize, consumers, functional, rebuild
from qat.errors import ModelError

layers = tf_keras.layers


def model_of(build, shape=(9, 8, 3)):
    inputs = tf_keras.Input(shape)
    model = tf_keras.Model(inputs, build(inputs))
    rng = np.random.default_rng(0)
    for variable in model.variables:
        positive = "variance" in variable.name
        variable.assign(
            rng.uniform(0.5, 2, variable.shape) if positive else rng.normal(0, 0.5, variable.shape)
        )
    return model


def images(model, count=4):
    return np.random.default_rng(1).normal(size=(count, *model.input_shape[1:])).astype(np.float32)


def assert_same_function(model, other, x=None):
    x = images(model) if x is None else x
    expected, actual = model(x), other(x)
    for one, two in zip(tf.nest.flatten(expected), tf.nest.flatten(actual), strict=True):
        difference = np.abs(one.numpy() - two.numpy()).max()
        assert difference <= 1e-6 * np.abs(one.numpy()).max()


def snapshot(model):
    """All that a rewrite could leave behind in a model's layers."""
    nodes = {
        layer.name: (len(layer._inbound_nodes), len(layer._outbound_nodes))
        for layer in model.layers
    }
    return nodes, model.get_config(), [w.tobytes() for w in model.get_weights()]


SEPARABLES = {
    "plain": {},
    "multiplier": {"depth_multiplier": 3},
    "strides": {"strides": 2, "padding": "same"},
    "dilation": {"dilation_rate": 2},
    "biasless": {"use_bias": False},
    "relu": {"activation": "relu"},
    "relu6": {"activation": "relu6", "depth_multiplier": 2, "padding": "same"},
    "tanh": {"activation": "tanh", "use_bias": False},
}


@pytest.mark.parametrize("options", SEPARABLES.values(), ids=SEPARABLES)
def test_separable_convolutions_are_split(options):
    model = model_of(lambda x: layers.SeparableConv2D(5, 3, name="sep", **options)(x))
    before = snapshot(model)
    made, origins = canonicalize(model)
    assert_same_function(model, made)
    types = [type(layer).__name__ for layer in made.layers[1:]]
    assert types == ["DepthwiseConv2D", "Conv2D"] + ["Activation"] * ("activation" in options)
    depthwise, pointwise = made.layers[1:3]
    assert not depthwise.bias.numpy().any()
    assert pointwise.use_bias == options.get("use_bias", True)
    assert pointwise.kernel_size == (1, 1)
    np.testing.assert_array_equal(depthwise.depthwise_kernel, model.layers[1].depthwise_kernel)
    np.testing.assert_array_equal(pointwise.kernel, model.layers[1].pointwise_kernel)
    assert {origins[layer.name] for layer in made.layers[1:]} == {"sep"}
    assert snapshot(model) == before


ACTIVATED = {
    "Conv1D": ((9, 3), lambda **o: layers.Conv1D(4, 3, **o)),
    "Conv2D": ((9, 8, 3), lambda **o: layers.Conv2D(4, 3, strides=2, **o)),
    "Conv2DTranspose": ((5, 4, 3), lambda **o: layers.Conv2DTranspose(4, 3, strides=2, **o)),
    "DepthwiseConv2D": ((9, 8, 3), lambda **o: layers.DepthwiseConv2D(3, **o)),
    "Dense": ((7,), lambda **o: layers.Dense(4, **o)),
}


@pytest.mark.parametrize("kind", ACTIVATED)
@pytest.mark.parametrize("activation", ["relu", "relu6", "softmax", "sigmoid", "tanh"])
def test_activation_arguments_become_layers(kind, activation):
    shape, make = ACTIVATED[kind]
    model = model_of(lambda x: make(activation=activation, name="op")(x), shape)
    before = snapshot(model)
    made, origins = canonicalize(model)
    assert_same_function(model, made)
    linear, after = made.layers[1:]
    assert (linear.name, type(linear).__name__) == ("op", kind)
    assert linear.activation is tf_keras.activations.linear
    assert after.activation is tf_keras.activations.get(activation)
    assert origins[after.name] == origins["op"] == "op"
    assert snapshot(model) == before
    assert model.layers[1].activation is tf_keras.activations.get(activation)


@pytest.mark.parametrize("kind", ACTIVATED)
@pytest.mark.parametrize("activation", [None, "linear"])
def test_linear_layers_stay_one_layer(kind, activation):
    shape, make = ACTIVATED[kind]
    model = model_of(lambda x: make(activation=activation)(x), shape)
    made, origins = canonicalize(model)
    assert [layer.name for layer in made.layers[1:]] == [layer.name for layer in model.layers[1:]]
    assert_same_function(model, made)


@pytest.mark.parametrize("kind", [layers.Add, layers.Multiply])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_many_operands_become_pairs(kind, count):
    def build(x):
        terms = [layers.Conv2D(2, 3, name=f"term{index}")(x) for index in range(count)]
        return kind(name="all")(terms)

    model = model_of(build)
    before = snapshot(model)
    made, origins = canonicalize(model)
    pairs = [layer for layer in made.layers if isinstance(layer, kind)]
    assert len(pairs) == count - 1 and all(len(layer.input) == 2 for layer in pairs)
    assert {origins[layer.name] for layer in pairs} == {"all"}
    x = images(model)
    # Sums of pairs are in the order of the whole: but for products, the same roundings.
    np.testing.assert_allclose(made(x), model(x), rtol=1e-5, atol=1e-6)
    assert snapshot(model) == before


def block(x):
    y = layers.SeparableConv2D(4, 3, padding="same", activation="relu", name="sep")(x)
    y = layers.BatchNormalization(name="bn")(y)
    z = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv")(x)
    y = layers.Concatenate(name="cat")([layers.Add(name="add")([y, z]), z])
    y = layers.Dropout(0.5, name="drop")(layers.MaxPooling2D(name="pool")(y))
    return layers.Dense(3, activation="softmax", name="head")(layers.Flatten(name="flat")(y))


@pytest.fixture(scope="module")
def blocks():
    model = model_of(block)
    before = snapshot(model)
    return model, before, *canonicalize(model)


def test_a_whole_model_keeps_its_function(blocks):
    model, _, made, _ = blocks
    assert_same_function(model, made)
    x = images(model)
    # And batch statistics: the same in training, dropout aside.
    model.get_layer("drop").rate = made.get_layer("drop").rate = 0.0
    np.testing.assert_allclose(
        model(x, training=True), made(x, training=True), rtol=1e-5, atol=1e-6
    )
    model.get_layer("drop").rate = made.get_layer("drop").rate = 0.5


def test_every_layer_has_an_origin(blocks):
    model, _, made, origins = blocks
    old = {layer.name for layer in model.layers}
    assert {layer.name for layer in made.layers} <= set(origins)
    assert set(origins.values()) <= old
    kept = {"conv", "bn", "add", "cat", "pool", "drop", "flat", "head"}
    assert {name: origins[name] for name in kept} == {name: name for name in kept}
    split = sorted(name for name in origins if origins[name] == "sep" and name != "sep")
    assert split == ["sep_depthwise", "sep_pointwise", "sep_relu"]


def test_the_original_model_is_untouched(blocks):
    model, before, made, _ = blocks
    weights = [w.tobytes() for w in model.get_weights()]
    assert snapshot(model)[:2] == before[:2]
    assert not {id(layer) for layer in model.layers} & {id(layer) for layer in made.layers}
    assert not {id(v) for v in model.variables} & {id(v) for v in made.variables}
    for variable in made.variables:
        variable.assign(tf.zeros_like(variable))
    assert [w.tobytes() for w in model.get_weights()] == weights
    canonicalize(model)[0]
    canonicalize(model)[0]
    assert snapshot(model)[0] == before[0]


def test_canonical_models_stay_as_they_are():
    model = model_of(block)
    once, _ = canonicalize(model)
    twice, _ = canonicalize(once)
    assert [layer.name for layer in twice.layers] == [layer.name for layer in once.layers]
    assert_same_function(once, twice)


@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_layers_stay_frozen(trainable):
    def build(x):
        x = layers.SeparableConv2D(4, 3, activation="relu", trainable=trainable)(x)
        return layers.Conv2D(4, 3, activation="relu", trainable=trainable)(x)

    made, _ = canonicalize(model_of(build))
    assert bool(made.trainable_variables) is trainable
    assert made.variables


def test_regularizers_and_constraints_are_kept():
    l2, unit = tf_keras.regularizers.L2(0.1), tf_keras.constraints.MaxNorm(0.5)

    def build(x):
        x = layers.Conv2D(4, 3, activation="relu", kernel_regularizer=l2, kernel_constraint=unit)(x)
        return layers.SeparableConv2D(
            4,
            3,
            depthwise_regularizer=l2,
            pointwise_regularizer=l2,
            bias_regularizer=l2,
            depthwise_constraint=unit,
            pointwise_constraint=unit,
        )(x)

    model = model_of(build)
    made, _ = canonicalize(model)
    losses = [sum(float(loss) for loss in each.losses) for each in (model, made)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    constrained = [sum(v.constraint is not None for v in each.variables) for each in (model, made)]
    assert constrained == [3, 3]


def test_outputs_are_regularized_behind_their_activation():
    def build(x):
        l1, l2 = tf_keras.regularizers.L1(0.1), tf_keras.regularizers.L1L2(0.2, 0.3)
        x = layers.SeparableConv2D(4, 3, activation="relu", activity_regularizer=l1)(x)
        return layers.Dense(3, activity_regularizer=l2)(x)

    model = model_of(build)
    made, _ = canonicalize(model)
    assert_same_function(model, made)
    losses = [[float(loss) for loss in each.losses] for each in (model, made)]
    assert len(losses[1]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)
    quantized = qat.quantize_model(model, "w8a8")
    quantized(images(model))
    losses.append([float(loss) for loss in quantized.losses])
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    quantized.compile("sgd", "mse")
    quantized.fit(images(model), quantized.predict(images(model), verbose=0), verbose=0)


class Odd(tf_keras.regularizers.Regularizer):
    def __call__(self, x):
        return tf.reduce_sum(x)

    def get_config(self):
        return {"odd": 1}


@pytest.mark.parametrize("case", ["own class", "over time"])
def test_regularizers_of_outputs_that_cannot_be_kept(case):
    given = Odd() if case == "own class" else "l2"
    dense = layers.Dense(3, activity_regularizer=given, name="it")
    x = tf_keras.Input((5, 4))
    y = dense(x) if case == "own class" else layers.TimeDistributed(dense, name="it")(x)
    with pytest.raises(ModelError, match="'it' has the activity_regularizer (Odd|L2); only l1"):
        canonicalize(tf_keras.Model(x, y))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer_that_is_repeated_twice_stays_one_layer(direct, trainable):
    dense = layers.Dense(3, activation="relu", name="dense")
    a, b, c = tf_keras.Input((5, 4)), tf_keras.Input((6, 4)), tf_keras.Input((4,))
    outputs = [layers.TimeDistributed(dense)(a), layers.TimeDistributed(dense)(b)]
    inputs, outputs = ([a, b, c], [*outputs, dense(c)]) if direct else ([a, b], outputs)
    dense.trainable = trainable
    model = tf_keras.Model(inputs, outputs)
    made, _ = canonicalize(model)
    rng = np.random.default_rng(2)
    x = [rng.normal(size=(3, *tensor.shape[1:])).astype(np.float32) for tensor in inputs]
    assert_same_function(model, made, x)
    assert len(made.weights) == 2 and len(made.trainable_weights) == 2 * trainable


# ---------------------------------------------------------------------------------------------
# Kinds of models.


def test_sequential_models():
    model = tf_keras.Sequential([layers.SeparableConv2D(4, 3, activation="relu"), layers.Flatten()])
    model.add(layers.Dense(2, activation="softmax"))
    model.build((None, 9, 8, 3))
    before = snapshot(model)
    made, _ = canonicalize(model)
    assert not isinstance(made, tf_keras.Sequential)
    assert made.name == model.name
    assert_same_function(model, made)
    assert snapshot(model) == before


def test_shared_layers_stay_shared():
    conv = layers.Conv2D(3, 3, padding="same", activation="relu", name="conv")
    sep = layers.SeparableConv2D(3, 3, padding="same", activation="tanh", name="sep")
    model = model_of(lambda x: layers.Add()([sep(conv(x)), conv(sep(conv(x)))]))
    before = snapshot(model)
    made, _ = canonicalize(model)
    assert_same_function(model, made)
    assert made.count_params() == model.count_params() + 3  # the depthwise half has a bias
    counts = {}
    for call in calls(made):
        counts[call.layer.name] = counts.get(call.layer.name, 0) + 1
    assert counts["conv"] == counts["conv_relu"] == 3
    assert counts["sep_depthwise"] == counts["sep_pointwise"] == counts["sep_tanh"] == 2
    assert snapshot(model) == before


def test_several_inputs_and_outputs_keep_their_order():
    one, two = tf_keras.Input((4,), name="one"), tf_keras.Input((4,), name="two")
    total = layers.Subtract()([two, one])
    outputs = [layers.Dense(2, activation="relu")(total), total, layers.Dense(3)(one)]
    model = tf_keras.Model([one, two], outputs)
    made, _ = canonicalize(model)
    assert made.input_names == ["one", "two"]
    assert [tuple(t.shape) for t in made.outputs] == [(None, 2), (None, 4), (None, 3)]
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    assert_same_function(model, made, [x[0], x[1]])


def test_named_inputs_and_outputs_keep_their_names():
    one = tf_keras.Input((4,), name="one")
    two = tf_keras.Input((4,), name="two")
    model = tf_keras.Model(
        {"b": two, "a": one}, {"y": layers.Dense(2)(one), "x": layers.Dense(3)(two)}
    )
    made, _ = canonicalize(model)
    x = {"a": np.ones((1, 4), np.float32), "b": np.zeros((1, 4), np.float32)}
    expected, outputs = model(x), made(x)
    assert set(outputs) == set(expected)
    for name in expected:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-6)


def test_taken_names_are_not_taken_again():
    def build(x):
        x = layers.Conv2D(3, 3, activation="relu", name="conv")(x)
        return layers.ReLU(name="conv_relu")(x)

    model = model_of(build)
    made, origins = canonicalize(model)
    assert len({layer.name for layer in made.layers}) == 4
    assert origins["conv_relu"] == "conv_relu"
    assert_same_function(model, made)


def test_inputs_keep_name_type_and_batch():
    inputs = tf_keras.Input((4,), name="pixels", dtype=tf.float64, batch_size=2)
    made, _ = canonicalize(tf_keras.Model(inputs, layers.Dense(2)(inputs)))
    assert made.inputs[0].dtype == tf.float64
    assert (made.input_names, made.input_shape) == (["pixels"], (2, 4))


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


def subclassed():
    model = Subclassed()
    model(tf.zeros([1, 3]))
    return model


def nested():
    inputs = tf_keras.Input((3,))
    return tf_keras.Model(inputs, subclassed()(inputs), name="outer")


REFUSED = {
    "subclassed": (subclassed, ["'mine'", "Subclassed", "tf_keras.Model(inputs, outputs)"]),
    "unbuilt": (
        lambda: tf_keras.Sequential([layers.Dense(2)], name="mine"),
        ["'mine'", "not built", "build(input_shape)"],
    ),
    "subclassed and nested": (nested, ["'mine'", "Subclassed", "tf_keras.Model(inputs, outputs)"]),
    "layer": (lambda: layers.Dense(2), ["tf_keras model", "Dense"]),
    "none": (lambda: None, ["tf_keras model", "NoneType"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_in_one_line(kind):
    make, words = REFUSED[kind]
    with pytest.raises(ValueError) as error:
        canonicalize(make())
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# ---------------------------------------------------------------------------------------------
# Walking and rebuilding.


def test_functional_shares_layers():
    sequential = tf_keras.Sequential([tf_keras.Input((3,)), layers.Dense(2)])
    made = functional(sequential)
    assert made.layers[-1] is sequential.layers[-1]
    assert functional(made) is made


def test_calls_come_after_what_they_read(blocks):
    model, *_ = blocks
    ready = {id(tensor) for tensor in model.inputs}
    names = []
    for call in calls(model):
        assert all(id(tensor) in ready for tensor in call.inputs)
        ready.add(id(call.output))
        names.append(call.layer.name)
    assert sorted(names) == sorted(layer.name for layer in model.layers[1:])
    assert names[-1] == "head"


def test_calls_of_layers_elsewhere_are_not_the_models():
    shared = layers.Dense(3)
    inputs = tf_keras.Input((3,))
    model = tf_keras.Model(inputs, shared(inputs))
    tf_keras.Model(inputs, shared(shared(inputs)))
    assert len(calls(model)) == 1


def test_consumers(blocks):
    model, *_ = blocks

    def names(tensor):
        return sorted(call.layer.name if call else "caller" for call in readers[id(tensor)])

    readers = consumers(model)
    assert names(model.inputs[0]) == ["conv", "sep"]
    assert names(model.get_layer("conv").output) == ["add", "cat"]
    assert names(model.outputs[0]) == ["caller"]


def test_a_tensor_read_twice_by_one_call_counts_twice():
    model = model_of(lambda x: layers.Add()([x, x]))
    assert len(consumers(model)[id(model.inputs[0])]) == 2


def test_several_outputs_are_named():
    class Split(layers.Layer):
        def call(self, inputs):
            return inputs, inputs + 1.0

    model = model_of(lambda x: Split(name="two")(x)[0])
    with pytest.raises(ValueError, match="'two' \\(Split\\) has 2 outputs") as error:
        _ = calls(model)[0].output
    assert "\n" not in str(error.value)


def test_rebuild_with_the_same_layers_is_the_same_model():
    model = model_of(block)
    made = rebuild(model, lambda call, args, kwargs: call.layer(*args, **kwargs))
    assert_same_function(model, made)
    assert {id(layer) for layer in made.layers[1:]} == {id(layer) for layer in model.layers[1:]}


def test_rebuild_can_put_layers_after_inputs_and_calls():
    model = model_of(lambda x: layers.Dense(2, name="d")(layers.Flatten()(x)))
    made = rebuild(
        model,
        lambda call, args, kwargs: layers.Rescaling(2.0)(call.layer(*args, **kwargs)),
        lambda old, new: layers.Rescaling(0.5)(new),
    )
    x = images(model)
    flat = x.reshape(len(x), -1) * 0.5 * 2.0
    kernel, bias = model.get_layer("d").get_weights()
    np.testing.assert_allclose(made(x), 2.0 * (flat @ kernel + bias), rtol=1e-4, atol=1e-5)


def test_call_arguments_are_kept():
    class Scale(layers.Layer):
        def call(self, inputs, factor=1.0, shift=None):
            return inputs * factor if shift is None else inputs * factor + shift

    def build(x):
        scale = Scale()
        return layers.Concatenate()([scale(x, factor=3.0), scale(x, 2.0, shift=x), scale(x)])

    model = model_of(build)
    with tf_keras.utils.custom_object_scope({"Scale": Scale}):
        assert_same_function(model, canonicalize(model)[0])


def test_inputs_under_the_names_that_keras_takes_next(tmp_path):
    """As in a model that comes from a file: names of its own, and Keras's counters at 0."""
    tf_keras.backend.reset_uids()
    inputs = [layers.Input((6, 6, 2), name=f"input_{number}") for number in range(1, 5)]
    outputs = layers.Conv2D(3, 3, name="given0")(layers.Concatenate()(inputs))
    model = small_models.quantized(tf_keras.Model(inputs, outputs))
    qat.settle_biases(model)
    data = small_models.data_for(model, 4)
    path = qat.export_tflite(model, tmp_path / "model.tflite")
    batches = tf.data.Dataset.from_tensors(tuple(data))
    verified = qat.verify_tflite(path, model, batches.map(lambda *x: (x, np.zeros(4))))
    assert verified.layers.rows and not verified.layers.not_compared
    assert qat.ExactModel(model).predict(data, verbose=0).shape == (4, 4, 4, 3)
