"""Which tensors can be negative, and that methods which cut that off are refused there."""

from __future__ import annotations

import pytest
import tf_keras

import qat
from qat.canonical import calls
from qat.negatives import never_negative
from qat.recipe import RecipeError
from qat.roles import role

layers = tf_keras.layers


def relu_of(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


CASES = {
    "conv": (lambda x: layers.Conv2D(2, 1)(x), False),
    "relu": (relu_of, True),
    "relu6": (lambda x: layers.ReLU(6.0)(x), True),
    "moved": (lambda x: layers.Flatten()(layers.MaxPooling2D()(relu_of(x))), True),
    "averaged": (lambda x: layers.GlobalAveragePooling2D()(relu_of(x)), True),
    "mean of any": (lambda x: layers.GlobalAveragePooling2D()(x), False),
    "added": (lambda x: layers.Add()([relu_of(x), relu_of(x)]), True),
    "residual": (lambda x: layers.Add()([relu_of(x), layers.Conv2D(2, 1)(x)]), False),
    "subtracted": (lambda x: layers.Subtract()([relu_of(x), relu_of(x)]), False),
    "joined": (lambda x: layers.Concatenate()([relu_of(x), relu_of(x)]), True),
    "joined with any": (lambda x: layers.Concatenate()([relu_of(x), x]), False),
    "sigmoid": (lambda x: layers.Activation("sigmoid")(x), True),
    "tanh": (lambda x: layers.Activation("tanh")(x), False),
}


def answer(build, input_range=None) -> bool:
    x = tf_keras.Input((4, 4, 2))
    model = tf_keras.Model(x, build(x))
    producer = {id(call.output): call for call in calls(model)}
    return never_negative(model.output, producer, lambda call: role(call.layer), input_range)


@pytest.mark.parametrize("name", CASES)
def test_it_follows_from_the_layers(name):
    build, expected = CASES[name]
    assert answer(build) is expected


def test_inputs_are_what_their_range_says():
    def flat(x):
        return layers.Flatten()(x)

    assert [answer(flat, known) for known in (None, (0.0, 255.0), (-1.0, 1.0))] == [
        False,
        True,
        False,
    ]


def network(activation: str | None) -> tf_keras.Model:
    x = inputs = tf_keras.Input((8, 8, 1))
    for index in range(3):
        x = layers.Conv2D(4, 3, activation=activation, name=f"conv{index}")(x)
    return tf_keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_a_method_that_cuts_off_is_refused_where_it_would_cut(method):
    qat.quantize_model(network("relu"), f"w4a4-{method}", input_range=(0, 255))
    with pytest.raises(RecipeError) as error:
        qat.quantize_model(network(None), f"w4a4-{method}", input_range=(0, 255))
    message = str(error.value)
    assert all(word in message for word in ("'conv1'", f"'{method}'", "'lsqplus'", "negative"))
    assert "\n" not in message
    qat.quantize_model(network(None), "w4a4-lsqplus", input_range=(0, 255))
