"""verify_tflite: the file against the model it was made from."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import tensorflow as tf
import tf_keras

from qat.integers import integer_mismatches
from qat.tflite_file import FileError, read_file
from qat.verify.differences import Difference
from qat.verify.interpreter import Runner
from qat.verify.larq import open_runner
from qat.verify.latency import Latency, latencies
from qat.verify.layers import LayerComparison, affordable_examples, compare_layers
from qat.verify.outputs import Runs, run_all

# What the reference kernels run for the outputs: so many examples, or multiplications' worth.
_MOST_EXAMPLES, _MOST_MULTIPLICATIONS = 1000, 10**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify_tflite` found.

    Attributes:
        integers_match: every kernel and grid in the file is the model's.
        mismatches: what differs, one line each.
        num_examples: how many were compared.
        agreement: share of examples on which file and model pick the same class; None unless the
            output is one vector of classes: targets of its shape that are no probabilities say that
            it is not.
        accuracy, model_accuracy: of file and model on the labels, numbers or one-hot; None without.
        output_snr_db: signal (about its mean over the examples, or about zero for a single one)
            against the file's difference from the model, least of all outputs; infinite when they
            are equal.
        max_output_difference_lsb: largest difference of output codes, in steps of the output's
            grid; None for float outputs.
        operators: {operator: count}. float_operators: names of those that compute in float.
        bytes: of the file. weight_bytes, float_weight_bytes: kernels and biases, packed and as
            float32.
        outputs: {output: {pair: how far apart}}, of outputs that lie on a grid; on all examples,
            those on the reference kernels on as many as they compute in seconds.
        layers: the tensors in between, on `layer_examples`.
        latency: of the default kernels.
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
    outputs: dict[str, dict[str, Difference]]
    layers: LayerComparison
    latency: list[Latency]


def verify_tflite(
    path: str | os.PathLike,
    model: tf_keras.Model,
    dataset: tf.data.Dataset,
    *,
    layer_examples: int = 64,
) -> Verification:
    """Runs the file and the model over a dataset and compares integers, classes and codes.

    Args:
        path: of the .tflite file.
        model: the quantized Keras model that it was exported from.
        dataset: batches of x or (x, y); x float32 in the model's input units.
        layer_examples: on how many, at most, every layer is compared between the model, the file on
            default and on reference kernels, and the integer simulator (`qat.verify.layers`).

    Raises:
        FileError: the file cannot be read or run, or does not fit the data or the model.
        UserError: a file of target lce, and no Python with Larq's interpreter.
        ValueError: an empty dataset.
    """
    file, runner = read_file(path), open_runner(path)
    mismatches = integer_mismatches(model, file)
    most = affordable_examples(file, _MOST_EXAMPLES, _MOST_MULTIPLICATIONS)
    runs = run_all(runner, file, model, dataset, keep=most)
    layers = LayerComparison(examples=0, rows=[], not_compared={})
    on_reference = None
    if layer_examples:
        reference, on_reference = _on_reference(path, runs.inputs)
        inputs = [x[: affordable_examples(file, layer_examples)] for x in runs.inputs]
        layers = compare_layers(model, file, {"default": runner, "reference": reference}, inputs)
    outputs = {
        output.name: output.differences(None if on_reference is None else on_reference[number])
        for number, output in enumerate(runs.outputs)
    }
    on_grids = [pairs["keras_default"].largest for pairs in outputs.values() if pairs]
    return Verification(
        integers_match=not mismatches,
        mismatches=mismatches,
        num_examples=len(runs.outputs[0].keras),
        **_classes(runs),
        output_snr_db=min(output.snr_db() for output in runs.outputs),
        max_output_difference_lsb=max(on_grids, default=None),
        operators=file.operator_counts(),
        float_operators=file.float_operators(),
        bytes=os.path.getsize(path),
        weight_bytes=file.weight_bytes(),
        float_weight_bytes=file.float_weight_bytes(),
        outputs=outputs,
        layers=layers,
        latency=latencies(path),
    )


def _on_reference(
    path: str | os.PathLike, inputs: list[np.ndarray]
) -> tuple[Runner | FileError, list[np.ndarray] | None]:
    """The file on the reference kernels, or why there is none, and its outputs in reals."""
    try:
        runner = open_runner(path, kernels="reference")
        return runner, [output.values for output in runner.run(*inputs)]
    except FileError as error:
        return error, None


def _classes(runs: Runs) -> dict[str, float | None]:
    """Agreement and accuracies; None unless there is one vector of classes, and without labels."""
    found = dict.fromkeys(("agreement", "accuracy", "model_accuracy"))
    output = runs.outputs[0]
    if len(runs.outputs) > 1 or output.keras.ndim != 2 or output.keras.shape[1] == 1:
        return found
    targets = None if runs.labels[0] is None else np.concatenate(runs.labels)
    truth = None
    if targets is not None and targets.shape == output.keras.shape:
        if targets.min() < 0 or not np.allclose(targets.sum(1), 1, atol=1e-3):
            return found  # of a regression, or of several classes at once
        if (targets.max(1) == 1).all():
            truth = targets.argmax(1)
    elif targets is not None and targets.shape[1:] in ((), (1,)):
        truth = targets.reshape(-1)
    of_file, of_model = output.default.argmax(1), output.keras.argmax(1)
    found["agreement"] = float((of_file == of_model).mean())
    if truth is not None:
        found["accuracy"] = float((of_file == truth).mean())
        found["model_accuracy"] = float((of_model == truth).mean())
    return found
