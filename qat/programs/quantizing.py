"""The flags that all programs which quantize and train share."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from absl import flags

from qat.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the shared flags."""
    string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    string("data_dir", None, "Where TFDS keeps prepared datasets; default: TFDS's own.")
    string("recipe", "w8a8", "w<W>a<A>[-<method>], e.g. w4a8, w1a1; or a recipe's JSON file.")
    integer("qat_epochs", None, "Quantized training; 0 = calibration only.", lower_bound=0)
    integer("batch_size", 64, "Examples a step, over all devices.", lower_bound=1)
    number("qat_learning_rate", None, "Default: what suits the recipe.", lower_bound=0.0)
    seed = "Of weights, data order and augmentation."
    integer("seed", 0, seed, lower_bound=0, upper_bound=2**32 - 1)
    string("output_dir", None, "Folder for everything that is written; made if missing.")
    flags.DEFINE_bool("resume", False, "Go on from the checkpoints in output_dir.")
    flags.DEFINE_bool("distill", None, "Learn from the float model; default: as suits the recipe.")
    what = "Pixels that training images move by at most; default: as suits their size."
    integer("augment_shift", None, what, lower_bound=0)
    what = "Mirror training images; default: colour images whose classes have names of words."
    flags.DEFINE_bool("augment_flip", None, what)
    flags.DEFINE_bool("jit_compile", False, "Compile the training step with XLA.")
    flags.DEFINE_bool("deterministic", False, "Only kernels that give the same result twice.")
    flags.DEFINE_bool("strict", False, "Exit with 2 if the file is not as a release must be.")
    devices = ["none", "mirrored", "multi_worker", "tpu"]
    flags.DEFINE_enum("distribution", "none", devices, "One device, all GPUs, machines, a TPU.")
    precisions = ["float32", "bfloat16", "float16"]
    flags.DEFINE_enum("mixed_precision", "float32", precisions, "Type of the computation.")
    flags.DEFINE_enum("target", "litert", ["litert", "tflm", "lce"], "Kernels that will run it.")
    flags.DEFINE_enum("io", "float32", ["float32", "int8", "uint8"], "Inputs and outputs.")
    flags.DEFINE_enum("weight_storage", "size", ["size", "speed"], "Smallest, or int8 for speed.")
    integer("checkpoint_steps", None, "Also between epochs, every so many.", lower_bound=1)
    flags.DEFINE_list("profile_steps", None, "first,last steps for the TensorBoard profiler.")
    flags.mark_flag_as_required("output_dir")
    flags.register_validator("output_dir", bool, "give a folder, e.g. runs/first")
    finite("qat_learning_rate")


def finite(name: str) -> None:
    """Refuses NaN and infinity for a flag."""
    flags.register_validator(name, _is_finite, "must be a finite number")


def job_fields() -> dict[str, Any]:
    """The fields of `qat.job.QatJob` that the flags give; prepares TensorFlow for them."""
    from qat import devices, recipe

    devices.prepare(deterministic=FLAGS.deterministic, jit_compile=FLAGS.jit_compile)
    return {
        "recipe": recipe.load_recipe(FLAGS.recipe),
        "output_dir": pathlib.Path(FLAGS.output_dir),
        "data_dir": FLAGS.data_dir,
        "qat_epochs": FLAGS.qat_epochs,
        "batch_size": FLAGS.batch_size,
        "qat_learning_rate": FLAGS.qat_learning_rate,
        "seed": FLAGS.seed,
        "resume": FLAGS.resume,
        "distill": FLAGS.distill,
        "augment_shift": FLAGS.augment_shift,
        "augment_flip": FLAGS.augment_flip,
        "jit_compile": FLAGS.jit_compile,
        "mixed_precision": FLAGS.mixed_precision,
        "target": FLAGS.target,
        "io": FLAGS.io,
        "weight_storage": FLAGS.weight_storage,
        "checkpoint_steps": FLAGS.checkpoint_steps,
        "profile_steps": _profile_steps(FLAGS.profile_steps),
        "strategy": devices.strategy(FLAGS.distribution),
    }


def finish(report: dict[str, Any] | None) -> None:
    """Prints the report's summary; with --strict, refuses what a release must not have."""
    from qat.report import summary
    from qat.strict import require_strict

    if report is None:  # the chief has it
        return
    print(summary(report))
    if FLAGS.strict:
        require_strict(report)


def _is_finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _profile_steps(given: list[str] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    numbers = [int(part) for part in given if part.isdigit()]
    if len(given) != 2 or len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
        raise UserError(f"--profile_steps={','.join(given)}: give first,last, e.g. 10,20")
    return numbers[0], numbers[1]
