"""Saving quantized models as `.keras` files and loading them bit for bit.

TFMOT's wrappers build their variables twice under Keras's own `.keras` loader and fail there. The
file is the same zip (config.json, metadata.json, model.weights.h5); the weights go in and out by
position in the rebuilt model, and the recipe travels with them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator

import h5py
import tensorflow_model_optimization as tfmot
import tf_keras

from qat.deep import deep_models
from qat.errors import ModelError, QatError
from qat.files import write_whole, zipped
from qat.recipe import Recipe, load_recipe
from qat.wrapper import kernels_once_a_call

_FORMAT = "qat-1"
# What Keras and h5py raise for members that are legal JSON or HDF5 but no model.
_WRONG_CONTENT = (KeyError, ValueError, TypeError, AttributeError)


def save_model(model: tf_keras.Model, path: str | os.PathLike, *, recipe: str | Recipe) -> None:
    """Writes a quantized model; the file appears whole or not at all.

    Args:
        path: ends in ".keras". recipe: as `quantize_model` took it; stored beside the weights.

    Raises:
        ModelError: another suffix. RecipeError: an illegal recipe.
        OSError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".keras":
        raise ModelError(f"quantized models are saved as .keras files, got {path.name!r}")
    metadata = {"format": _FORMAT, "keras_version": tf_keras.__version__}
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for index, variable in enumerate(model.weights):
            file.create_dataset(str(index), data=variable.numpy()).attrs["name"] = variable.name
    members = {
        "metadata.json": json.dumps(metadata).encode(),
        "config.json": model.to_json().encode(),
        "recipe.json": load_recipe(recipe).to_json().encode(),
        "model.weights.h5": weights.getvalue(),
    }
    write_whole(path, zipped(members))


@deep_models()
def load_quantized_model(path: str | os.PathLike) -> tf_keras.Model:
    """The model that `save_model` wrote; same outputs, bit for bit.

    Raises:
        ModelError: the file is missing, damaged, or was written by something else.
    """
    with _opened(path) as archive:
        metadata = json.loads(archive.read("metadata.json"))
        if metadata.get("format") != _FORMAT:
            raise ModelError(f"{path} was not written by qat.save_model")
        with tfmot.quantization.keras.quantize_scope():
            model = tf_keras.models.model_from_json(archive.read("config.json").decode())
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            model.set_weights([file[str(index)][()] for index in range(len(model.weights))])
        return kernels_once_a_call(model)


def load_recipe_of(path: str | os.PathLike) -> Recipe:
    """The recipe that a saved quantized model was made with. Raises as `load_quantized_model`."""
    with _opened(path) as archive:
        return Recipe.from_json(archive.read("recipe.json").decode())


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The file's archive; whatever is wrong with it becomes one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except QatError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, *_WRONG_CONTENT) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} is no quantized model, or damaged: {reason}") from error
