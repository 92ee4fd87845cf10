from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import qat
from qat.errors import ModelError, UserError
from qat.objective import (
    Objective,
    OutputLoss,
    classification,
    ends_in_probability,
    imitation,
    last_activation,
    objective,
    require_targets,
    takes_labels,
)

layers = tf_keras.layers


def model(*outputs: tuple[int, str]) -> tf_keras.Model:
    """Dense outputs of (width, activation)."""
    inputs = layers.Input((4,))
    made = [layers.Dense(width, activation)(inputs) for width, activation in outputs]
    return tf_keras.Model(inputs, made)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


LOGITS = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])


def test_cross_entropy_of_logits_and_of_probabilities():
    labels = np.array([2, 0])
    expected = -np.log(softmax(LOGITS)[[0, 1], labels]).mean()
    for given, from_logits in ((LOGITS, True), (softmax(LOGITS), False)):
        value = classification(from_logits=from_logits).value([labels], [tf.constant(given)])
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_losses_of_several_outputs_are_summed():
    both = Objective((OutputLoss("mean_squared_error"), OutputLoss("mean_absolute_error")))
    true, found = np.array([[1.0], [3.0]]), np.array([[2.0], [5.0]])
    np.testing.assert_allclose(both.value([true, true], [found, found]), 2.5 + 1.5)


@pytest.mark.parametrize("activation, from_logits", (("softmax", False), ("linear", True)))
def test_logits_are_told_from_probabilities(activation, from_logits):
    (output,) = objective(model((3, activation)), ["categorical_crossentropy"]).outputs
    assert output.from_logits is from_logits


def test_one_loss_serves_all_outputs_or_each_has_its_own():
    two = model((3, "softmax"), (1, "linear"))
    assert [o.name for o in objective(two, ["mse"]).outputs] == ["mse", "mse"]
    assert [o.name for o in objective(two, ["mse", "huber"]).outputs] == ["mse", "huber"]
    with pytest.raises(UserError, match="--loss=mse,mae,mse: give one loss, or one for each"):
        objective(two, ["mse", "mae", "mse"])


@pytest.mark.parametrize("name", ("mistake", "MeanSquaredError", ""))
def test_unknown_losses_are_refused(name):
    with pytest.raises(UserError, match=f"--loss={name}"):
        objective(model((3, "linear")), [name])


@pytest.mark.parametrize("make", [imitation, lambda net: objective(net, ["mse"])])
def test_dictionaries_of_outputs_are_refused(make):
    inputs = layers.Input((4,))
    net = tf_keras.Model(inputs, {"b": layers.Dense(2)(inputs), "a": layers.Dense(3)(inputs)})
    with pytest.raises(ModelError, match="dictionary of outputs"):
        make(net)


def test_imitation_compares_probabilities_and_numbers():
    names = [o.name for o in imitation(model((3, "softmax"), (3, "linear"))).outputs]
    assert names == ["categorical_crossentropy", "mean_squared_error"]


def test_the_last_activation_is_found_in_nested_models_and_layers():
    inputs = layers.Input((4,))
    nested = tf_keras.Model(inputs, layers.Softmax()(inputs))
    outer = tf_keras.Model(inputs, nested(layers.Dense(4)(inputs)))
    assert last_activation(outer.outputs[0]) == "softmax"
    assert last_activation(model((2, "sigmoid")).outputs[0]) == "sigmoid"
    assert last_activation(tf_keras.Model(inputs, layers.Flatten()(inputs)).outputs[0]) == ""


@pytest.mark.parametrize(
    "end, name",
    [
        (tf.nn.softmax, "softmax"),
        (tf.sigmoid, "sigmoid"),
        (lambda x: tf.cast(tf.nn.softmax(x), tf.float32), "softmax"),
        (lambda x: layers.Activation("linear")(layers.Softmax()(x)), "softmax"),
        (lambda x: layers.Identity()(layers.Activation("sigmoid")(x)), "sigmoid"),
        (lambda x: x * 2.0, ""),
        (layers.Activation("linear"), ""),
        (layers.Activation(tf.nn.softmax), "softmax"),
        (layers.Activation(tf.nn.sigmoid), "sigmoid"),
    ],
)
def test_the_last_activation_may_be_an_operator_or_lie_behind_a_cast(end, name):
    inputs = layers.Input((4,))
    net = tf_keras.Model(inputs, end(layers.Dense(4)(inputs)))
    for each in (net, qat.quantize_model(net, "w8a8")):
        assert last_activation(each.outputs[0]) in (name, *([] if name else ["linear"]))


@pytest.mark.parametrize(
    "activation, loss",
    [
        ("softmax", "sparse_categorical_crossentropy"),
        ("softmax", "categorical_crossentropy"),
        ("sigmoid", "binary_crossentropy"),
    ],
)
def test_a_probability_that_is_rounded_to_0_has_a_gradient(activation, loss):
    """Loss and gradient are those of the logits, whatever the grid of the output."""
    net = model((3, activation))
    net.layers[-1].set_weights([np.eye(4, 3) * 20, np.zeros(3)])
    x = np.float32([[-1, 1, 0.5, 0.3], [1, -1, 0.25, -0.2]])
    quantized = qat.calibrate(
        qat.quantize_model(net, "w8a8"), tf.data.Dataset.from_tensors(np.tile(x, (8, 1)))
    )
    labels = np.array([0, 1])
    targets = labels if loss.startswith("sparse") else np.eye(3, dtype=np.float32)[labels]
    (function,) = objective(quantized, [loss]).losses()
    assert (quantized(x).numpy()[[0, 1], labels] == 0).all()
    before = quantized.get_layer(quantized.layers[-2].name).input  # the logits' codes
    logits = tf_keras.Model(quantized.inputs, before)(x).numpy().astype(np.float64)
    if activation == "softmax":
        expected = np.log(np.exp(logits).sum(1)) - logits[[0, 1], labels]
    else:
        one_hot = np.eye(3)[labels]
        expected = (np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0)).mean(1)
        expected -= (logits * one_hot).mean(1)
    with tf.GradientTape() as tape:
        found = tf.reduce_mean(function(targets, quantized(x, training=True)))
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-4)
    kernel = next(each for each in quantized.trainable_weights if "kernel" in each.name)
    assert np.abs(tape.gradient(found, kernel)).max() > 0.05


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_a_quantized_model_ends_as_its_float_one(activation):
    net = model((3, activation))
    flat = tf_keras.Model(net.inputs, layers.Reshape((3, 1))(net.outputs[0]))
    for each in (net, flat, qat.quantize_model(net, "w8a8"), qat.quantize_model(flat, "w4a4")):
        assert ends_in_probability(each.outputs[0]) == (activation == "softmax")


@pytest.mark.parametrize(
    "loss, target, message",
    (
        ("mse", np.zeros((5, 2), np.float32), r"'dense\w*', \(3,\) an example.*got \(2,\)"),
        ("sparse_categorical_crossentropy", np.zeros((5, 3), int), r"integer labels of shape \(\)"),
        ("sparse_categorical_crossentropy", np.zeros(5), "integer labels"),
        ("sparse_categorical_crossentropy", np.full(5, 3), r"lie in \[3, 3\].*\[0, 2\]"),
        ("sparse_categorical_crossentropy", np.full(5, -1), r"lie in \[-1, -1\]"),
    ),
)
def test_targets_that_do_not_fit_are_refused(loss, target, message):
    made = model((3, "linear"))
    with pytest.raises(UserError, match=message):
        require_targets(objective(made, [loss]), made, [target], "--data")


def test_targets_that_fit_are_taken():
    made = model((3, "linear"))
    for loss, target in (
        ("mse", np.zeros((5, 3))),
        ("sparse_categorical_crossentropy", np.arange(5) % 3),
        ("sparse_categorical_crossentropy", np.arange(5)[:, None] % 3),
    ):
        require_targets(objective(made, [loss]), made, [target], "--data")


@pytest.mark.parametrize(
    "shape, target, expected",
    (
        ((None, 3), np.zeros(5, int), True),
        ((None, 3), np.zeros((5, 1), int), True),
        ((None, 3), np.zeros(5), False),
        ((None, 1), np.zeros((5, 1), int), False),
        ((None, 4, 4, 3), np.zeros((5, 4, 4), np.uint8), True),
        ((None, 4, 4, 3), np.zeros((5, 4, 4, 3), np.uint8), False),
    ),
)
def test_labels_are_recognized(shape, target, expected):
    assert takes_labels(tf.TensorSpec(shape), target) is expected


def test_metrics_follow_the_losses():
    made = Objective((OutputLoss("mse"), OutputLoss("binary_crossentropy", from_logits=True)))
    (none, (accuracy,)) = made.metrics()
    assert none == []
    accuracy.update_state([[1.0], [0.0]], [[0.2], [-0.1]])  # logits: above 0 is class 1
    assert float(accuracy.result()) == 1.0
