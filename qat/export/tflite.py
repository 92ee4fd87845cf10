"""export_tflite: a quantized Keras model becomes a checked .tflite file."""

from __future__ import annotations

import os
import pathlib

import tf_keras
from ai_edge_litert.interpreter import Interpreter

from qat.export.convert import IO_TYPES, convert
from qat.export.flatbuffer import to_bytes
from qat.export.graph import ExportError
from qat.files import write_whole
from qat.integers import integer_mismatches
from qat.larq_file import runs_on_larq
from qat.tflite_file import FileError, read_file
from qat.verify import larq

TARGETS = ("litert", "lce")
WEIGHT_STORAGES = ("size", "speed")


def export_tflite(
    model: tf_keras.Model,
    path: str | os.PathLike,
    *,
    target: str = "litert",
    io: str = "float32",
    weight_storage: str = "size",
) -> pathlib.Path:
    """Writes the model's TFLite file; it appears whole and checked, or not at all.

    Before the file gets its name, its integers are read back and compared with every quantizer's,
    and the interpreter must accept it: LiteRT's, or for bit-packed convolutions that of Larq
    Compute Engine if the environment variable QAT_LCE_PYTHON names a Python that has it.

    Args:
        model: quantized, and calibrated or trained.
        path: of the file to write; its folder must exist.
        target: "litert", the kernels of LiteRT and TensorFlow Lite; or "lce", those and Larq
            Compute Engine's bit-packed convolutions for 1-bit weights and activations.
        io: "float32", "int8" or "uint8" inputs and outputs.
        weight_storage: "size", the smallest container that the operator runs; or "speed", int8,
            which convolution kernels need not unpack at every invocation.

    Returns:
        The path.

    Raises:
        ExportError: illegal options, a model that cannot be exported, a folder that cannot be
            written, or a file that fails its check.
    """
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r}; legal: {', '.join(TARGETS)}")
    if io not in IO_TYPES:
        raise ExportError(f"unknown io {io!r}; legal: {', '.join(IO_TYPES)}")
    if weight_storage not in WEIGHT_STORAGES:
        legal = ", ".join(WEIGHT_STORAGES)
        raise ExportError(f"unknown weight_storage {weight_storage!r}; legal: {legal}")
    path = pathlib.Path(path)
    # 1. Constants and operators.
    graph = convert(model, target=target, io=io, weight_storage=weight_storage)
    content = to_bytes(graph, description=f"qat: {model.name}")
    # 2. It gets its name once its integers and the interpreter are content.
    try:
        write_whole(path, content, check=lambda written: _check(written, content, model))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    return path


def target_notes(model: tf_keras.Model, target: str) -> dict[str, str]:
    """{layer: what the target's own operators could not do for it}; empty for "litert".

    Raises:
        ExportError: as `export_tflite`.
    """
    return convert(model, target=target).notes


def _check(written: pathlib.Path, content: bytes, model: tf_keras.Model) -> None:
    file = read_file(written)
    mismatches = integer_mismatches(model, file)
    if mismatches:
        raise ExportError(
            f"the file is not the model, this is a bug in qat: {'; '.join(mismatches)}"
        )
    try:
        if not runs_on_larq(file):
            Interpreter(model_content=content).allocate_tensors()
        elif os.environ.get(larq.VARIABLE):
            larq.LarqRunner(written)
    except (FileError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"the interpreter refuses the file, this is a bug in qat: {reason}"
        ) from error
