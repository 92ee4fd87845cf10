"""evaluate_tflite: a file, made here or elsewhere, on a TFDS split."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from qat import data as qat_data
from qat.model_images import converts_channels, in_channels, in_range
from qat.tflite_file import FileError, FileModel, read_file
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
        path: of the .tflite file; one image input of a fixed size; as output one vector of classes,
            or one number for two: above 1/2 behind a sigmoid, else above 0, it means the second.
        dataset, split, data_dir: as TFDS names them. Images are resized to the file's size, grey
            ones take three channels and colours one where the file wants that.
        input_range: what pixels 0 and 255 become; quantized inputs then follow the file's scale.
        threads: of the interpreter; None = all cores.

    Raises:
        FileError: the file cannot be read or run, or is no image classifier of one size.
        UserError: a file of target lce, and no Python with Larq's interpreter.
        DataError: the dataset cannot be had, or does not fit the file.
    """
    file, runner = read_file(path), open_runner(path, threads=threads)
    _, *size, channels = _image_shape(runner)
    # Images of a damaged size may be huge.
    batch_size = min(BATCH_SIZE, max(1, MAX_PIXELS // math.prod(size)))
    batches, spec = qat_data.evaluation_split(
        dataset, split, data_dir=data_dir, batch_size=batch_size, image_size=tuple(size)
    )
    _require_fit(runner, spec)
    _warn_of_saturation(runner, input_range)

    def inputs(x: tf.Tensor) -> np.ndarray:
        return in_range(in_channels(x, channels), input_range).numpy()

    middle = 0.5 if _ends_in_sigmoid(file) else 0.0
    hits = np.concatenate([_hits(runner, inputs(x), y.numpy(), middle) for x, y in batches])
    example = inputs(next(iter(batches))[0])
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


def _image_shape(runner: Runner) -> tuple[int, ...]:
    """(examples, height, width, channels) of an image classifier."""
    shape = tuple(int(n) for n in runner.inputs[0]["shape"])
    if len(runner.inputs) != 1 or len(runner.outputs) != 1 or len(shape) != 4 or 0 in shape:
        raise FileError(f"{runner.path} is no image classifier: need one image input and output")
    if -1 in runner.inputs[0]["shape_signature"][1:]:
        raise FileError(
            f"{runner.path} leaves the size of its images open, "
            f"{tuple(map(int, runner.inputs[0]['shape_signature']))}; export it for one size"
        )
    found = tuple(map(int, runner.outputs[0]["shape"]))
    if len(found) != 2:
        raise FileError(f"{runner.path} is no classifier: its output has shape {found}")
    return shape


def _require_fit(runner: Runner, spec: qat_data.DatasetSpec) -> None:
    classes, channels = int(runner.outputs[0]["shape"][-1]), int(runner.inputs[0]["shape"][-1])
    if classes != spec.num_classes and (classes, spec.num_classes) != (1, 2):
        raise FileError(
            f"{runner.path} tells {classes} classes apart, {spec.name} has {spec.num_classes}"
        )
    if not converts_channels(spec.image_shape[-1], channels):
        raise FileError(
            f"{runner.path} takes images of {channels} channels, {spec.name} has "
            f"{spec.image_shape[-1]}"
        )


def _warn_of_saturation(runner: Runner, input_range: tuple[float, float]) -> None:
    detail = runner.inputs[0]
    scale, zero_point = detail["quantization"]
    if not np.issubdtype(detail["dtype"], np.integer) or not scale:
        return
    limits = np.iinfo(detail["dtype"])
    low, high = ((code - zero_point) * scale for code in (limits.min, limits.max))
    if min(input_range) < low - 2 * scale or max(input_range) > high + 2 * scale:
        logging.warning(
            "The input of %s holds %.4g to %.4g, and --input_range=%g,%g goes beyond: values there "
            "are cut off. Give the range that the model was trained with.",
            runner.path,
            low,
            high,
            *input_range,
        )


def _ends_in_sigmoid(file: FileModel) -> bool:
    """Whether the output is a LOGISTIC's, in whatever type."""
    makers = {op.outputs[0].name: op for op in file.operators}
    maker = makers.get(file.outputs[0].name)
    while maker is not None and maker.name in ("QUANTIZE", "DEQUANTIZE", "RESHAPE"):
        maker = makers.get(maker.inputs[0].name)
    return maker is not None and maker.name == "LOGISTIC"


def _hits(runner: Runner, images: np.ndarray, labels: np.ndarray, middle: float) -> np.ndarray:
    """Whether each image gets its label. middle: above it one number for two classes means 1."""
    values = runner.run(images)[0].values
    return (values.argmax(1) if values.shape[1] > 1 else values[:, 0] > middle) == labels
