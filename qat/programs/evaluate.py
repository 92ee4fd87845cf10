"""Evaluates a .tflite file on a TFDS split: accuracy, latency, operators.

Example:
  qat-evaluate --tflite=runs/digits/model.tflite --dataset=digits --split=test

Files made elsewhere may take other inputs than pixels of 0-255: say --input_range=-1,1 then.
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
    flags.DEFINE_string("tflite", None, "The file.")
    flags.DEFINE_string("dataset", "digits", "TFDS name; 'digits' needs no network.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps prepared datasets.")
    flags.DEFINE_string("split", "test", "TFDS split, e.g. test or test[:1000].")
    flags.DEFINE_list("input_range", ["0", "255"], "What pixels 0 and 255 become for the file.")
    flags.DEFINE_integer("threads", None, "Of the interpreter; default: all.", lower_bound=1)
    flags.DEFINE_string("json", None, "Also write the result to this file.")
    flags.mark_flag_as_required("tflite")


def main() -> None:
    """Prints the result, and writes it if asked."""
    from qat.files import write_whole
    from qat.report import to_json
    from qat.verify.evaluate import evaluate_tflite

    if FLAGS.json and not pathlib.Path(FLAGS.json).absolute().parent.is_dir():
        raise UserError(f"--json={FLAGS.json}: its folder does not exist")
    result = evaluate_tflite(
        FLAGS.tflite,
        FLAGS.dataset,
        split=FLAGS.split,
        data_dir=FLAGS.data_dir,
        input_range=parse_range(FLAGS.input_range),
        threads=FLAGS.threads,
    )
    text = to_json(result)
    if FLAGS.json:
        write_whole(FLAGS.json, text)
    print(text.decode(), end="")


def parse_range(given: list[str]) -> tuple[float, float]:
    """lo,hi of --input_range. Raises UserError."""
    try:
        low, high = (float(part) for part in given)
    except ValueError:
        raise UserError(f"--input_range={','.join(given)}: give lo,hi, e.g. -1,1") from None
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--input_range={low},{high}: need finite lo below hi")
    return low, high


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
