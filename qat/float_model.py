"""Float models on their way in and out of a training run."""

from __future__ import annotations

import json
import pathlib
import tempfile
import zipfile

import tf_keras

import models
from qat.data import DatasetSpec
from qat.deep import deep_models
from qat.errors import ModelError, UserError
from qat.files import write_whole, zipped
from qat.loading import load_model


def require_model(text: str, hint: str = "") -> None:
    """Raises UserError, with the hint, unless `models.build` takes "cnn5" or "cnn5:width=2"."""
    try:
        models.chosen(text)
    except ValueError as error:
        raise UserError(f"--model={text}: {error}{hint}") from error


def load_float_model(path: str, spec: DatasetSpec, flag: str) -> tf_keras.Model:
    """A float classifier that fits a dataset; code hidden in the file is not run.

    Args:
        flag: named in messages.

    Raises:
        UserError: no model, a quantized one, one for other data, or NaN weights.
    """
    try:
        model = load_model(path)
    except ModelError as error:
        raise UserError(f"{flag}: {error}") from error
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UserError(f"{flag}: {path} needs one input and one output of class scores")
    shape, classes = tuple(model.input_shape[1:]), model.output_shape[-1]
    if shape != tuple(spec.image_shape) or classes != spec.num_classes:
        raise UserError(
            f"{flag}: {path} maps {shape} to {classes} classes; dataset {spec.name} has "
            f"{spec.image_shape} and {spec.num_classes}"
        )
    return model


@deep_models()
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
