from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qat.arrays import ArrayError, load_arrays

layers = tf_keras.layers


def image_model() -> tf_keras.Model:
    inputs = layers.Input((2, 2, 1), name="image")
    return tf_keras.Model(inputs, layers.Dense(3, name="kind")(layers.Flatten()(inputs)))


def model_of_two() -> tf_keras.Model:
    first, second = layers.Input((3,), name="first"), layers.Input((2,), name="second")
    joined = layers.Concatenate()([first, second])
    outputs = [layers.Dense(1, name="size")(joined), layers.Dense(2, name="kind")(joined)]
    return tf_keras.Model([first, second], outputs)


def numbered(count: int) -> np.ndarray:
    """(count, 2, 2, 1), all pixels of an example its number."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)


def load(path, model, batch_size=4, seed=0):
    return load_arrays(str(path), model, batch_size=batch_size, seed=seed, flag="--data")


def examples(dataset: tf.data.Dataset) -> list[int]:
    return [int(x[0, 0, 0]) for batch in dataset for x in batch[0].numpy()]


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "a.npz", x=numbered(50), y=np.arange(50) % 3)
    return load(tmp_path / "a.npz", image_model())


def test_every_example_is_in_one_part(data):
    train = examples(data.train_stream().take(data.steps_per_epoch))
    validation, test = examples(data.validation), examples(data.test)
    assert (len(test), len(validation)) == (10, 5)
    assert len(train) == 35 // 4 * 4 == len(set(train))
    assert not set(train) & set(validation + test) and not set(validation) & set(test)


def test_inputs_and_targets_stay_together_in_the_models_type(data):
    for x, y in data.train_stream().take(3):
        assert x.dtype == tf.float32
        np.testing.assert_array_equal(x.numpy()[:, 0, 0, 0] % 3, y.numpy())


def test_the_stream_is_a_function_of_seed_and_step(data, tmp_path):
    stream = examples(data.train_stream().take(20))
    assert examples(data.train_stream(11).take(9)) == stream[44:]
    assert examples(data.train_stream().take(20)) == stream
    assert stream[:32] != stream[32:64], "two epochs in one order"
    other = load(tmp_path / "a.npz", image_model(), seed=1)
    assert examples(other.train_stream().take(20)) != stream


def test_fewer_examples_than_a_batch_are_one_batch(tmp_path):
    np.savez(tmp_path / "a.npz", x=numbered(3))
    data = load(tmp_path / "a.npz", image_model(), batch_size=64)
    assert data.steps_per_epoch == 1 and data.counts == (1, 1, 1)
    assert [len(batch[0]) for batch in data.train_stream().take(2)] == [1, 1]


def test_several_inputs_and_outputs_come_by_name(tmp_path):
    numbers = np.arange(20.0, dtype=np.float32)[:, None]
    arrays = {"kind": numbers, "second": numbers * [2, 2], "first": numbers * [1, 1, 1]}
    np.savez(tmp_path / "a.npz", size=numbers * 3, **arrays)
    for (first, second), (size, kind) in load(tmp_path / "a.npz", model_of_two()).test:
        np.testing.assert_array_equal(first[:, :2] * 2, second)
        np.testing.assert_array_equal(size, kind * 3)
        np.testing.assert_array_equal(size[:, 0], first[:, 0] * 3)


def test_without_targets_a_batch_is_its_inputs(tmp_path):
    np.savez(tmp_path / "a.npz", first=np.ones((9, 3)), second=np.ones((9, 2)))
    (batch,) = load(tmp_path / "a.npz", model_of_two(), batch_size=9).validation
    assert len(batch) == 1 and [tuple(x.shape) for x in batch[0]] == [(1, 3), (1, 2)]


def test_fractions_are_no_integers(tmp_path):
    inputs = tf_keras.Input((4,), dtype="int32")
    model = tf_keras.Model(inputs, layers.Flatten()(layers.Embedding(5, 2)(inputs)))
    for x, fits in ((np.ones((9, 4)), True), (np.full((9, 4), 1.5), False)):
        np.savez(tmp_path / "a.npz", x=x)
        if fits:
            load(tmp_path / "a.npz", model)
        else:
            with pytest.raises(ArrayError, match="takes int32, the file holds fractions"):
                load(tmp_path / "a.npz", model)


X = numbered(9)
WRONG = {
    "nothing": ({}, "lacks x"),
    "another name": ({"images": X}, "lacks x; it holds images"),
    "one too many": ({"x": X, "labels": X}, "labels; legal: x, and for training y"),
    "another shape": ({"x": X[:, :, :1]}, r"'image' takes .*\(2, 2, 1\).*\(2, 1, 1\)"),
    "fewer targets": ({"x": X, "y": np.zeros(8, int)}, "9, 8"),
    "two examples": ({"x": X[:2]}, "2 examples; at least 3"),
    "a number": ({"x": np.float32(3)}, "'x' is no array"),
    "texts": ({"x": np.full((9, 2, 2, 1), "a")}, "'x' is no array of numbers"),
    "objects": ({"x": np.full(9, None)}, "cannot be read"),
    "NaN": ({"x": np.full(X.shape, np.nan)}, "'x' holds NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(name, tmp_path):
    arrays, message = WRONG[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ArrayError, match=message) as error:
        load(tmp_path / "a.npz", image_model())
    assert str(error.value).startswith("--data=") and "\n" not in str(error.value)


def test_one_of_two_inputs_is_not_enough(tmp_path):
    np.savez(tmp_path / "a.npz", first=np.ones((9, 3)))
    with pytest.raises(ArrayError, match="lacks first, second; it holds first"):
        load(tmp_path / "a.npz", model_of_two())


@pytest.mark.parametrize("content", (b"", b"no archive", b"PK\x03\x04 cut short"))
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ArrayError, match="a.npz cannot be read"):
        load(tmp_path / "a.npz", image_model())


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(ArrayError, match="single array"):
        load(tmp_path / "a.npy", image_model())
