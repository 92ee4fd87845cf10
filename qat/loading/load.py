"""load_model: whatever Keras model there is, as a tf_keras model."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tf_keras
from tf_keras.src.saving.serialization_lib import ObjectSharingScope, SafeModeScope

from qat.canonical import functional
from qat.deep import deep_models
from qat.errors import ModelError
from qat.loading.custom_objects import parse_custom_objects
from qat.loading.files import Format, ModelFile, errors_in_one_line, read_model_file
from qat.loading.keras3 import from_keras3, is_keras3_model
from qat.loading.keras3_layers import APPLICATION_LAYERS
from qat.loading.precision import in_float32
from qat.loading.safety import check_float, check_operations, check_safe

_WEIGHTS = "model.weights.h5"


@deep_models()
def load_model(
    path_or_model: str | os.PathLike | Any,
    *,
    custom_objects: Mapping[str, Any] | Iterable[str] | None = None,
    allow_unsafe_deserialization: bool = False,
) -> tf_keras.Model:
    """A Keras model, of Keras 2 or 3, object or file, as a float tf_keras model.

    A tf_keras model is handed back as it is; one of Keras 3 is converted, layer by layer and
    operation by operation, with its weights and layer names, and computes the same. What computes
    in 16 bits becomes float32. Code that a file holds or names is not run; of a SavedModel only
    the configuration and the weights are read, never the traced functions.

    Args:
        path_or_model: functional or Sequential; a `.keras` or `.h5` file or a SavedModel folder of
            either Keras, or the model itself.
        custom_objects: {name: class or function}, or "module:NAME" strings.
        allow_unsafe_deserialization: run the code of Lambda layers and import what the file names.

    Raises:
        ModelError: a missing, damaged or foreign file, a quantized or subclassed model, hidden
            code, a Keras 3 layer without a counterpart, or NaN or infinite weights.
    """
    if custom_objects is None or not isinstance(custom_objects, Mapping):
        custom_objects = parse_custom_objects(custom_objects or ())
    if is_keras3_model(path_or_model):
        model = from_keras3(path_or_model, custom_objects)
    elif isinstance(path_or_model, str | os.PathLike):
        model = _from_file(path_or_model, custom_objects, allow_unsafe_deserialization)
    elif isinstance(path_or_model, tf_keras.Model):
        model = path_or_model
    else:
        kind = type(path_or_model)
        raise ModelError(f"need a Keras model or a path, got {kind.__module__}.{kind.__name__}")
    functional(model)  # raises for subclassed and unbuilt ones
    _require_finite(model)
    return in_float32(model)


def _from_file(
    path: str | os.PathLike, custom_objects: Mapping[str, Any], unsafe: bool
) -> tf_keras.Model:
    with errors_in_one_line(path):
        file = read_model_file(path)
        check_float(file)
        if file.version >= 3:
            _require_keras3(file)
            check_operations(file)
        if not unsafe:
            check_safe(file, custom_objects)
        if file.version >= 3:
            return from_keras3(_keras3(file, dict(custom_objects), unsafe), custom_objects)
        load = _saved_model if file.format is Format.SAVED_MODEL else _tf_keras
        return load(file, {**APPLICATION_LAYERS, **custom_objects}, unsafe)


def _tf_keras(file: ModelFile, custom_objects: dict[str, Any], unsafe: bool) -> tf_keras.Model:
    if file.format is Format.KERAS:
        return _archive(file, custom_objects, unsafe)
    return tf_keras.models.load_model(
        str(file.path), custom_objects=custom_objects, compile=False, safe_mode=not unsafe
    )


def _archive(file: ModelFile, custom_objects: dict[str, Any], unsafe: bool) -> tf_keras.Model:
    """As tf_keras's loader, but from a weights file outside of the archive.

    Inside, each of h5py's steps back reads it from its beginning again: minutes for 200 MB.
    """
    with ObjectSharingScope():
        model = tf_keras.saving.deserialize_keras_object(
            file.config, custom_objects, safe_mode=not unsafe
        )
    with zipfile.ZipFile(file.path) as archive, tempfile.TemporaryDirectory() as folder:
        model.load_weights(archive.extract(_WEIGHTS, folder))
    return model


def _saved_model(file: ModelFile, custom_objects: dict[str, Any], unsafe: bool) -> tf_keras.Model:
    """tf_keras's loader would run the file's own functions; the model is built anew instead."""
    with SafeModeScope(not unsafe):
        model = tf_keras.models.model_from_config(file.config, custom_objects)
    status = model.load_weights(str(file.path / "variables" / "variables"))
    status.assert_existing_objects_matched().expect_partial()
    return model


def _keras3(file: ModelFile, custom_objects: dict[str, Any], unsafe: bool) -> Any:
    import keras

    return keras.saving.load_model(
        str(file.path), custom_objects=custom_objects, compile=False, safe_mode=not unsafe
    )


def _require_keras3(file: ModelFile) -> None:
    try:
        import keras
    except ImportError as error:
        raise ModelError(
            f"{file.path} was written by Keras 3, which is not installed: "
            "python -m pip install 'keras>=3.12'"
        ) from error
    if keras.__version__.startswith("2."):
        raise ModelError(
            f"{file.path} was written by Keras 3, installed is Keras {keras.__version__}: "
            "python -m pip install 'keras>=3.12'"
        )


def _require_finite(model: tf_keras.Model) -> None:
    for weight in model.weights:
        if weight.dtype.is_floating and not np.isfinite(weight.numpy()).all():
            raise ModelError(f"model {model.name!r} has NaN or infinite values in {weight.name}")
