"""Measures our recipes side by side with other libraries: same float network, data and epochs.

Example:
  qat-benchmark --dataset=fashion_mnist --model=cnn5 --seeds=0,1,2 --output_dir=runs/benchmark

The output folder keeps each finished run: the same command goes on where it was cut off, and the
same command in several processes at once shares the runs out among them. Tune with
--split=validation; read test once. A recipe may carry settings of its own, which are then part of
its name: --recipes="w2a2,w2a2:distill=false;learning_rate=0.001".
"""

from __future__ import annotations

import math
import pathlib
import shlex
import sys

from absl import flags

from qat.errors import UserError
from qat.programs import program

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the program's flags."""
    from qat.benchmark.plan import ENVIRONMENT, PEERS, SPLITS

    string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    flags.DEFINE_enum("suite", "accuracy", ["accuracy"], "What is measured.")
    string("dataset", "digits", "TFDS name, e.g. fashion_mnist; 'digits' needs no network.")
    string("data_dir", None, "Where TFDS keeps prepared datasets; default: TFDS's own.")
    string("model", "cnn5", "An architecture of models/.")
    recipes = ["w8a8", "w4a8", "w4a4", "w2a8", "wta8", "w2a2", "w1a1"]
    flags.DEFINE_list("recipes", recipes, "Ours; each RECIPE or RECIPE:setting=value;….")
    flags.DEFINE_list("peers", ["tfmot"], f"Other libraries, of {', '.join(PEERS)}.")
    string("peer_python", None, f"Python that has qkeras and larq. To make one: {ENVIRONMENT}")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Each trains a float network of its own.")
    integer("float_epochs", 5, "Of the float network all others start from.", lower_bound=0)
    integer("epochs", 3, "More epochs, of every recipe, peer and float.", lower_bound=0)
    integer("binary_epochs", 9, "Instead of --epochs for 1-bit networks.", lower_bound=0)
    integer("batch_size", 64, "Examples a step.", lower_bound=1)
    number("learning_rate", 1e-3, "Of float training and 1-bit peers.", lower_bound=0.0)
    number("qat_learning_rate", 3e-4, "Of the peers and of float's --epochs.", lower_bound=0.0)
    flags.DEFINE_enum("split", "test", list(SPLITS), "What accuracy is measured on.")
    string("output_dir", None, "Folder for everything that is written; made if missing.")
    string("json", None, "The result as JSON; default: accuracy.json in output_dir.")
    flags.mark_flag_as_required("output_dir")
    flags.register_validator("output_dir", bool, "give a folder, e.g. runs/benchmark")
    for name in ("learning_rate", "qat_learning_rate"):
        flags.register_validator(name, math.isfinite, "must be a finite number")


def main() -> None:
    """Runs what is not done yet, and writes the table, the plot and the JSON."""
    from qat import devices
    from qat.benchmark import accuracy
    from qat.benchmark.plan import Plan, Terms

    plan = Plan(
        terms=Terms(
            dataset=FLAGS.dataset,
            model=FLAGS.model,
            float_epochs=FLAGS.float_epochs,
            batch_size=FLAGS.batch_size,
            learning_rate=FLAGS.learning_rate,
            qat_learning_rate=FLAGS.qat_learning_rate,
        ),
        output_dir=pathlib.Path(FLAGS.output_dir),
        recipes=tuple(FLAGS.recipes),
        peers=tuple(FLAGS.peers),
        seeds=_seeds(FLAGS.seeds),
        epochs=FLAGS.epochs,
        binary_epochs=FLAGS.binary_epochs,
        split=FLAGS.split,
        data_dir=FLAGS.data_dir,
        peer_python=FLAGS.peer_python,
        json=pathlib.Path(FLAGS.json) if FLAGS.json else None,
        command=shlex.join(["qat-benchmark", *sys.argv[1:]]),
    )
    devices.prepare(deterministic=False, jit_compile=False)
    accuracy.run(plan)


def _seeds(given: list[str]) -> tuple[int, ...]:
    if not given or not all(part.isdecimal() and int(part) < 2**32 for part in given):
        raise UserError(f"--seeds={','.join(given)}: give whole numbers, e.g. 0,1,2")
    return tuple(map(int, given))


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
