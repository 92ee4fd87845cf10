"""Trains a CNN on a TFDS dataset, quantizes it, and exports a verified TFLite file.

Example:
  qat-train --dataset=digits --model=cnn5 --recipe=w8a8 --output_dir=runs/digits

The output folder receives float_model.keras, qat_model.keras, model.tflite, recipe.json,
run.json, report.json, report.md and TensorBoard events.
"""

from __future__ import annotations

from absl import flags

from qat.errors import UserError
from qat.programs import program, quantizing

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the program's flags."""
    quantizing.define_flags()
    flags.DEFINE_string(
        "dataset", "digits", "TFDS name, e.g. fashion_mnist; 'digits' needs no network."
    )
    flags.DEFINE_string("model", "cnn5", "An architecture of models/, e.g. cnn5 or cnn5:width=0.5.")
    flags.DEFINE_string("float_model", None, "A trained float tf_keras model to start from.")
    flags.DEFINE_integer(
        "float_epochs", None, "Float training; default: a step budget.", lower_bound=0
    )
    flags.DEFINE_float("learning_rate", 1e-3, "Of the float training.", lower_bound=0.0)
    quantizing.finite("learning_rate")


def main() -> None:
    """Runs the job that the flags describe."""
    from qat import pipeline

    _require_float_training()
    job = pipeline.Job(
        dataset=FLAGS.dataset,
        model=FLAGS.model,
        float_model=FLAGS.float_model,
        float_epochs=FLAGS.float_epochs,
        learning_rate=FLAGS.learning_rate,
        **quantizing.job_fields(),
    )
    quantizing.finish(pipeline.run(job))


def _require_float_training() -> None:
    if FLAGS.float_model is None:
        return
    for name, given in (
        ("float_epochs", FLAGS.float_epochs),
        ("learning_rate", FLAGS["learning_rate"].present),
    ):
        if given:
            raise UserError(
                f"--{name} is of the float training, which --float_model={FLAGS.float_model} "
                "leaves out; for the quantized one there are --qat_epochs and --qat_learning_rate"
            )


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
