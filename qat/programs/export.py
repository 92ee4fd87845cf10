"""Exports a quantized model (qat_model.keras of a training run) as a TFLite file.

Example:
  qat-export --qat_model=runs/digits/qat_model.keras --output=model.tflite --io=uint8
"""

from __future__ import annotations

import os
import pathlib

from absl import flags

from qat.errors import UserError
from qat.programs import program

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the program's flags."""
    flags.DEFINE_string("qat_model", None, "qat_model.keras, as qat-train writes it.")
    flags.DEFINE_string("output", None, "The .tflite file to write.")
    flags.DEFINE_enum("target", "litert", ["litert", "tflm", "lce"], "Kernels that will run it.")
    flags.DEFINE_enum("io", "float32", ["float32", "int8", "uint8"], "Inputs and outputs.")
    flags.DEFINE_enum("weight_storage", "size", ["size", "speed"], "Smallest, or int8 for speed.")
    flags.mark_flags_as_required(["qat_model", "output"])


def main() -> None:
    """Loads the model, writes the file, prints what it holds."""
    from qat.export.micro import arena_bytes
    from qat.export.target import find_target
    from qat.export.tflite import export_tflite, target_notes
    from qat.larq_file import runs_on_larq
    from qat.saving import load_quantized_model
    from qat.tflite_file import read_file
    from qat.verify import larq

    if pathlib.Path(FLAGS.output).resolve() == pathlib.Path(FLAGS.qat_model).resolve():
        raise UserError(f"--output={FLAGS.output} is the --qat_model itself; give another name")
    model = load_quantized_model(FLAGS.qat_model)
    path = export_tflite(
        model,
        FLAGS.output,
        target=FLAGS.target,
        io=FLAGS.io,
        weight_storage=FLAGS.weight_storage,
    )
    file = read_file(path)
    operators = ", ".join(f"{name} x {n}" for name, n in file.operator_counts().items())
    for layer, note in target_notes(model, FLAGS.target).items():
        print(f"{layer}: {note}")
    if larq.VARIABLE in os.environ:
        larq.open_runner(path)
    elif runs_on_larq(file):
        print(f"not loaded by Larq's interpreter; to check that: {larq.ENVIRONMENT}")
    print(f"{path}: {path.stat().st_size} bytes, weights {file.weight_bytes()}; {operators}")
    if find_target(FLAGS.target).arena:
        print(f"arena of tflite-micro: {arena_bytes(path)} bytes, also in {path.with_suffix('.h')}")


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
