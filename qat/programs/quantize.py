"""Quantizes an existing Keras model and exports a verified TFLite file.

Examples:
  qat-quantize --model_path=model.keras --dataset=digits --output_dir=runs/model
  qat-quantize --model_path=model.h5 --calibration_data=examples.npz --qat_epochs=0 \\
      --output_dir=runs/model

The .npz holds x (or one array for each input, by its name) and, for training, y (or one for each
output). A fifth of its examples is held out for the report. Without y, --qat_epochs=N trains the
quantized model to give what the float model gives.

The output folder receives qat_model.keras, model.tflite, recipe.json, run.json, report.json,
report.md and TensorBoard events.
"""

from __future__ import annotations

from absl import flags

from qat.programs import program, quantizing

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the program's flags."""
    quantizing.define_flags()
    string = flags.DEFINE_string
    string("model_path", None, "A .keras, .h5 or SavedModel of Keras 2 or 3.")
    string("dataset", None, "TFDS name of images to calibrate, train and evaluate with.")
    string("calibration_data", None, "An .npz file, instead of --dataset.")
    flags.DEFINE_list(
        "input_range",
        None,
        "lo,hi: what pixels 0 and 255 of --dataset become for the model (default 0,255), or the "
        "range of x in --calibration_data (default: observed).",
    )
    flags.DEFINE_list(
        "loss", [], "Keras loss, or one for each output; default: cross-entropy on labels."
    )
    flags.DEFINE_list("custom_objects", [], "module:NAME of layers that are not Keras's own.")
    flags.DEFINE_bool(
        "allow_unsafe_deserialization", False, "Run code that the model file brings along."
    )
    flags.mark_flag_as_required("model_path")


def main() -> None:
    """Runs the job that the flags describe."""
    from qat import existing
    from qat.loading import parse_custom_objects
    from qat.programs.evaluate import parse_range

    job = existing.QuantizeJob(
        model_path=FLAGS.model_path,
        dataset=FLAGS.dataset,
        calibration_data=FLAGS.calibration_data,
        input_range=None if FLAGS.input_range is None else parse_range(FLAGS.input_range),
        loss=tuple(FLAGS.loss),
        custom_objects=parse_custom_objects(FLAGS.custom_objects),
        allow_unsafe_deserialization=FLAGS.allow_unsafe_deserialization,
        **quantizing.job_fields(),
    )
    quantizing.finish(existing.run(job))


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
