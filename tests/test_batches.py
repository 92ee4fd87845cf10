"""What is taken of a batch, for all the forms that Keras knows."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qat.batches import input_batches, inputs_and_labels
from qat.errors import QatError

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Z = -X[:, :2]
Y = np.arange(6)


@pytest.fixture(scope="module")
def one():
    x = tf_keras.Input([4], name="x")
    return tf_keras.Model(x, tf_keras.layers.Dense(2)(x), name="one")


@pytest.fixture(scope="module")
def two():
    x, z = tf_keras.Input([4], name="x"), tf_keras.Input([2], name="z")
    return tf_keras.Model([x, z], tf_keras.layers.Concatenate()([x, z]), name="two")


def batches(content, size=4):
    return tf.data.Dataset.from_tensor_slices(content).batch(size)


def taken(model, content, steps=None):
    """Each input's examples, put together again, and the number of batches."""
    parts = list(input_batches(model, batches(content), steps))
    return [np.concatenate(column) for column in zip(*parts, strict=True)], len(parts)


@pytest.mark.parametrize("content", [X, (X,), (X, Y), (X, Y, Y)], ids=["x", "(x,)", "xy", "xyw"])
def test_one_input(one, content):
    (x,), count = taken(one, content)
    np.testing.assert_array_equal(x, X)
    assert count == 2


@pytest.mark.parametrize(
    "content",
    [(X, Z), ((X, Z),), ((X, Z), Y), {"x": X, "z": Z}, ({"x": X, "z": Z}, Y)],
    ids=["alone", "in a tuple", "with labels", "dictionary", "dictionary with labels"],
)
def test_two_inputs(two, content):
    (x, z), _ = taken(two, content)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(z, Z)


@pytest.mark.parametrize(
    "content, expected",
    [((X, Z), None), (((X, Z), Y), Y), ({"z": Z, "x": X}, None), (({"z": Z, "x": X}, Y, Y), Y)],
)
def test_labels_of_two_inputs(two, content, expected):
    inputs, labels = inputs_and_labels(two, next(iter(batches(content, 6))))
    for found, given in zip(inputs, (X, Z), strict=True):
        np.testing.assert_array_equal(found, given)
    assert (labels is None) == (expected is None)
    if expected is not None:
        np.testing.assert_array_equal(labels, expected)


def test_steps(one):
    (x,), count = taken(one, (X, Y), steps=1)
    np.testing.assert_array_equal(x, X[:4])
    assert count == 1


@pytest.mark.parametrize(
    ("dataset", "steps", "message"),
    [
        (batches(X).take(0), None, "empty"),
        (batches(X).repeat(), None, "no end.*steps"),
        (batches(X), 0, "steps must be at least 1"),
        (X, None, "tf.data.Dataset.*got ndarray"),
        (batches(np.where(X == 20, np.nan, X)), None, "batch 2 .*NaN"),
        (batches((np.where(X == 3, np.inf, X), Y)), None, "batch 1 .*infinite"),
    ],
)
def test_what_cannot_be_taken(one, dataset, steps, message):
    with pytest.raises(QatError, match=message) as error:
        list(input_batches(one, dataset, steps))
    assert "\n" not in str(error.value)


def test_too_few_inputs(two):
    with pytest.raises(
        QatError, match="'two' takes 2 inputs .x, z., and the dataset's batches hold 1"
    ):
        list(input_batches(two, batches((X, Y, Y)), None))


def test_labels_may_be_anything(one):
    assert len(list(input_batches(one, batches((X, np.full(6, np.nan))), None))) == 2


def test_an_endless_dataset_with_steps(one):
    assert len(list(input_batches(one, batches(X).repeat(), 5))) == 5


def test_bytes_become_the_models_floats(one):
    (x,), _ = taken(one, X.astype(np.uint8))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, X)


def test_dictionaries_follow_the_models_order():
    x, z = tf_keras.Input([4], name="late"), tf_keras.Input([2], name="early")
    model = tf_keras.Model({"b": x, "a": z}, tf_keras.layers.Concatenate()([x, z]))
    (first, second), _ = taken(model, {"a": Z, "b": X})
    assert [tensor.shape[-1] for tensor in model.inputs] == [2, 4]
    np.testing.assert_array_equal(first, Z)
    np.testing.assert_array_equal(second, X)
    with pytest.raises(QatError, match="hold 1"):
        list(input_batches(model, batches({"b": X, "c": Z}), None))
