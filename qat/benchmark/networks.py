"""How the networks of the benchmark are trained and measured, one function a source."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat import train
from qat.account import quantization_report
from qat.apply import quantize_model
from qat.benchmark import measure, peers, tfmot
from qat.benchmark.candidate import Candidate
from qat.benchmark.plan import Run
from qat.data import ImageData
from qat.export.graph import ExportError
from qat.export.tflite import export_tflite
from qat.files import write_whole
from qat.recommended import train_quantized
from qat.tflite_file import FileError, read_file

PIXEL_RANGE = (0.0, 255.0)
# Below this share of equal classes a peer's file is not its network, and would do it injustice.
LEAST_AGREEMENT = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run and what it needs.

    Attributes:
        float_model: the checkpoint, the job's own.
        data: to train on, in the seed's order. images: batches (x, y) to measure on.
        learning_rate: of all but ours. peer_python: for peers in a process of their own.
        path: of the run's result; other files go beside it.
    """

    run: Run
    float_model: tf_keras.Model
    data: ImageData
    images: tf.data.Dataset
    learning_rate: float
    peer_python: str | None
    path: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found.

    Attributes:
        accuracy: share of right classes; measured_on: "file" or "keras".
        model_accuracy: of the Keras model. agreement: share of examples on which file and Keras
            model pick the same class; None without a file.
        weight_bytes: packed kernels and biases, of the file or in theory.
        file_bytes: None without a file.
        seconds: of training, with calibration.
        settings: what it was trained with, as far as JSON can say it; ours with the recipe.
        note: what to know to judge the accuracy; "" for nothing.
    """

    accuracy: float
    measured_on: str
    model_accuracy: float
    agreement: float | None
    num_eval_examples: int
    weight_bytes: int
    weight_bytes_in_theory: bool
    file_bytes: int | None
    seconds: float
    settings: dict[str, Any]
    note: str = ""


def outcome(job: Job) -> Outcome:
    """Trains and measures the network of a run.

    Raises:
        TrainingError: the loss is no longer a number. PeerError: a peer fails.
    """
    return _SOURCES[job.run.source](job)


@dataclasses.dataclass(frozen=True)
class Unwatched:
    """Training data without a validation set: nothing is measured before training is over."""

    data: train.TrainingData
    validation: None = None

    @property
    def steps_per_epoch(self) -> int:
        """As the data's own."""
        return self.data.steps_per_epoch

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """As the data's own."""
        return self.data.train_stream(start_step)


def train_plainly(
    model: tf_keras.Model, data: train.TrainingData, epochs: int, learning_rate: float
) -> float:
    """Trains as all networks but ours are trained: Adam, cosine schedule, labels; the seconds."""
    start = time.monotonic()
    if epochs:
        config = train.TrainConfig(epochs=epochs, learning_rate=learning_rate)
        train.fit(model, Unwatched(data), config)
    return time.monotonic() - start


# ---------------------------------------------------------------- sources


def _of_float(job: Job) -> Outcome:
    seconds = train_plainly(job.float_model, job.data, job.run.epochs, job.learning_rate)
    return _measured(
        job,
        job.float_model,
        write=None,
        seconds=seconds,
        weight_bytes=measure.float_weight_bytes(job.float_model),
        settings={"learning_rate": job.learning_rate} if job.run.epochs else {},
    )


def _of_ours(job: Job) -> Outcome:
    candidate = Candidate.parse(job.run.method)
    settings = candidate.settings()
    model = quantize_model(job.float_model, candidate.recipe, input_range=PIXEL_RANGE)
    start = time.monotonic()
    data = Unwatched(job.data)
    train_quantized(model, job.float_model, data, settings, epochs=job.run.epochs)
    seconds = time.monotonic() - start
    bits = {row.name: row.weight_bits or 32 for row in quantization_report(model)}
    return _measured(
        job,
        model,
        write=lambda path: export_tflite(model, path),
        seconds=seconds,
        weight_bytes=measure.packed_weight_bytes(job.float_model, lambda layer: bits[layer.name]),
        settings=candidate.trained_with(),
    )


def _of_tfmot(job: Job) -> Outcome:
    bare, scale, offset = tfmot.without_rescaling(job.float_model)
    model = tfmot.quantized(bare, job.run.recipe)
    data = tfmot.Rescaled(job.data, scale, offset)
    seconds = train_plainly(model, data, job.run.epochs, job.learning_rate)
    weight_bits, activation_bits = tfmot.widths(job.run.recipe)
    converts = activation_bits >= 8
    found = _measured(
        job,
        model,
        write=(lambda path: write_whole(path, tfmot.converted(model))) if converts else None,
        images=data.of(job.images),
        seconds=seconds,
        weight_bytes=measure.packed_weight_bytes(job.float_model, lambda layer: weight_bits),
        settings={"learning_rate": job.learning_rate},
    )
    if converts:
        return found
    why = f"no file: TensorFlow's converter takes no {activation_bits}-bit activations"
    return dataclasses.replace(found, note=why)


def _of_process(job: Job) -> Outcome:
    assert job.peer_python is not None
    result = peers.run_peer(
        job.run,
        job.peer_python,
        job.float_model,
        job.data,
        job.images,
        learning_rate=job.learning_rate,
        log=job.path.with_suffix(".log"),
    )
    return Outcome(
        accuracy=result["accuracy"],
        measured_on="keras",
        model_accuracy=result["accuracy"],
        agreement=None,
        num_eval_examples=result["num_eval_examples"],
        weight_bytes=peers.weight_bytes(job.run, job.float_model),
        weight_bytes_in_theory=True,
        file_bytes=None,
        seconds=result["seconds"],
        settings={"learning_rate": job.learning_rate, "versions": result["versions"]},
    )


# ---------------------------------------------------------------- measuring


def _measured(
    job: Job,
    model: tf_keras.Model,
    *,
    write: Callable[[pathlib.Path], Any] | None,
    images: tf.data.Dataset | None = None,
    seconds: float,
    weight_bytes: int,
    settings: dict[str, Any],
) -> Outcome:
    """Measures the Keras model, and the file that `write(path)` makes if it makes one.

    Args:
        images: as the model takes them, if not as the job has them.
        weight_bytes: in theory, for a network without a file.
    """
    images = job.images if images is None else images
    labels, of_model = measure.labels_of(images), measure.model_classes(model, images)
    share = float((of_model == labels).mean())
    found = Outcome(
        accuracy=share,
        measured_on="keras",
        model_accuracy=share,
        agreement=None,
        num_eval_examples=len(labels),
        weight_bytes=weight_bytes,
        weight_bytes_in_theory=True,
        file_bytes=None,
        seconds=seconds,
        settings=settings,
    )
    return found if write is None else _on_file(job, found, of_model, write, images)


def _on_file(
    job: Job,
    found: Outcome,
    of_model: np.ndarray,
    write: Callable[[pathlib.Path], Any],
    images: tf.data.Dataset,
) -> Outcome:
    """The outcome, measured on the file; as it was, with a note, where there is none to trust."""
    path, labels = job.path.with_suffix(".tflite"), measure.labels_of(images)
    try:
        write(path)
        of_file = measure.file_classes(path, images)
    except (ExportError, FileError, tfmot.PeerError) as error:
        return dataclasses.replace(found, note=f"no file: {error}")
    agreement = float((of_file == of_model).mean())
    if agreement < LEAST_AGREEMENT and job.run.source != "qat":
        why = f"its file picks the Keras model's class on {agreement:.1%} of the images only"
        return dataclasses.replace(found, agreement=agreement, note=why)
    return dataclasses.replace(
        found,
        accuracy=float((of_file == labels).mean()),
        measured_on="file",
        agreement=agreement,
        weight_bytes=read_file(path).weight_bytes(),
        weight_bytes_in_theory=False,
        file_bytes=path.stat().st_size,
    )


_SOURCES: dict[str, Callable[[Job], Outcome]] = {
    "float": _of_float,
    "qat": _of_ours,
    "tfmot": _of_tfmot,
    "qkeras": _of_process,
    "larq": _of_process,
}
