"""Measures our recipes side by side with other libraries: same float network, data and epochs.

Examples:
  qat-benchmark --dataset=fashion_mnist --model=cnn5 --seeds=0,1,2 --output_dir=runs/benchmark
  qat-benchmark --suite=export --target=litert --output_dir=runs/widths
  qat-benchmark --suite=architectures --output_dir=runs/architectures
  qat-benchmark --suite=step_time --output_dir=runs/step_time

--suite=export trains every width of weights with every width of activations a little, and checks
the file of each; it ends with an error if a pair failed. --suite=architectures takes every stock
network of Keras 2 and Keras 3, untrained, from float model to checked file; --architectures
chooses some. --suite=step_time takes steps of float, ours and TFMOT in turns, and their memory;
--model may name several, e.g. resnet20,cnn5.

The output folder keeps each finished run: the same command goes on where it was cut off, and the
same command in several processes at once shares the runs out among them. Tune with
--split=validation; read test once. A recipe may carry settings of its own, which are then part of
its name: --recipes="w2a2,w2a2:distill=false;learning_rate=0.001"; one with commas stands in double
quotes: --recipes='w2a2,"w2a2:gradual_bits=[[4,0.34]]"'.
"""

from __future__ import annotations

import math
import pathlib
import shlex
import sys
from typing import Any

from absl import flags

from qat.errors import UserError
from qat.programs import program

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the program's flags."""
    from qat.benchmark.plan import ENVIRONMENT, PEERS, SPLITS
    from qat.export.containers import WEIGHT_STORAGES
    from qat.export.target import TARGETS

    string, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    flags.DEFINE_enum("suite", "accuracy", list(_SUITES), "What is measured.")
    string("dataset", "digits", "TFDS name, e.g. fashion_mnist; 'digits' needs no network.")
    string("data_dir", None, "Where TFDS keeps prepared datasets; default: TFDS's own.")
    what = "An architecture of models/; default: cnn5, for export a small one of all operators."
    string("model", None, what)
    what = "Ours; each RECIPE or, for accuracy, RECIPE:setting=value;…. Default: "
    what += f"{','.join(_RECIPES)}; for export all pairs of widths."
    flags.DEFINE_list("recipes", None, what)
    flags.DEFINE_list("peers", ["tfmot"], f"Other libraries, of {', '.join(PEERS)}.")
    string("peer_python", None, f"Python that has qkeras and larq. To make one: {ENVIRONMENT}")
    what = "Each trains a float network of its own. Default: 0,1,2; export takes one, 0."
    flags.DEFINE_list("seeds", None, what)
    what = "Of the float network all others start from. Default: 5; export 20."
    integer("float_epochs", None, what, lower_bound=0)
    what = "More epochs, of every recipe, peer and float. Default: 3; export 1."
    integer("epochs", None, what, lower_bound=0)
    integer("binary_epochs", 9, "Instead of --epochs for 1-bit networks.", lower_bound=0)
    integer("batch_size", 64, "Examples a step.", lower_bound=1)
    what = "Of float training from scratch, and of 1-bit peers."
    number("learning_rate", 1e-3, what, lower_bound=0.0)
    what = "Of float training's --epochs, and of all other peers; ours have their recipe's."
    number("qat_learning_rate", 4e-3, what, lower_bound=0.0)
    flags.DEFINE_enum("split", "test", list(SPLITS), "What accuracy is measured on.")
    flags.DEFINE_enum("target", "litert", list(TARGETS), "Of export: what will run the files.")
    storages = list(WEIGHT_STORAGES)
    flags.DEFINE_enum("weight_storage", "size", storages, "Of export: how kernels are stored.")
    names = "Of architectures: e.g. tf_keras.MobileNetV2,keras.ResNet50. Default: all."
    flags.DEFINE_list("architectures", [], names)
    sizes = "Of step_time: examples a step, each measured."
    flags.DEFINE_list("batch_sizes", ["128"], sizes)
    flags.DEFINE_list("modes", ["graph"], "Of step_time: graph, xla, bfloat16.")
    integer("rounds", 15, "Of step_time: steps of each network.", lower_bound=1)
    string("output_dir", None, "Folder for everything that is written; made if missing.")
    string("json", None, "The result as JSON; default: in output_dir.")
    flags.mark_flag_as_required("output_dir")
    flags.register_validator("output_dir", bool, "give a folder, e.g. runs/benchmark")
    for name in ("learning_rate", "qat_learning_rate"):
        flags.register_validator(name, math.isfinite, "must be a finite number")


def main() -> None:
    """Runs what is not done yet, and writes the table and the JSON, and of accuracy the plot."""
    from qat import devices

    for name in _NOT_OF[FLAGS.suite]:
        if FLAGS[name].present:
            raise UserError(f"--{name} is no flag of --suite={FLAGS.suite}; leave it out")
    devices.prepare(deterministic=False, jit_compile=False)
    _SUITES[FLAGS.suite]()


def _accuracy() -> None:
    from qat.benchmark import accuracy
    from qat.benchmark.plan import Plan

    plan = Plan(
        **_common(model="cnn5", float_epochs=5),
        recipes=tuple(_given("recipes", _RECIPES)),
        peers=tuple(FLAGS.peers),
        seeds=_seeds(_given("seeds", ["0", "1", "2"])),
        epochs=_given("epochs", 3),
        binary_epochs=FLAGS.binary_epochs,
        split=FLAGS.split,
        peer_python=FLAGS.peer_python,
    )
    accuracy.run(plan)


def _export() -> None:
    from qat.benchmark import every_operator, export

    seeds = _seeds(_given("seeds", ["0"]))
    if len(seeds) > 1:
        raise UserError(f"--seeds={','.join(FLAGS.seeds)}: --suite=export takes one seed")
    plan = export.ExportPlan(
        **_common(model=every_operator.NAME, float_epochs=20),
        recipes=tuple(_given("recipes", export.ALL_PAIRS)),
        seed=seeds[0],
        epochs=_given("epochs", 1),
        target=FLAGS.target,
        weight_storage=FLAGS.weight_storage,
    )
    export.run(plan)


def _architectures() -> None:
    from qat.benchmark import architectures

    recipes, seeds = _given("recipes", ["w8a8"]), _seeds(_given("seeds", ["0"]))
    if len(recipes) > 1 or len(seeds) > 1:
        raise UserError("--suite=architectures takes one of --recipes and one of --seeds")
    architectures.run(pathlib.Path(FLAGS.output_dir), FLAGS.architectures, recipes[0], seeds[0])


def _step_time() -> None:
    from qat.benchmark import step_time

    sizes = FLAGS.batch_sizes
    if not sizes or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--batch_sizes={','.join(sizes)}: give whole numbers, e.g. 32,128")
    step_time.run(
        step_time.StepTimePlan(
            models=_given("model", "resnet20,mobilenet_v2,cnn5").split(","),
            recipes=_given("recipes", ["w8a8", "w4a4-lsq", "w2a2-lsq", "w1a1"]),
            batch_sizes=[int(size) for size in sizes],
            modes=FLAGS.modes,
            rounds=FLAGS.rounds,
            peers=FLAGS.peers,
            output_dir=pathlib.Path(FLAGS.output_dir),
            json=pathlib.Path(FLAGS.json) if FLAGS.json else None,
            command=_command(),
        )
    )


def _command() -> str:
    return shlex.join(["qat-benchmark", *sys.argv[1:]])


def _common(*, model: str, float_epochs: int) -> dict[str, Any]:
    """What plans share, with a suite's own defaults."""
    from qat.benchmark.plan import Terms

    terms = Terms(
        dataset=FLAGS.dataset,
        model=_given("model", model),
        float_epochs=_given("float_epochs", float_epochs),
        batch_size=FLAGS.batch_size,
        learning_rate=FLAGS.learning_rate,
        qat_learning_rate=FLAGS.qat_learning_rate,
    )
    return {
        "terms": terms,
        "output_dir": pathlib.Path(FLAGS.output_dir),
        "data_dir": FLAGS.data_dir,
        "json": pathlib.Path(FLAGS.json) if FLAGS.json else None,
        "command": _command(),
    }


def _given(name: str, default: Any) -> Any:
    value = getattr(FLAGS, name)
    return default if value is None else value


_RECIPES = ("w8a8", "w4a8", "w4a4", "w2a8", "wta8", "w2a2", "w1a1")
_SUITES = {
    "accuracy": _accuracy,
    "export": _export,
    "architectures": _architectures,
    "step_time": _step_time,
}
# What a suite would ignore.
_OF_STEP_TIME = ("batch_sizes", "modes", "rounds")
_OF_TRAINING = ("dataset", "data_dir", "peer_python", "float_epochs", "epochs", "binary_epochs")
_OF_TRAINING += ("batch_size", "learning_rate", "qat_learning_rate", "split")
_NOT_OF = {
    "accuracy": ("target", "weight_storage", "architectures", *_OF_STEP_TIME),
    "export": ("peers", "peer_python", "split", "binary_epochs", "qat_learning_rate")
    + ("architectures", *_OF_STEP_TIME),
    "architectures": ("model", "peers", "target", "weight_storage", "json")
    + (*_OF_TRAINING, *_OF_STEP_TIME),
    "step_time": ("target", "weight_storage", "architectures", "seeds", *_OF_TRAINING),
}


def _seeds(given: list[str]) -> tuple[int, ...]:
    if not given or not all(part.isdecimal() and int(part) < 2**32 for part in given):
        raise UserError(f"--seeds={','.join(given)}: give whole numbers, e.g. 0,1,2")
    return tuple(map(int, given))


def run() -> None:
    """Entry point."""
    define_flags()
    program.run(main, __doc__)
