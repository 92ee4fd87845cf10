"""Trains a CNN on a TFDS dataset, quantizes it, and exports a verified TFLite file.

Example:
  qat-train --dataset=digits --model=cnn5 --recipe=w8a8 --output_dir=runs/digits

The output folder receives float_model.keras, qat_model.keras, model.tflite, recipe.json,
report.json, report.md and TensorBoard events.
"""

from __future__ import annotations

import math
import pathlib

from absl import flags

from qat.errors import UserError
from qat.programs import program

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the program's flags."""
    string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    string("dataset", "digits", "TFDS name, e.g. fashion_mnist; 'digits' needs no network.")
    string("data_dir", None, "Where TFDS keeps prepared datasets; default: TFDS's own.")
    string("model", "cnn5", "An architecture of models/.")
    string("recipe", "w8a8", "w<W>a<A>[-<method>], e.g. w4a8, w1a1; or a recipe's JSON file.")
    string("float_model", None, "A trained float tf_keras model to start from.")
    integer("float_epochs", None, "Float training; default: a step budget.", lower_bound=0)
    integer("qat_epochs", None, "Quantized training; 0 = calibration only.", lower_bound=0)
    integer("batch_size", 64, "Examples a step, over all devices.", lower_bound=1)
    number("learning_rate", 1e-3, "Of the float training.", lower_bound=0.0)
    number("qat_learning_rate", None, "Default: what suits the recipe.", lower_bound=0.0)
    seed = "Of weights, data order and augmentation."
    integer("seed", 0, seed, lower_bound=0, upper_bound=2**32 - 1)
    string("output_dir", None, "Folder for everything that is written; made if missing.")
    flags.DEFINE_bool("resume", False, "Go on from the checkpoints in output_dir.")
    flags.DEFINE_bool("distill", None, "Learn from the float model; default: as suits the recipe.")
    flags.DEFINE_bool("jit_compile", False, "Compile the training step with XLA.")
    flags.DEFINE_bool("deterministic", False, "Only kernels that give the same result twice.")
    flags.DEFINE_bool("strict", False, "Exit with 2 if the file is not as a release must be.")
    flags.DEFINE_enum("distribution", "none", ["none", "mirrored", "multi_worker"], "Devices.")
    flags.DEFINE_enum("mixed_precision", "float32", ["float32"], "Type of the computation.")
    flags.DEFINE_enum("target", "litert", ["litert", "tflm", "lce"], "Kernels that will run it.")
    flags.DEFINE_enum("io", "float32", ["float32", "int8", "uint8"], "Inputs and outputs.")
    flags.DEFINE_enum("weight_storage", "size", ["size", "speed"], "Smallest, or int8 for speed.")
    integer("checkpoint_steps", None, "Also between epochs, every so many.", lower_bound=1)
    flags.DEFINE_list("profile_steps", None, "first,last steps for the TensorBoard profiler.")
    flags.mark_flag_as_required("output_dir")
    flags.register_validator("output_dir", bool, "give a folder, e.g. runs/first")
    for name in ("learning_rate", "qat_learning_rate"):
        flags.register_validator(name, _is_finite, "must be a finite number")


def main() -> int | None:
    """Runs the job that the flags describe; 2 if --strict found a breach."""
    from qat import devices, pipeline, recipe
    from qat.report import summary
    from qat.strict import require_strict

    devices.prepare(deterministic=FLAGS.deterministic, jit_compile=FLAGS.jit_compile)
    job = pipeline.Job(
        dataset=FLAGS.dataset,
        model=FLAGS.model,
        recipe=recipe.load_recipe(FLAGS.recipe),
        output_dir=pathlib.Path(FLAGS.output_dir),
        data_dir=FLAGS.data_dir,
        float_model=FLAGS.float_model,
        float_epochs=FLAGS.float_epochs,
        qat_epochs=FLAGS.qat_epochs,
        batch_size=FLAGS.batch_size,
        learning_rate=FLAGS.learning_rate,
        qat_learning_rate=FLAGS.qat_learning_rate,
        seed=FLAGS.seed,
        resume=FLAGS.resume,
        distill=FLAGS.distill,
        jit_compile=FLAGS.jit_compile,
        target=FLAGS.target,
        io=FLAGS.io,
        weight_storage=FLAGS.weight_storage,
        checkpoint_steps=FLAGS.checkpoint_steps,
        profile_steps=_profile_steps(FLAGS.profile_steps),
        strategy=devices.strategy(FLAGS.distribution),
    )
    report = pipeline.run(job)
    print(summary(report))
    if FLAGS.strict:
        require_strict(report)
    return None


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _profile_steps(given: list[str] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    numbers = [int(part) for part in given if part.isdigit()]
    if len(given) != 2 or len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
        raise UserError(f"--profile_steps={','.join(given)}: give first,last, e.g. 10,20")
    return numbers[0], numbers[1]


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
