"""A quantizing job: float model and data → quantized model → TFLite file → report.

What `qat.pipeline` (training programs) and `qat.existing` (models that exist already) share.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import tensorflow as tf
import tf_keras

from qat import devices, train
from qat.account import quantization_report
from qat.apply import quantize_model
from qat.distribution import is_chief, local
from qat.errors import UserError
from qat.evidence import with_evidence
from qat.export.micro import arena_bytes, require_tflite_micro
from qat.export.target import find_target
from qat.export.tflite import export_tflite, target_notes
from qat.files import write_whole
from qat.forward import predictor
from qat.job import QatJob
from qat.objective import Objective, ends_in_probability
from qat.output import begin, drop_checkpoints, require_input_elsewhere, run_folder
from qat.recommended import train_quantized
from qat.report import write_reports
from qat.saving import load_quantized_model, load_recipe_of, save_model
from qat.settings import TrainSettings
from qat.verify import larq
from qat.verify.compare import Verification, verify_tflite


class EvaluatedData(train.TrainingData, Protocol):
    """Training data with a test part."""

    name: str  # for the report
    test: tf.data.Dataset


def run_in_folder(job: QatJob, kind: type[QatRun]) -> dict[str, Any] | None:
    """Runs a job of this kind in its output folder, if its options go together.

    Returns:
        What `qat.report.write_reports` wrote; None on machines that only help the chief train.

    Raises:
        DataError, RecipeError, UnsupportedLayerError, ExportError, TrainingError, UserError.
    """
    if job.io != "float32" and job.has_bits(16):
        raise UserError(f"--io={job.io} holds 8 bits; recipe {job.recipe.name} needs --io=float32")
    if find_target(job.target).arena:
        require_tflite_micro()
    if job.target == "lce":
        larq.require_python()  # before training, not after it
    devices.require_legal(job.strategy, job.batch_size, job.jit_compile, job.mixed_precision)
    if (given := job.given_model()) is not None:
        require_input_elsewhere(job.output_dir, given[1], given[0])
    chief = is_chief(job.strategy)
    with run_folder(job.output_dir, wanted=chief):
        prepared = kind(job)
        if chief:
            begin(job.output_dir, job.flags(), resume=job.resume)
            # At once, since it may have come from there.
            write_whole(job.output_dir / "recipe.json", job.recipe.to_json().encode())
        prepared.train_float_model()
        prepared.train_qat_model()
        return prepared.finish() if chief else None


class QatRun:
    """A job whose data, float model and recipe have been found to fit each other.

    Subclasses say where data and float model come from.
    """

    model: str  # for the report
    data: EvaluatedData
    input_range: tuple[float, float] | None
    objective: Objective | None = None

    def __init__(self, job: QatJob):
        tf_keras.utils.set_random_seed(job.seed)
        self.job = job
        self.writes = is_chief(job.strategy)
        self.seconds = {"float_training": 0.0, "qat_training": 0.0}
        self.resumed_at_step = 0
        self.prepare()
        # Before hours of float training, not after them.
        finished = self.finished_qat_model()
        self.qat_is_trained = finished is not None
        self.qat_model = finished if self.qat_is_trained else self.quantized()

    def prepare(self) -> None:
        """Sets `model`, `data`, `input_range` and `float_model`."""
        raise NotImplementedError

    def train_float_model(self) -> None:
        """Trains the float model, where that is part of the job."""

    def finish(self) -> dict[str, Any]:
        job = self.job
        with self.timed("export"):
            options = {"target": job.target, "io": job.io, "weight_storage": job.weight_storage}
            path = export_tflite(self.qat_model, job.output_dir / "model.tflite", **options)
            arena = arena_bytes(path) if find_target(job.target).arena else None
        with self.timed("verify"):
            found = verify_tflite(path, self.qat_model, self.verified_on())
            report = with_evidence(
                self.report(found, arena) | self.more(path),
                found,
                self.qat_model,
                path,
                weight_storage=job.weight_storage,
            )
        write_reports(job.output_dir, report)
        drop_checkpoints(job.output_dir)
        return report

    def quantized(self) -> tf_keras.Model:
        with self.job.strategy.scope():
            return quantize_model(self.float_model, self.job.recipe, input_range=self.input_range)

    def verified_on(self) -> tf.data.Dataset:
        """Batches of the test part, with labels or targets if they were given."""
        return self.data.test

    def more(self, path: pathlib.Path) -> dict[str, Any]:
        """What this kind of job adds to the report."""
        return {}

    def finished_qat_model(self) -> tf_keras.Model | None:
        """The quantized model of the run that is resumed, if it got that far."""
        job, path = self.job, self.job.output_dir / "qat_model.keras"
        if not (job.resume and path.exists()):
            return None
        if load_recipe_of(path) != job.recipe:
            raise UserError(
                f"--resume: {path} was made with recipe {load_recipe_of(path).name!r}, not "
                f"{job.recipe.name!r}; use another --output_dir"
            )
        return load_quantized_model(path)

    def train_qat_model(self) -> None:
        job, data = self.job, self.data
        settings, epochs = self.settings(), self.qat_epochs()
        if self.qat_is_trained:
            self.resumed_at_step = epochs * data.steps_per_epoch
            self.float_model = local(self.float_model)
            return
        if self.writes:
            print(f"settings: {json.dumps(settings.to_dict())}", flush=True)
        with self.training("qat", epochs), job.strategy.scope():
            start = train_quantized(
                self.qat_model,
                self.float_model,
                data,
                settings,
                epochs=epochs,
                weight_storage=job.weight_storage,
                target=job.target,
                **self.options("qat", self.qat_model),
            )
        self.resumed_at_step = start or self.resumed_at_step
        # From here on the chief works alone.
        self.float_model, self.qat_model = local(self.float_model), local(self.qat_model)
        if self.writes:
            save_model(self.qat_model, job.output_dir / "qat_model.keras", recipe=job.recipe)

    def settings(self) -> TrainSettings:
        """Of the quantized training."""
        return self.job.qat_settings()

    def qat_epochs(self) -> int:
        """Of the quantized training."""
        if self.job.qat_epochs is not None:
            return self.job.qat_epochs
        return self.settings().epochs(self.data.steps_per_epoch)

    def options(self, phase: str, model: tf_keras.Model) -> dict[str, Any]:
        """What the configs of both trainings share."""
        job = self.job
        return {
            "from_logits": not ends_in_probability(model.outputs[0]),
            "objective": self.objective,
            "seed": job.seed,
            "jit_compile": job.jit_compile,
            "mixed_precision": job.mixed_precision,
            "checkpoint_dir": job.output_dir / "checkpoints" / phase,
            "checkpoint_steps": job.checkpoint_steps,
            "resume": job.resume,
            "log_dir": job.output_dir / "tensorboard" / phase,
            "profile_steps": job.profile_steps,
        }

    def training(self, phase: str, epochs: int) -> AbstractContextManager[None]:
        """Says what begins and takes its time."""
        if self.writes:
            steps = self.data.steps_per_epoch
            print(f"{phase} training: {epochs} epochs of {steps} steps", flush=True)
        return self.timed(f"{phase}_training")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)

    def report(self, found: Verification, arena: int | None) -> dict[str, Any]:
        job, data = self.job, self.data
        classifies = found.accuracy is not None
        float_bytes = 4 * sum(int(tf.size(weight)) for weight in self.float_model.weights)
        return {
            "recipe": job.recipe.name,
            "model": self.model,
            "dataset": data.name,
            "seed": job.seed,
            "num_eval_examples": found.num_examples,
            "accuracy": {
                "float": _accuracy(self.float_model, data.test) if classifies else None,
                "qat": found.model_accuracy,
                "tflite": found.accuracy,
            },
            "agreement": found.agreement,
            "output_snr_db": found.output_snr_db,
            "integers_match": found.integers_match,
            "max_output_difference_lsb": found.max_output_difference_lsb,
            "resumed_at_step": self.resumed_at_step,
            "devices": devices.account(job.strategy, job.jit_compile, job.mixed_precision),
            "tflite": {
                "path": "model.tflite",
                "bytes": found.bytes,
                "float_model_bytes": float_bytes,
                "weight_bytes": found.weight_bytes,
                "float_weight_bytes": found.float_weight_bytes,
                "operators": found.operators,
                "float_operators": found.float_operators,
                "target": job.target,
                "arena_bytes": arena,
                "notes": target_notes(self.qat_model, job.target),
                "io": job.io,
            },
            # Of a training that an earlier process finished only its model is known.
            "qat_settings": None if self.qat_is_trained else self.settings().to_dict(),
            "layers": [dataclasses.asdict(row) for row in quantization_report(self.qat_model)],
            "seconds": self.seconds,
        }


def _accuracy(model: tf_keras.Model, dataset: tf.data.Dataset) -> float:
    metric = tf_keras.metrics.SparseCategoricalAccuracy()
    predict = predictor(model)
    for x, y in dataset:
        outputs = predict(x)
        metric.update_state(tf.argmax(y, -1) if y.shape == outputs.shape else y, outputs)
    return float(metric.result())
