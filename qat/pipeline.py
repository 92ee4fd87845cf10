"""The whole way: dataset → float model → quantized model → TFLite file → report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import tensorflow as tf
import tf_keras

import models
from qat import data as qat_data
from qat import train
from qat.account import quantization_report
from qat.apply import quantize_model
from qat.errors import UserError
from qat.evidence import with_evidence
from qat.export.micro import arena_bytes, require_tflite_micro
from qat.export.target import find_target
from qat.export.tflite import export_tflite, target_notes
from qat.files import write_whole
from qat.float_model import load_float_model, save_float_model
from qat.output import clear, drop_checkpoints, output_folder
from qat.recipe import Recipe
from qat.recommended import train_quantized
from qat.report import write_reports
from qat.saving import load_quantized_model, load_recipe_of, save_model
from qat.settings import TrainSettings, recommended
from qat.verify import larq
from qat.verify.compare import Verification, verify_tflite

PIXEL_RANGE = (0.0, 255.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the training program; see `qat-train --help` for the meaning of each field.

    settings: of the quantized training; None = `qat.settings.recommended(recipe)`. qat_epochs,
    qat_learning_rate and distill override them.
    """

    dataset: str
    model: str
    recipe: Recipe
    output_dir: pathlib.Path
    data_dir: str | None = None
    float_model: str | None = None
    float_epochs: int | None = None
    qat_epochs: int | None = None
    batch_size: int = 64
    learning_rate: float = train.LEARNING_RATE
    qat_learning_rate: float | None = None
    seed: int = 0
    resume: bool = False
    distill: bool | None = None
    settings: TrainSettings | None = None
    jit_compile: bool = False
    target: str = "litert"
    io: str = "float32"
    weight_storage: str = "size"
    checkpoint_steps: int | None = None
    profile_steps: tuple[int, int] | None = None
    strategy: tf.distribute.Strategy = dataclasses.field(default_factory=tf.distribute.get_strategy)

    def qat_settings(self) -> TrainSettings:
        """How the quantized model is trained."""
        overrides = {"learning_rate": self.qat_learning_rate, "distill": self.distill}
        given = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(self.settings or recommended(self.recipe), **given)


def run(job: Job) -> dict[str, Any]:
    """Runs the job and writes its output folder.

    Returns:
        What `qat.report.write_reports` wrote.

    Raises:
        DataError, RecipeError, UnsupportedLayerError, ExportError, TrainingError, UserError.
    """
    if job.float_model is None and job.model not in models.MODELS:
        raise UserError(f"unknown model {job.model!r}; legal: {', '.join(models.MODELS)}")
    if job.io != "float32" and _has_bits(job.recipe, 16):
        raise UserError(f"--io={job.io} holds 8 bits; recipe {job.recipe.name} needs --io=float32")
    if find_target(job.target).arena:
        require_tflite_micro()
    if job.target == "lce":
        larq.require_python()  # before training, not after it
    with output_folder(job.output_dir), job.strategy.scope():
        prepared = _Run(job)
        if not job.resume:
            clear(job.output_dir)
        return prepared.run()


class _Run:
    """A job whose data, float model and recipe have been found to fit each other."""

    def __init__(self, job: Job):
        tf_keras.utils.set_random_seed(job.seed)
        self.job = job
        self.seconds = {"float_training": 0.0, "qat_training": 0.0}
        self.resumed_at_step = 0
        self.data = qat_data.load(
            job.dataset, data_dir=job.data_dir, batch_size=job.batch_size, seed=job.seed
        )
        self.float_model, self.float_is_trained = self.first_float_model()
        # Before hours of float training, not after them.
        self.qat_model = self.finished_qat_model() or self.quantized()
        self.qat_is_trained = self.finished_qat_model() is not None

    def run(self) -> dict[str, Any]:
        job = self.job
        self.train_float_model()
        self.train_qat_model()
        with self.timed("export"):
            path = export_tflite(
                self.qat_model,
                job.output_dir / "model.tflite",
                target=job.target,
                io=job.io,
                weight_storage=job.weight_storage,
            )
            arena = arena_bytes(path) if find_target(job.target).arena else None
        with self.timed("verify"):
            found = verify_tflite(path, self.qat_model, self.data.test)
            report = with_evidence(
                self.report(found, arena),
                found,
                self.qat_model,
                path,
                weight_storage=job.weight_storage,
            )
        write_reports(job.output_dir, report)
        drop_checkpoints(job.output_dir)
        return report

    def first_float_model(self) -> tuple[tf_keras.Model, bool]:
        """(given, found from the run that is resumed, or untrained; whether it is trained)."""
        job, path, spec = self.job, self.job.output_dir / "float_model.keras", self.data.spec
        if job.float_model is not None:
            return load_float_model(job.float_model, spec, "--float_model"), True
        if job.resume and path.exists():
            model = load_float_model(str(path), spec, "--resume")
            if model.name != job.model:
                raise UserError(f"--resume: {path} is a {model.name}, not --model={job.model}")
            return model, True
        return models.build(job.model, spec.image_shape, spec.num_classes), False

    def train_float_model(self) -> None:
        if self.float_is_trained:
            return
        job, epochs = self.job, self.job.float_epochs
        if epochs is None:
            epochs = train.default_epochs(self.data.steps_per_epoch, quantized=False)
        config = train.TrainConfig(
            epochs=epochs,
            learning_rate=job.learning_rate,
            **self.options("float", self.float_model),
        )
        with self.training("float", epochs):
            self.resumed_at_step = train.fit(self.float_model, self.data, config)
        save_float_model(self.float_model, job.output_dir / "float_model.keras")
        self.qat_model = self.quantized()

    def quantized(self) -> tf_keras.Model:
        return quantize_model(self.float_model, self.job.recipe, input_range=PIXEL_RANGE)

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
        if self.qat_is_trained:
            return
        job, data = self.job, self.data
        settings, epochs = job.qat_settings(), job.qat_epochs
        if epochs is None:
            epochs = settings.epochs(data.steps_per_epoch)
        print(f"settings: {json.dumps(settings.to_dict())}", flush=True)
        with self.training("qat", epochs):
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
        self.resumed_at_step = max(self.resumed_at_step, start)
        save_model(self.qat_model, job.output_dir / "qat_model.keras", recipe=job.recipe)
        write_whole(job.output_dir / "recipe.json", job.recipe.to_json().encode())

    def options(self, phase: str, model: tf_keras.Model) -> dict[str, Any]:
        """What the configs of both trainings share."""
        job = self.job
        return {
            "from_logits": not train.ends_in_softmax(model),
            "jit_compile": job.jit_compile,
            "checkpoint_dir": job.output_dir / "checkpoints" / phase,
            "checkpoint_steps": job.checkpoint_steps,
            "resume": job.resume,
            "log_dir": job.output_dir / "tensorboard" / phase,
            "profile_steps": job.profile_steps,
        }

    def training(self, phase: str, epochs: int) -> AbstractContextManager[None]:
        """Says what begins and takes its time."""
        print(f"{phase} training: {epochs} epochs of {self.data.steps_per_epoch} steps", flush=True)
        return self.timed(f"{phase}_training")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)

    def report(self, found: Verification, arena: int | None) -> dict[str, Any]:
        job, data = self.job, self.data
        float_bytes = 4 * sum(int(tf.size(weight)) for weight in self.float_model.weights)
        return {
            "recipe": job.recipe.name,
            "model": job.model if job.float_model is None else job.float_model,
            "dataset": data.spec.name,
            "seed": job.seed,
            "num_eval_examples": found.num_examples,
            "accuracy": {
                "float": _accuracy(self.float_model, data.test),
                "qat": found.model_accuracy,
                "tflite": found.accuracy,
            },
            "agreement": found.agreement,
            "output_snr_db": found.output_snr_db,
            "integers_match": found.integers_match,
            "max_output_difference_lsb": found.max_output_difference_lsb,
            "resumed_at_step": self.resumed_at_step,
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
            "qat_settings": None if self.qat_is_trained else job.qat_settings().to_dict(),
            "layers": [dataclasses.asdict(row) for row in quantization_report(self.qat_model)],
            "seconds": self.seconds,
        }


def _accuracy(model: tf_keras.Model, dataset: tf.data.Dataset) -> float:
    metric = tf_keras.metrics.SparseCategoricalAccuracy()
    predict = tf.function(lambda x: model(x, training=False))
    for x, y in dataset:
        metric.update_state(y, predict(x))
    return float(metric.result())


def _has_bits(recipe: Recipe, bits: int) -> bool:
    specs = [spec for rule in recipe.rules for spec in (rule.weights, rule.activations)]
    return any(spec is not None and spec.bits == bits for spec in specs)
