"""Float models on their way in and out of a training run."""

from __future__ import annotations

import json
import pathlib
import tempfile
import zipfile
import zlib

import numpy as np
import tf_keras

from qat.data import DatasetSpec
from qat.errors import ModelError, UserError
from qat.files import write_whole, zipped
from qat.saving import load_recipe_of


def load_float_model(path: str, spec: DatasetSpec, flag: str) -> tf_keras.Model:
    """A float classifier that fits a dataset; code hidden in the file is not run.

    Args:
        flag: named in messages.

    Raises:
        UserError: no model, a quantized one, one for other data, or NaN weights.
    """
    try:
        model = tf_keras.models.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError, *_DAMAGED) as error:
        reason = " ".join(str(error).split())[:300]
        if _is_quantized(path):
            reason = "it is a quantized model; give the float one it came from"
        raise UserError(f"{flag}: {path} cannot be loaded: {reason}") from error
    shape, classes = tuple(model.input_shape[1:]), model.output_shape[-1]
    if shape != tuple(spec.image_shape) or classes != spec.num_classes:
        raise UserError(
            f"{flag}: {path} maps {shape} to {classes} classes; dataset {spec.name} has "
            f"{spec.image_shape} and {spec.num_classes}"
        )
    for weight in model.weights:
        if not np.isfinite(weight.numpy()).all():
            raise UserError(f"{flag}: {path} has NaN or infinite values in {weight.name}")
    return model


_DAMAGED = (zipfile.BadZipFile, zlib.error, AttributeError)


def _is_quantized(path: str) -> bool:
    try:
        load_recipe_of(path)
    except ModelError:
        return False
    return True


def save_float_model(model: tf_keras.Model, path: pathlib.Path) -> None:
    """Writes the model without its optimizer; the file appears whole or not at all.

    Keras notes the time of day; here the same weights give the same file.
    """
    copy = tf_keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = pathlib.Path(folder, path.name)
        copy.save(written, save_format="keras")
        with zipfile.ZipFile(written) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(members["metadata.json"])
    metadata.pop("date_saved", None)
    write_whole(path, zipped({**members, "metadata.json": json.dumps(metadata).encode()}))
