"""export_tflite: a quantized Keras model becomes a checked .tflite file."""

from __future__ import annotations

import os
import pathlib

import tf_keras
from ai_edge_litert.interpreter import Interpreter

from qat.export.c_source import c_sources
from qat.export.containers import require_weight_storage
from qat.export.convert import IO_TYPES, convert
from qat.export.flatbuffer import to_bytes
from qat.export.graph import ExportError, Graph
from qat.export.micro import micro_check
from qat.export.target import LCE, find_target
from qat.files import write_together
from qat.integers import integer_mismatches
from qat.larq_file import runs_on_larq
from qat.tflite_file import read_file


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
    and the interpreter must accept it. LiteRT's knows no bit-packed convolutions: files with them
    are run by `verify_tflite`, through Larq's interpreter. For target "tflm", tflite-micro must run
    it too and compute what LiteRT's reference kernels do, bit for bit; C++ sources (.cc, .h) appear
    beside it.

    Args:
        model: quantized, and calibrated or trained.
        path: of the file to write; its folder must exist.
        target: "litert", the kernels of LiteRT and TensorFlow Lite; "tflm", tflite-micro's; or
            "lce", LiteRT's and Larq Compute Engine's bit-packed convolutions for 1-bit weights and
            activations.
        io: "float32", "int8" or "uint8" inputs and outputs.
        weight_storage: "size", the fewest bytes: INT2 up to 2 bits, INT4 up to 4; or "speed", int8
            for convolutions, which else unpack their kernels at every invocation, and INT4 for
            dense layers, which run quickest with it.

    Returns:
        The path.

    Raises:
        ExportError: illegal options, a model that cannot be exported, a folder that cannot be
            written, or a file that fails its check.
    """
    kernels = find_target(target)
    if io not in IO_TYPES:
        raise ExportError(f"unknown io {io!r}; legal: {', '.join(IO_TYPES)}")
    require_weight_storage(weight_storage)
    path = pathlib.Path(path)
    # 1. Constants and operators.
    graph, content = unchecked(model, target=target, io=io, weight_storage=weight_storage)
    files = {path: content}
    if kernels.arena:
        files |= c_sources(path, content, graph, micro_check(content))
    # 2. It gets its name once its integers and the interpreter are content.
    try:
        write_together(files, check=lambda written: _check(written, content, model))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    return path


def unchecked(
    model: tf_keras.Model, *, target: str, io: str, weight_storage: str
) -> tuple[Graph, bytes]:
    """The operators and bytes of the file that `export_tflite` checks and writes."""
    graph = convert(model, io=io, weight_storage=weight_storage, target=find_target(target))
    return graph, to_bytes(graph, description=f"qat: {model.name}", target=target)


def target_notes(model: tf_keras.Model, target: str) -> dict[str, str]:
    """{layer: what the target's own operators could not do for it}; only "lce" has any.

    Raises:
        ExportError: as `export_tflite`.
    """
    kernels = find_target(target)
    return convert(model, target=kernels).notes if kernels is LCE else {}


def _check(written: pathlib.Path, content: bytes, model: tf_keras.Model) -> None:
    file = read_file(written)
    mismatches = integer_mismatches(model, file)
    if mismatches:
        raise ExportError(
            f"the file is not the model, this is a bug in qat: {'; '.join(mismatches)}"
        )
    if runs_on_larq(file):
        return
    try:
        Interpreter(model_content=content).allocate_tensors()
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"LiteRT refuses the file, this is a bug in qat: {reason}") from error
