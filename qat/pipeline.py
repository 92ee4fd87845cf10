"""The whole way: dataset → float model → quantized model → TFLite file → report."""

from __future__ import annotations

import dataclasses
from typing import Any

import tf_keras

import models
from qat import data as qat_data
from qat import train
from qat.distribution import local
from qat.errors import UserError
from qat.float_model import load_float_model, require_model, save_float_model
from qat.job import QatJob
from qat.qat_run import QatRun, run_in_folder
from qat.settings import default_epochs

PIXEL_RANGE = (0.0, 255.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(QatJob):
    """One run of the training program."""

    dataset: str
    model: str
    float_model: str | None = None
    float_epochs: int | None = None
    learning_rate: float = 1e-3  # of the float training

    def given_model(self) -> tuple[str, str] | None:
        """As `QatJob`'s."""
        return None if self.float_model is None else ("--float_model", self.float_model)


def run(job: Job) -> dict[str, Any] | None:
    """Runs the job and writes its output folder; returns and raises as `run_in_folder`."""
    if job.float_model is None:
        require_model(job.model)
    return run_in_folder(job, TrainRun)


class TrainRun(QatRun):
    """A run of `Job`."""

    job: Job
    input_range = PIXEL_RANGE

    def prepare(self) -> None:
        job = self.job
        self.data = qat_data.load(job.dataset, **job.image_options())
        with job.strategy.scope():
            self.float_model, self.float_is_trained = self.first_float_model()
        self.model = job.model if job.float_model is None else job.float_model

    def first_float_model(self) -> tuple[tf_keras.Model, bool]:
        """(given, found from the run that is resumed, or untrained; whether it is trained)."""
        job, path, spec = self.job, self.job.output_dir / "float_model.keras", self.data.spec
        if job.float_model is not None:
            return load_float_model(job.float_model, spec, "--float_model"), True
        if job.resume and path.exists():
            model = load_float_model(str(path), spec, "--resume")
            if model.name != models.chosen(job.model)[0]:
                raise UserError(f"--resume: {path} is a {model.name}, not --model={job.model}")
            return model, True
        return models.build(job.model, spec.image_shape, spec.num_classes), False

    def train_float_model(self) -> None:
        job, epochs = self.job, self.job.float_epochs
        if epochs is None:
            epochs = default_epochs(self.data.steps_per_epoch, quantized=False)
        if self.float_is_trained:
            if job.float_model is None:
                self.resumed_at_step = epochs * self.data.steps_per_epoch
            return
        config = train.TrainConfig(
            epochs=epochs,
            learning_rate=job.learning_rate,
            **self.options("float", self.float_model),
        )
        with self.training("float", epochs):
            self.resumed_at_step = train.fit(self.float_model, self.data, config)
        trained = local(self.float_model)
        if self.writes:
            save_float_model(trained, job.output_dir / "float_model.keras")
        self.qat_model = self.quantized()
