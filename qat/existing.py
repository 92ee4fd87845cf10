"""Quantizing a Keras model that exists already: any inputs, outputs and loss."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat import data as qat_data
from qat.arrays import ArrayData, load_arrays
from qat.deep import deep_models
from qat.errors import ModelError, UserError
from qat.job import QatJob
from qat.loading import load_model
from qat.model_images import ModelImages
from qat.objective import (
    SPARSE,
    Objective,
    as_targets,
    imitation,
    objective,
    require_targets,
    takes_binary_labels,
    takes_labels,
)
from qat.pipeline import PIXEL_RANGE
from qat.qat_run import QatRun, run_in_folder
from qat.settings import TrainSettings
from qat.verify.larq import open_runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeJob(QatJob):
    """One run of the quantizing program; see `qat-quantize --help` for each field's meaning.

    Exactly one of dataset and calibration_data is given.
    """

    model_path: str
    dataset: str | None = None
    calibration_data: str | None = None
    input_range: tuple[float, float] | None = None
    loss: tuple[str, ...] = ()
    custom_objects: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allow_unsafe_deserialization: bool = False

    def given_model(self) -> tuple[str, str]:
        """As `QatJob`'s."""
        return "--model_path", self.model_path

    def given_files(self) -> list[tuple[str, str]]:
        """As `QatJob`'s."""
        data = [("--calibration_data", self.calibration_data)] if self.calibration_data else []
        return [*super().given_files(), *data]


def run(job: QuantizeJob) -> dict[str, Any]:
    """Loads, quantizes, trains, exports and verifies; writes the job's output folder.

    Returns:
        What `qat.report.write_reports` wrote.

    Raises:
        QatError: one line on whatever keeps the job from being done.
    """
    if (job.dataset is None) == (job.calibration_data is None):
        raise UserError("give either --dataset=NAME (TFDS) or --calibration_data=FILE.npz")
    if job.dataset is None and (job.augment_shift, job.augment_flip) != (None, None):
        raise UserError("--augment_shift and --augment_flip need --dataset; leave them out here")
    with tf_keras.utils.custom_object_scope(dict(job.custom_objects)):
        return run_in_folder(job, QuantizeRun)


class QuantizeRun(QatRun):
    """A run of `QuantizeJob`."""

    job: QuantizeJob

    def prepare(self) -> None:
        job = self.job
        try:
            model = load_model(
                job.model_path,
                custom_objects=job.custom_objects,
                allow_unsafe_deserialization=job.allow_unsafe_deserialization,
            )
        except ModelError as error:
            raise UserError(f"--model_path={job.model_path}: {error}") from error
        self.model = job.model_path
        self.input_range = job.input_range
        if job.dataset is not None:
            self._take_images(model)
        else:
            self._take_arrays(model)
        if job.distill and self.objective is not None:
            raise UserError("--distill teaches one vector of classes; leave it out here")

    def settings(self) -> TrainSettings:
        found = self.job.qat_settings()
        if self.objective is not None and self.job.distill is None:
            # The teacher teaches classes; other outputs learn from their targets alone.
            return dataclasses.replace(found, distill=False)
        return found

    def qat_epochs(self) -> int:
        nothing_to_learn = isinstance(self.data, ArrayData) and not self.data.y
        return 0 if nothing_to_learn and not self.job.qat_epochs else super().qat_epochs()

    def more(self, path: pathlib.Path) -> dict[str, Any]:
        """Where accuracy says nothing, the loss of float model, quantized model and file."""
        if self.objective is None or not self.test_has_targets:
            return {}
        runner, chosen = open_runner(path), self.objective
        models = {"float": self.float_model, "qat": self.qat_model}
        sums, count = dict.fromkeys((*models, "tflite"), 0.0), 0
        for x, y in self.data.test:
            x, y = tf.nest.flatten(x), tf.nest.flatten(y)
            outputs = {name: model(_one_or_many(x)) for name, model in models.items()}
            outputs["tflite"] = [each.values for each in runner.run(*(a.numpy() for a in x))]
            for name, found in outputs.items():
                # Arrays, as the file's: of a model's own tensors Keras takes the logits.
                arrays = map(np.asarray, tf.nest.flatten(found))
                value = chosen.value(y, list(map(tf.convert_to_tensor, arrays)))
                sums[name] += float(value) * len(x[0])
            count += len(x[0])
        return {"loss": {name: total / count for name, total in sums.items()}}

    def verified_on(self) -> tf.data.Dataset:
        """As `QatRun`'s; what the float model gives is no target of the user's."""
        if self.targets_are_given:
            return self.data.test
        return dataclasses.replace(self.data, y=()).test

    def _take_images(self, model: tf_keras.Model) -> None:
        """Images of a TFDS dataset, resized to what the model takes."""
        job = self.job
        if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or len(model.outputs) != 1:
            raise ModelError(
                f"{job.model_path}: --dataset feeds models of one image input and one output; "
                "this one needs --calibration_data=FILE.npz"
            )
        size = tuple(model.inputs[0].shape[1:3])
        if size.count(None) == 1:
            raise ModelError(
                f"{job.model_path}: its images have a height and width of {size}, one of them "
                "open; fix both or none"
            )
        images = qat_data.load(
            job.dataset, image_size=None if None in size else size, **job.image_options()
        )
        self.input_range = job.input_range or PIXEL_RANGE
        self.float_model = _with_fixed_inputs(model, [images.spec.image_shape[:2]])
        self.data = ModelImages(images, self.float_model, self.input_range, job.loss)
        self.objective, self.targets_are_given = self.data.objective, True
        self.test_has_targets = not self.data.has_classes

    def _take_arrays(self, model: tf_keras.Model) -> None:
        job, flag = self.job, "--calibration_data"
        data = load_arrays(
            job.calibration_data, model, batch_size=job.batch_size, seed=job.seed, flag=flag
        )
        self.float_model = _with_fixed_inputs(model, [array.shape[1:] for array in data.x])
        data = dataclasses.replace(data, model=self.float_model)
        self.targets_are_given = bool(data.y)
        if job.input_range is None and all(array.dtype == np.uint8 for array in data.x):
            self.input_range = PIXEL_RANGE
        self.data, self.objective = _with_objective(job, data, f"{flag}={job.calibration_data}")
        self.test_has_targets = bool(self.data.y)


def _with_objective(
    job: QuantizeJob, data: ArrayData, place: str
) -> tuple[ArrayData, Objective | None]:
    """What is to be learned; without targets it is what the float model gives."""
    model, trains = data.model, job.qat_epochs != 0
    if not data.y:
        if job.loss:
            raise UserError(f"{place} holds no targets for --loss={','.join(job.loss)}; add y")
        if not job.qat_epochs:
            return data, None
        outputs = model.predict(data.x, batch_size=data.batch_size, verbose=0)
        return dataclasses.replace(data, y=tuple(tf.nest.flatten(outputs))), imitation(model)
    targets = tuple(map(as_targets, model.outputs, data.y))
    data = dataclasses.replace(data, y=targets)
    labels = all(map(takes_labels, model.outputs, data.y))
    binary = all(map(takes_binary_labels, model.outputs, data.y))
    names = job.loss or ((SPARSE,) if labels else ("binary_crossentropy",) if binary else ())
    if not names:
        if trains:
            raise UserError(
                f"{place}: y is no label of the outputs' classes; say what to learn, e.g. "
                "--loss=mean_squared_error, or --qat_epochs=0 to calibrate only"
            )
        return data, None
    chosen = objective(model, names)
    require_targets(chosen, model, data.y, place)
    if len(data.y) == 1 and labels and set(names) == {SPARSE} and len(model.outputs[0].shape) == 2:
        return dataclasses.replace(data, y=(data.y[0].reshape(-1).astype(np.int64),)), None
    return data, chosen


@deep_models()
def _with_fixed_inputs(model: tf_keras.Model, shapes: list[tuple[int, ...]]) -> tf_keras.Model:
    """The model for inputs of just these shapes (the first dimensions of an example's)."""
    known = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    if None not in [size for shape in known for size in shape]:
        return model
    inputs = [
        tf_keras.Input((*shape, *own[len(shape) :]), dtype=tensor.dtype, name=name)
        for shape, own, tensor, name in zip(
            shapes, known, model.inputs, model.input_names, strict=True
        )
    ]
    fixed = tf_keras.models.clone_model(model, input_tensors=inputs)
    fixed.set_weights(model.get_weights())
    return fixed


def _one_or_many(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors
