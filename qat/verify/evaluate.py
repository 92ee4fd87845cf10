"""evaluate_tflite: a file, made here or elsewhere, on a TFDS split."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import tensorflow as tf

from qat import data as qat_data
from qat.tflite_file import FileError, read_file
from qat.verify.interpreter import Runner
from qat.verify.larq import open_runner

BATCH_SIZE = 64
MAX_PIXELS = 2**24  # of a batch


def evaluate_tflite(
    path: str | os.PathLike,
    dataset: str,
    *,
    split: str = "test",
    data_dir: str | None = None,
    input_range: tuple[float, float] = (0.0, 255.0),
    threads: int | None = None,
) -> dict[str, Any]:
    """Accuracy, latency (seconds an invocation) and operators of a classifier file.

    Args:
        path: of the .tflite file; one image input, one vector of classes as output.
        dataset, split, data_dir: as TFDS names them. Images are resized to the file's size.
        input_range: what pixels 0 and 255 become; quantized inputs then follow the file's scale.
        threads: of the interpreter; None = all cores.

    Raises:
        FileError: the file cannot be read or run, or is no image classifier.
        UserError: a file of target lce, and no Python with Larq's interpreter.
        DataError: the dataset cannot be had, or does not fit the file.
    """
    file, runner = read_file(path), open_runner(path, threads=threads)
    shape = tuple(int(n) for n in runner.inputs[0]["shape"])
    if len(runner.inputs) != 1 or len(runner.outputs) != 1 or len(shape) != 4 or 0 in shape:
        raise FileError(f"{path} is no image classifier: need one image input and one output")
    size = shape[1:3]
    if len(runner.outputs[0]["shape"]) != 2:
        shape = tuple(map(int, runner.outputs[0]["shape"]))
        raise FileError(f"{path} is no classifier: its output has shape {shape}")
    # Images of a damaged size may be huge.
    batch_size = min(BATCH_SIZE, max(1, MAX_PIXELS // math.prod(size)))
    batches, spec = qat_data.evaluation_split(
        dataset, split, data_dir=data_dir, batch_size=batch_size, image_size=size
    )
    classes = int(runner.outputs[0]["shape"][-1])
    if classes != spec.num_classes:
        raise FileError(f"{path} tells {classes} classes apart, {spec.name} has {spec.num_classes}")
    hits = np.concatenate([_hits(runner, _scaled(x, input_range), y.numpy()) for x, y in batches])
    example = _scaled(next(iter(batches))[0], input_range)
    return {
        "tflite": os.fspath(path),
        "dataset": spec.name,
        "split": split,
        "num_eval_examples": len(hits),
        "accuracy": float(hits.mean()),
        "seconds_per_invocation": runner.latency(example),
        "batch_size_in_file": runner.batch_size,
        "bytes": os.path.getsize(path),
        "weight_bytes": file.weight_bytes(),
        "operators": file.operator_counts(),
        "float_operators": file.float_operators(),
    }


def _scaled(x: tf.Tensor, input_range: tuple[float, float]) -> np.ndarray:
    low, high = input_range
    return (x.numpy() / 255.0 * (high - low) + low).astype(np.float32)


def _hits(runner: Runner, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image gets its label."""
    predicted = runner.run(images)[0].values
    return predicted.argmax(1) == labels
