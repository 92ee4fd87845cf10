"""Every stock architecture of Keras 2 and Keras 3, from float model to verified file.

Random weights, batch normalization statistics from random images, the smallest input that the
architecture takes: calibrated, trained one step, exported, verified.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import json
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.apply import quantize_model
from qat.calibrate import calibrate
from qat.errors import UserError
from qat.export.tflite import export_tflite
from qat.files import write_whole
from qat.loading import load_model
from qat.machine import machine
from qat.objective import objective
from qat.reestimate import reestimate_batch_norm
from qat.report import counted, to_json
from qat.settle import settle_biases
from qat.verify.compare import verify_tflite

CLASSES, EXAMPLES = 10, 8
SIDES = (32, 48, 64, 75, 96, 128, 224, 331)
# A process that has built a few networks gives their memory back by ending.
TASKS_PER_PROCESS = 6


def constructors() -> dict[str, Callable[..., Any]]:
    """{"tf_keras.ResNet50" or "keras.ResNet50": function} of all stock architectures."""
    import keras

    return {
        f"{package.__name__}.{name}": function
        for package in (tf_keras, keras)
        for name, function in inspect.getmembers(package.applications, inspect.isfunction)
    }


def run(folder: pathlib.Path, names: Sequence[str], recipe: str, seed: int) -> None:
    """Measures what the folder does not hold yet; writes the table of all that it holds.

    Args:
        names: of `constructors()`; nothing = all.

    Raises:
        UserError: an unknown name; at the end, architectures that failed.
    """
    known = constructors()
    names = list(names) or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"unknown architectures: {', '.join(unknown)}; e.g. {', '.join(known)}")
    runs = folder / f"{recipe}-seed{seed}"
    paths = {name: runs / f"{name}.json" for name in names}
    missing = [name for name in names if not _is_measured(paths[name])]
    runs.mkdir(parents=True, exist_ok=True)
    while missing:
        missing = _measure_in_processes(missing, paths, recipe, seed)
    rows = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    about = f"{recipe}, seed {seed}; {machine()}"
    write_whole(folder / "architectures.json", to_json({"about": about, "rows": rows}))
    write_whole(folder / "architectures.md", f"{about}\n\n{table(rows)}".encode())
    failed = [row["name"] for row in rows if row["error"] or not row["integers_match"]]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")


def _is_measured(path: pathlib.Path) -> bool:
    return path.exists() and json.loads(path.read_text())["error"] is None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row for each architecture."""
    lines = [
        "| architecture | input | parameters | integers | float operators | output, dB | file, MB "
        "| seconds: quantize, all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["error"]:
            lines.append(f"| {row['name']} | | | | | | | {row['error']} |")
            continue
        snr = "equal" if row["output_snr_db"] is None else f"{row['output_snr_db']:.0f}"
        lines.append(
            f"| {row['name']} | {row['side']} | {row['parameters']:,} | "
            f"{'match' if row['integers_match'] else 'DIFFER'} | "
            f"{counted(row['float_operators'])} | {snr} | {row['bytes'] / 1e6:.1f} | "
            f"{row['seconds']['quantize']:.0f}, {sum(row['seconds'].values()):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _measure_in_processes(
    names: list[str], paths: dict[str, pathlib.Path], recipe: str, seed: int
) -> list[str]:
    """Returns what is left after a process died of one of them."""
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=TASKS_PER_PROCESS,
    )
    with pool:
        for index, name in enumerate(names):
            died = False
            try:
                row = pool.submit(measure, name, recipe, seed).result()
            except BrokenProcessPool:
                died = True
                row = {"name": name, "error": "its process was killed, by memory perhaps"}
            write_whole(paths[name], to_json(row))
            print(table([row]).splitlines()[-1], flush=True)
            if died:
                return names[index + 1 :]
    return []


def measure(name: str, recipe: str, seed: int) -> dict[str, Any]:
    """One row; `error` is None where all went well."""
    tf_keras.utils.set_random_seed(seed)
    tf_keras.backend.clear_session()
    seconds: dict[str, float] = {}
    try:
        found = _measured(name, recipe, seed, seconds)
    except Exception as error:  # a row like others: the table is where such a bug shows
        lines = str(error).splitlines() or [""]
        return {"name": name, "error": f"{type(error).__name__}: {lines[0]}"}
    return {"name": name, "error": None, "recipe": recipe, "seed": seed, **found}


def _measured(name: str, recipe: str, seed: int, seconds: dict[str, float]) -> dict[str, Any]:
    started = time.monotonic()

    def took(step: str) -> None:
        nonlocal started
        now = time.monotonic()
        seconds[step], started = round(now - started, 2), now

    made, side = smallest(constructors()[name])
    took("build")
    model = load_model(made)
    images, labels = _data(side, seed)
    # Statistics of random weights: what matters is that they fit these images.
    reestimate_batch_norm(model, tf.data.Dataset.from_tensors(images), fewest=EXAMPLES)
    took("load")
    quantized = quantize_model(model, recipe)
    took("quantize")
    calibrate(quantized, tf.data.Dataset.from_tensors(images), steps=1)
    took("calibrate")
    (loss,) = objective(model, ["sparse_categorical_crossentropy"]).losses()
    value, gradients_finite = _train_step(quantized, loss, images, labels)
    settle_biases(quantized)
    took("train")
    with tempfile.TemporaryDirectory() as folder:
        path = export_tflite(quantized, pathlib.Path(folder, "model.tflite"))
        took("export")
        verified = verify_tflite(path, quantized, tf.data.Dataset.from_tensors(images[:4]))
    took("verify")
    finite = np.isfinite(verified.output_snr_db)
    return {
        "side": side,
        "parameters": int(model.count_params()),
        "loss": value,
        "gradients_finite": gradients_finite,
        "integers_match": verified.integers_match,
        "float_operators": verified.float_operators,
        "output_snr_db": round(verified.output_snr_db, 1) if finite else None,
        "max_output_difference_lsb": verified.max_output_difference_lsb,
        "bytes": verified.bytes,
        "seconds": seconds,
    }


def _train_step(
    model: tf_keras.Model, loss: Callable[..., tf.Tensor], images: np.ndarray, labels: np.ndarray
) -> tuple[float, bool]:
    """(the loss before the step, whether all gradients were finite); one step of SGD.

    Without a graph, which takes seventeen times as long to trace (EfficientNetB0). Gradients of
    an untrained network of hundreds of layers explode: they are cut, and those that leave float32
    stay out.
    """
    with tf.GradientTape() as tape:
        value = tf.reduce_mean(loss(labels, model(images, training=True)))
    gradients = tape.gradient(value, model.trainable_variables)
    pairs = [
        (g, v) for g, v in zip(gradients, model.trainable_variables, strict=True) if g is not None
    ]
    finite = [tf.math.is_finite(gradient) for gradient, _ in pairs]
    cut = [
        (tf.where(is_finite, tf.clip_by_value(gradient, -1.0, 1.0), 0.0), variable)
        for (gradient, variable), is_finite in zip(pairs, finite, strict=True)
    ]
    tf_keras.optimizers.SGD(1e-3).apply_gradients(cut)
    return float(value), all(bool(tf.reduce_all(each)) for each in finite)


def smallest(constructor: Callable[..., Any]) -> tuple[Any, int]:
    """(an untrained model, the side of its input), of the smallest input the architecture takes."""
    for side in SIDES:
        try:
            shape = (side, side, 3)
            return constructor(weights=None, input_shape=shape, classes=CLASSES), side
        except ValueError as error:
            refusal = error
    raise UserError(f"takes no input up to {SIDES[-1]} pixels: {refusal}")


def _data(side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random images of 0-255 and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (EXAMPLES, 4, 4, 3)).astype(np.float32)
    return tf.image.resize(coarse, (side, side)).numpy(), rng.integers(0, CLASSES, EXAMPLES)
