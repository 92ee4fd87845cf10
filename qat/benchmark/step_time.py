"""Time and memory of a training step: float, our recipes and TFMOT side by side.

All networks of one setting live in one process and take turns, a step each, in an order that
rotates: what else the machine does falls on all alike. A ratio is that of a round, to the float
step of the same round. Time on the clock is what a user waits; the processor time of all threads
beside it depends less on who else uses the machine (of a GPU's work it sees nothing). Peak memory
needs a process for each network, and several, since it depends on the order in which TensorFlow's
threads run. Inputs are random numbers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

import models
from qat.apply import quantize_model
from qat.benchmark import tfmot
from qat.benchmark.step_time_table import step_time_png, table
from qat.calibrate import calibrate
from qat.errors import QatError, UserError
from qat.export.tflite import export_tflite
from qat.files import write_whole
from qat.float_model import require_model
from qat.machine import machine, versions
from qat.precision import in_precision
from qat.report import to_json
from qat.settle import settle_biases

FLOAT, PEER = "float", "tfmot"
MODES = ("graph", "xla", "bfloat16")
CLASSES = 10
WARM_UP = 2
MEMORY_PROCESSES = 5
# The address space of a process that has trained stays large; each network gets a fresh one.
_FRESH = {"max_workers": 1, "mp_context": multiprocessing.get_context("spawn")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the networks of one comparison share.

    Attributes:
        model: of `models.MODELS`. side: pixels of the square images, of 3 channels.
        mode: "graph", "xla" (the whole step compiled) or "bfloat16" (mixed precision).
    """

    model: str
    batch_size: int
    mode: str = "graph"
    side: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimePlan:
    """Everything that is measured: all models × batch sizes × modes."""

    models: Sequence[str]
    recipes: Sequence[str]
    batch_sizes: Sequence[int]
    modes: Sequence[str]
    rounds: int
    peers: Sequence[str]
    output_dir: pathlib.Path
    json: pathlib.Path | None
    command: str

    def settings(self) -> list[Setting]:
        return [
            Setting(model=model, batch_size=size, mode=mode)
            for model in self.models
            for size in self.batch_sizes
            for mode in self.modes
        ]

    def networks(self) -> list[str]:
        return [FLOAT, *self.recipes, *self.peers]


def run(plan: StepTimePlan) -> dict[str, Any]:
    """Measures, prints and writes step_time.json, .md and, with matplotlib, .png.

    Raises:
        UserError: an unknown model or mode; at the end, a network of ours that failed.
    """
    if not (plan.models and plan.batch_sizes and plan.modes):
        raise UserError("nothing to measure: --model, --batch_sizes and --modes need a value each")
    for model in plan.models:
        require_model(model)
    for kind, given, legal in (
        ("mode", plan.modes, MODES),
        ("peer", plan.peers, (PEER,)),
    ):
        unknown = sorted(set(given) - set(legal))
        if unknown:
            raise UserError(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(legal)}")
    rows: list[dict[str, Any]] = []
    for setting in plan.settings():
        measured = _in_fresh_process(measure, setting, plan.networks(), plan.rounds)
        rows += measured
        _write(plan, rows)
        for row in measured:
            if row["error"] is None:
                row["peak_bytes"] = median_peak(setting, row["network"])
        print(table(measured), flush=True)
        result = _write(plan, rows)
    failed = [f"{r['network']} of {r['model']}: {r['error']}" for r in rows if r["error"]]
    ours = [text for text in failed if not text.startswith(PEER)]
    if ours:
        raise UserError(f"{len(ours)} failed: {'; '.join(ours)}")
    return result


def _write(plan: StepTimePlan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Files of what is measured so far."""
    about = f"{machine()}; {plan.rounds} rounds; random inputs; {plan.command}"
    result = {"about": about, "versions": versions(), "rows": rows}
    folder = plan.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(plan.json or folder / "step_time.json", to_json(result))
    write_whole(folder / "step_time.md", f"{about}\n\n{table(rows)}".encode())
    picture = step_time_png(rows, about)
    if picture is not None:
        write_whole(folder / "step_time.png", picture)
    return result


def _in_fresh_process(function: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    with concurrent.futures.ProcessPoolExecutor(**_FRESH) as pool:
        try:
            return pool.submit(function, setting, *args).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process that measured {setting.model} with batches of {setting.batch_size} "
                "was killed, by memory perhaps; give smaller --batch_sizes"
            ) from None


def measure(setting: Setting, networks: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each network: seconds of each round's step (clock, processor), building, export."""
    rows = {name: _row(setting, name) for name in networks}
    steps: dict[str, Callable[[], None]] = {}
    for name, row in rows.items():
        try:
            model = _built(setting, name, row)
            steps[name] = _step(setting, model, row)
            if name not in (FLOAT, PEER):
                row["export_seconds"] = _export_seconds(model)
        except (QatError, tf.errors.OpError, TypeError, ValueError) as error:
            row["error"] = " ".join(str(error).split())[:300]
    for turn in range(rounds):
        for name in _rotated(list(steps), turn):
            started, computing = time.perf_counter(), time.process_time()
            steps[name]()
            rows[name]["cpu_seconds"].append(round(time.process_time() - computing, 5))
            rows[name]["step_seconds"].append(round(time.perf_counter() - started, 5))
    return list(rows.values())


def median_peak(setting: Setting, network: str) -> int:
    """Bytes: the median of several processes' peaks."""
    arguments = (peak_memory, setting, network)
    peaks = [_in_fresh_process(*arguments) for _ in range(MEMORY_PROCESSES)]
    return int(statistics.median(peaks))


def peak_memory(setting: Setting, network: str) -> int:
    """Bytes that this process held at most, after a few steps of one network."""
    step = _step(setting, _built(setting, network, {}), {})
    for _ in range(2):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _row(setting: Setting, network: str) -> dict[str, Any]:
    row = {"network": network, **dataclasses.asdict(setting), "error": None}
    row |= {"step_seconds": [], "cpu_seconds": []}
    return row | {"export_seconds": None, "peak_bytes": None}


def _rotated(names: list[str], turn: int) -> list[str]:
    start = turn % max(1, len(names))
    return names[start:] + names[:start]


def _built(setting: Setting, network: str, row: dict[str, Any]) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    model = models.build(setting.model, (setting.side, setting.side, 3), CLASSES)
    started = time.perf_counter()
    if network == PEER:
        model = tfmot.quantized(tfmot.without_rescaling(model)[0], "w8a8")
    elif network != FLOAT:
        model = quantize_model(model, network)
        row["build_seconds"] = round(time.perf_counter() - started, 2)
        images, _ = _batch(dataclasses.replace(setting, batch_size=8))
        calibrate(model, tf.data.Dataset.from_tensors(images), steps=1)
        settle_biases(model)
    row.setdefault("build_seconds", round(time.perf_counter() - started, 2))
    return in_precision(model, "bfloat16" if setting.mode == "bfloat16" else "float32")


def _step(setting: Setting, model: tf_keras.Model, row: dict[str, Any]) -> Callable[[], None]:
    """A training step, traced and warm."""
    model.compile(
        tf_keras.optimizers.SGD(1e-3, momentum=0.9),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=setting.mode == "xla",
    )
    train = model.make_train_function()
    batches: Iterator = iter(tf.data.Dataset.from_tensors(_batch(setting)).repeat())
    started = time.perf_counter()
    train(batches)
    row["trace_seconds"] = round(time.perf_counter() - started, 2)
    for _ in range(WARM_UP - 1):
        train(batches)
    gc.collect()
    return lambda: float(train(batches)["loss"])


def _batch(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (setting.batch_size, setting.side, setting.side, 3)
    images = rng.uniform(0, 255, shape).astype(np.float32)
    return images, rng.integers(0, CLASSES, setting.batch_size)


def _export_seconds(model: tf_keras.Model) -> float:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settle_biases(model)
        export_tflite(model, pathlib.Path(folder, "model.tflite"))
    return round(time.perf_counter() - started, 2)
