"""What a model's file is: its format, the Keras that wrote it, and the configuration inside.

Nothing of the file is run or built here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
from tf_keras.protobuf import saved_metadata_pb2

from qat.errors import ModelError, QatError

_ZIP, _HDF5 = b"PK", b"\x89HDF\r\n\x1a\n"
_TFLITE = b"TFL3"
_GRAPHS = ("_tf_keras_model", "_tf_keras_network", "_tf_keras_sequential")


class Format(enum.Enum):
    KERAS = ".keras file"
    HDF5 = "HDF5 file"
    SAVED_MODEL = "SavedModel"


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A Keras model on disk.

    Attributes:
        version: major version of the Keras that wrote it, 2 (tf_keras) or 3.
        config: {"class_name": …, "config": …} of the model.
    """

    path: pathlib.Path
    format: Format
    version: int
    config: dict[str, Any]


def read_model_file(path: str | os.PathLike) -> ModelFile:
    """The format, Keras version and configuration of a file or folder.

    Raises:
        ModelError: it is missing, a quantized model, or holds no Keras model.
        Exception: what the format's reader raises for a damaged one, see `errors_in_one_line`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_dir():
        return _saved_model(path)
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(_ZIP):
        return _archive(path)
    if head == _HDF5:
        return _hdf5(path)
    kind = "a TFLite file" if head[4:] == _TFLITE else "none of them"
    raise ModelError(
        f"{path}: need a .keras file, an .h5 file or a SavedModel folder of a Keras model; it is "
        f"{kind}"
    )


def _archive(path: pathlib.Path) -> ModelFile:
    with zipfile.ZipFile(path) as archive:
        if "config.json" not in archive.namelist():
            raise ModelError(f"{path}: a zip file without config.json is no Keras model")
        metadata = json.loads(archive.read("metadata.json"))
        config = json.loads(archive.read("config.json"))
    config.pop("compile_config", None)  # losses and metrics, of any class; never loaded
    if str(metadata.get("format", "")).startswith("qat"):
        raise ModelError(
            f"{path} is a quantized model: open it with qat.load_quantized_model, or give the "
            "float model it came from"
        )
    if path.suffix != ".keras":
        raise ModelError(f"{path}: Keras reads such a file only if its name ends in .keras")
    return ModelFile(path, Format.KERAS, _major(metadata["keras_version"]), config)


def _hdf5(path: pathlib.Path) -> ModelFile:
    with h5py.File(path) as file:
        config, version = file.attrs.get("model_config"), file.attrs.get("keras_version", "1")
    if config is None:
        raise ModelError(
            f"{path} holds no Keras model, only weights or other data: save the model with "
            "model.save(path)"
        )
    return ModelFile(path, Format.HDF5, max(2, _major(version)), json.loads(config))


def _saved_model(path: pathlib.Path) -> ModelFile:
    if not (path / "saved_model.pb").is_file():
        raise ModelError(f"{path}: a folder without saved_model.pb is no SavedModel")
    metadata = path / "keras_metadata.pb"
    if not metadata.is_file():
        raise ModelError(
            f"{path}: a SavedModel without keras_metadata.pb holds no Keras model, only its traced "
            "functions; save the model with model.save('model.keras')"
        )
    nodes = saved_metadata_pb2.SavedMetadata.FromString(metadata.read_bytes()).nodes
    root = next((node for node in nodes if node.node_path == "root"), None)
    if root is None or root.identifier not in _GRAPHS:
        raise ModelError(f"{path} holds no Keras model, but layers or other objects")
    found = json.loads(root.metadata)
    if not (found.get("is_graph_network") or found["class_name"] == "Sequential"):
        raise ModelError(
            f"{path}: model {found.get('name')!r} is subclassed ({found['class_name']}); only "
            "functional and Sequential models can be loaded: rebuild it with "
            "tf_keras.Model(inputs, outputs)"
        )
    kind = "Sequential" if root.identifier == "_tf_keras_sequential" else "Functional"
    config = {"class_name": kind, "config": _with_tuples(found["config"])}
    return ModelFile(path, Format.SAVED_MODEL, 2, config)


def _with_tuples(value: Any) -> Any:
    """JSON in which SavedModels mark the tuples and shapes of the configuration."""
    if isinstance(value, dict):
        if value.get("class_name") in ("__tuple__", "TensorShape") and "items" in value:
            return tuple(_with_tuples(item) for item in value["items"])
        if value.get("class_name") == "__ellipsis__":
            return ...
        return {key: _with_tuples(item) for key, item in value.items()}
    return [_with_tuples(item) for item in value] if isinstance(value, list) else value


def _major(version: str) -> int:
    return int(str(version).split(".")[0])


@contextlib.contextmanager
def errors_in_one_line(path: str | os.PathLike) -> Iterator[None]:
    """Whatever is wrong with a file's content becomes one line.

    Raises:
        ModelError: for what zip, HDF5, protobuf, JSON and Keras raise, each in its own way.
    """
    try:
        yield
    except QatError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path} is damaged or no Keras model: {reason}") from error
