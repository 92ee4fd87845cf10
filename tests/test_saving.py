"""Saved quantized models come back bit for bit, train alike, and damage is named in one line."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from small_models import layers

import qat
from qat.errors import ModelError
from qat.saving import load_recipe_of

IMAGE = (6, 6, 3)
RECIPES = ("w8a8", "w4a4", "w1a1", "w8a16")


def network(x):
    """A residual block: the first grid is read twice, batch norm, and an average on its grid."""
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="first")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same", name="middle")(x)
    x = layers.AveragePooling2D(name="average")(layers.Add()([x, y]))
    return layers.Dense(3, name="logits")(layers.Flatten()(x))


@pytest.fixture(scope="module", params=RECIPES)
def saved(request, tmp_path_factory):
    """(recipe, model, path)"""
    recipe = qat.Recipe.from_name(request.param)
    model = small_models.quantized(small_models.model_of(network, IMAGE), recipe)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    qat.save_model(model, path, recipe=recipe)
    return recipe, model, path


@pytest.fixture(scope="module")
def loaded(saved):
    return qat.load_quantized_model(saved[2])


def one_step(model, seed: int = 0) -> list[np.ndarray]:
    """All weights after a step of training on fixed data; the model is put back as it was."""
    before = model.get_weights()
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (8, *IMAGE)).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True) - 1.0))
    gradients = tape.gradient(loss, model.trainable_variables)
    tf_keras.optimizers.SGD(0.1).apply_gradients(
        zip(gradients, model.trainable_variables, strict=True)
    )
    after = model.get_weights()
    model.set_weights(before)
    return after


def test_outputs_and_weights_are_the_same_bits(saved, loaded):
    _, model, _ = saved
    (x,) = small_models.data_for(model)
    np.testing.assert_array_equal(model(x, training=False), loaded(x, training=False))
    assert len(model.weights) == len(loaded.weights)
    for one, other in zip(model.weights, loaded.weights, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.name.split("/")[-1] == other.name.split("/")[-1]
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert len(model.trainable_variables) == len(loaded.trainable_variables) > 0


def test_layers_are_the_same(saved, loaded):
    _, model, _ = saved
    assert [layer.name for layer in model.layers] == [layer.name for layer in loaded.layers]
    assert [type(layer) for layer in model.layers] == [type(layer) for layer in loaded.layers]
    assert qat.quantization_report(model) == qat.quantization_report(loaded)


def test_a_shared_grid_stays_shared(saved, loaded):
    """The average lies on its input's grid: one FakeQuantize layer, called twice."""
    _, model, _ = saved

    def calls(model):
        return {
            layer.name: len(layer.inbound_nodes)
            for layer in model.layers
            if isinstance(layer, qat.FakeQuantize)
        }

    def in_model(model):
        used = [node.layer.name for nodes in model._nodes_by_depth.values() for node in nodes]
        return {name: used.count(name) for name in calls(model)}

    assert in_model(loaded) == in_model(model)
    assert max(in_model(loaded).values()) == 2


def test_training_goes_on_identically(saved, loaded):
    _, model, _ = saved
    before, one, other = model.get_weights(), one_step(model), one_step(loaded)
    assert any(not np.array_equal(a, b) for a, b in zip(before, one, strict=True))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_recipe_travels(saved):
    recipe, _, path = saved
    assert load_recipe_of(path) == recipe


def test_exports_are_the_same_bytes(saved, loaded, tmp_path):
    _, model, _ = saved
    one = qat.export_tflite(model, tmp_path / "one.tflite")
    other = qat.export_tflite(loaded, tmp_path / "other.tflite")
    assert one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that is quick to build, saved."""
    net = small_models.model_of(lambda x: layers.Dense(3, name="dense")(x), (5,))
    path = tmp_path_factory.mktemp("small") / "small.keras"
    model = small_models.quantized(net)
    qat.save_model(model, path, recipe=qat.Recipe.from_name("w8a8"))
    return model, path


def refused(path) -> str:
    """The one line that both loaders refuse a file with."""
    with pytest.raises(ModelError) as error:
        qat.load_quantized_model(path)
    assert "\n" not in str(error.value), error.value
    assert str(path) in str(error.value)
    return str(error.value)


def test_another_suffix_is_refused(small, tmp_path):
    model, _ = small
    for name in ("model.h5", "model", "model.tflite"):
        with pytest.raises(ModelError, match=r"\.keras"):
            qat.save_model(model, tmp_path / name, recipe=qat.Recipe.from_name("w8a8"))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_missing(small, tmp_path):
    model, _ = small
    with pytest.raises(OSError):
        qat.save_model(model, tmp_path / "no" / "m.keras", recipe=qat.Recipe.from_name("w8a8"))


def test_missing_and_foreign_files(tmp_path):
    refused(tmp_path / "missing.keras")
    refused(tmp_path)
    path = tmp_path / "foreign.keras"
    path.write_bytes(b"not a zip")
    refused(path)
    path.write_bytes(b"")
    refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing to see")
    refused(path)


def test_a_plain_keras_file_is_foreign(tmp_path):
    net = small_models.model_of(lambda x: layers.Dense(3)(x), (5,))
    net.save(tmp_path / "float.keras", save_format="keras")
    assert "qat.save_model" in refused(tmp_path / "float.keras")


def with_member(path, target, name: str, content: bytes | None):
    """The archive with one member replaced, or left out."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for member in archive.namelist():
            if member != name:
                copy.writestr(member, archive.read(member))
        if content is not None:
            copy.writestr(name, content)
    return target


MEMBERS = ("metadata.json", "config.json", "model.weights.h5")
CONTENTS = (None, b"", b"{", b"[]", b"null", b'{"class_name": "Nonsense"}')


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"null", b'{"class_name": "Nonsense"}']
)
def test_members_that_are_missing_or_wrong(small, tmp_path, name, content):
    refused(with_member(small[1], tmp_path / "wrong.keras", name, content))


def test_a_wrong_recipe_inside(small, tmp_path):
    path = with_member(small[1], tmp_path / "wrong.keras", "recipe.json", b"{}")
    with pytest.raises(ValueError) as error:
        load_recipe_of(path)
    assert "\n" not in str(error.value)
    path = with_member(small[1], tmp_path / "without.keras", "recipe.json", None)
    with pytest.raises(ModelError):
        load_recipe_of(path)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8, 0.99])
def test_truncated_files(small, tmp_path, share):
    content = small[1].read_bytes()
    path = tmp_path / "cut.keras"
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_never_load_another_model(small, tmp_path, seed):
    """Either refused in one line, or (a byte that means nothing) the same model."""
    model, source = small
    content = bytearray(source.read_bytes())
    rng = np.random.default_rng(seed)
    content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
    path = tmp_path / "flipped.keras"
    path.write_bytes(bytes(content))
    try:
        found = qat.load_quantized_model(path)
    except ModelError as error:
        assert "\n" not in str(error)
        return
    for one, other in zip(model.get_weights(), found.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_saving_over_a_file_replaces_it_whole(small, tmp_path, monkeypatch):
    model, source = small
    path = tmp_path / "m.keras"
    path.write_bytes(source.read_bytes())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        qat.save_model(model, path, recipe=qat.Recipe.from_name("w8a8"))
    assert path.read_bytes() == source.read_bytes() and os.listdir(tmp_path) == ["m.keras"]
