"""verify_tflite: the file against the model it was made from."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import tensorflow as tf
import tf_keras

from qat.errors import QatError
from qat.integers import integer_mismatches
from qat.tflite_file import FileError, FileModel, read_file
from qat.verify.interpreter import Codes
from qat.verify.larq import open_runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify_tflite` found.

    Attributes:
        integers_match: every kernel and grid in the file is the model's.
        mismatches: what differs, one line each.
        num_examples: how many were compared.
        agreement: share of examples on which file and model pick the same class; None unless the
            output is one vector of classes.
        accuracy, model_accuracy: of file and model on the labels; None without labels.
        output_snr_db: signal (about its mean over the examples) against the file's difference
            from the model, least of all outputs; infinite when they are equal.
        max_output_difference_lsb: largest difference of output codes, in steps of the output's
            grid; None for float outputs.
        operators: {operator: count}. float_operators: names of those that compute in float.
        bytes: of the file. weight_bytes, float_weight_bytes: kernels and biases, packed and as
            float32.
    """

    integers_match: bool
    mismatches: list[str]
    num_examples: int
    agreement: float | None
    accuracy: float | None
    model_accuracy: float | None
    output_snr_db: float
    max_output_difference_lsb: int | None
    operators: dict[str, int]
    float_operators: list[str]
    bytes: int
    weight_bytes: int
    float_weight_bytes: int


def verify_tflite(
    path: str | os.PathLike, model: tf_keras.Model, dataset: tf.data.Dataset
) -> Verification:
    """Runs the file and the model over a dataset and compares integers, classes and outputs.

    Args:
        path: of the .tflite file.
        model: the quantized Keras model that it was exported from.
        dataset: batches of x or (x, y); x float32 in the model's input units.

    Raises:
        FileError: the file cannot be read or run, or does not fit the data or the model.
        UserError: a file of target lce, and no Python with Larq's interpreter.
        ValueError: an empty dataset.
    """
    file, runner = read_file(path), open_runner(path)
    mismatches = integer_mismatches(model, file)
    predict = tf.function(lambda x: model(x, training=False))
    from_file, from_model, labels = [], [], []
    for batch in dataset:
        x, y = (*batch, None)[:2] if isinstance(batch, tuple) else (batch, None)
        x = tf.nest.flatten(x)
        from_file.append(runner.run(*(tensor.numpy() for tensor in x)))
        outputs = tf.nest.flatten(predict(x if len(x) > 1 else x[0]))
        from_model.append([output.numpy().astype(np.float32) for output in outputs])
        _require_same_shapes(path, from_file[-1], from_model[-1])
        labels.append(None if tf.nest.is_nested(y) or y is None else np.asarray(y))
    if not labels:
        raise QatError("the dataset to verify on is empty")
    outputs = [
        _Output(
            dataclasses.replace(same[0], codes=np.concatenate([part.codes for part in same])),
            np.concatenate(real),
        )
        for same, real in zip(
            zip(*from_file, strict=True), zip(*from_model, strict=True), strict=True
        )
    ]
    return _verification(path, file, mismatches, outputs, labels)


def _require_same_shapes(path, of_file: list[Codes], of_model: list[np.ndarray]) -> None:
    shapes = [output.codes.shape for output in of_file]
    if shapes != [output.shape for output in of_model]:
        expected = ", ".join(str(output.shape) for output in of_model)
        raise FileError(
            f"{path} is not of this model: for a batch it gives {', '.join(map(str, shapes))}, the "
            f"model {expected}"
        )


@dataclasses.dataclass(frozen=True)
class _Output:
    """One output of file and model over all examples."""

    file: Codes
    model: np.ndarray

    def snr_db(self) -> float:
        model = self.model.astype(np.float64)
        noise = np.square(model - self.file.values).sum()
        signal = np.square(model - model.mean(axis=0)).sum()
        return float(10 * np.log10(signal / noise)) if noise and signal else float("inf")


def _verification(
    path, file: FileModel, mismatches, outputs: list[_Output], labels
) -> Verification:
    single = len(outputs) == 1 and outputs[0].model.ndim == 2 and outputs[0].model.shape[1] > 1
    agreement = accuracy = model_accuracy = None
    if single:
        of_file = outputs[0].file.values.argmax(1)
        of_model = outputs[0].model.argmax(1)
        agreement = float((of_file == of_model).mean())
        if labels[0] is not None and labels[0].ndim == 1:
            truth = np.concatenate(labels)
            accuracy = float((of_file == truth).mean())
            model_accuracy = float((of_model == truth).mean())
    return Verification(
        integers_match=not mismatches,
        mismatches=mismatches,
        num_examples=len(outputs[0].model),
        agreement=agreement,
        accuracy=accuracy,
        model_accuracy=model_accuracy,
        output_snr_db=min(output.snr_db() for output in outputs),
        max_output_difference_lsb=_largest_difference(file, outputs),
        operators=file.operator_counts(),
        float_operators=file.float_operators(),
        bytes=os.path.getsize(path),
        weight_bytes=file.weight_bytes(),
        float_weight_bytes=file.float_weight_bytes(),
    )


def _largest_difference(file: FileModel, outputs: list[_Output]) -> int | None:
    """Of all outputs that lie on a grid; a float output lies on that of its DEQUANTIZE."""
    steps = []
    for tensor, output in zip(file.outputs, outputs, strict=True):
        source = next((op.inputs[0] for op in file.operators if op.outputs[0] is tensor), tensor)
        scale = tensor.scale if len(tensor.scale) else source.scale
        if len(scale):
            difference = np.abs(output.file.values.astype(float) - output.model) / float(scale[0])
            steps.append(int(np.rint(difference.max())))
    return max(steps) if steps else None
