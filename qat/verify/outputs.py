"""The outputs of a file and of its model over a whole dataset."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import tensorflow as tf
import tf_keras

from qat.batches import inputs_and_labels
from qat.errors import QatError
from qat.forward import predictor
from qat.tflite_file import FileError, FileModel, FileTensor
from qat.verify.differences import Difference, difference
from qat.verify.interpreter import Codes, Runner


@dataclasses.dataclass(frozen=True)
class Output:
    """One output over all examples, in reals.

    Attributes:
        name: of the file's tensor. step: of its grid, or of that which it is dequantized from; None
            for other float outputs.
        keras, default: of the model, and of the file on default kernels, float32 (examples, …).
    """

    name: str
    step: float | None
    keras: np.ndarray
    default: np.ndarray

    def snr_db(self) -> float:
        """The model's signal, about its mean over the examples, against the file's difference.

        About zero where nothing is left of it: of a single example, or of a constant output. Beside
        a model that gives zeros alone, a file that does not has some -3000 dB.
        """
        keras = self.keras.astype(np.float64)
        noise = np.square(keras - self.default).sum()
        signal = np.square(keras - keras.mean(axis=0)).sum() or np.square(keras).sum()
        least = np.finfo(np.float64).tiny
        return float(10 * np.log10(max(signal, least) / noise)) if noise else float("inf")

    def differences(self, reference: np.ndarray | None) -> dict[str, Difference]:
        """{pair: how far apart, in steps}; none for an output without a grid.

        reference: what the reference kernels give for the first examples.
        """
        if self.step is None:
            return {}
        ways = {"keras": self.keras, "default": self.default, "reference": reference}
        pairs = [("keras", "default")]
        if reference is not None:
            pairs += [("keras", "reference"), ("default", "reference")]
        codes = {
            name: np.rint(reals.astype(np.float64) / self.step)
            for name, reals in ways.items()
            if reals is not None
        }
        return {
            f"{one}_{other}": difference(*_same_length(codes[one], codes[other]))
            for one, other in pairs
        }


@dataclasses.dataclass(frozen=True)
class Runs:
    """What a dataset gave.

    Attributes:
        outputs: of the file, in its order. labels: a batch each; None without labels.
        inputs: arrays of the first examples.
    """

    outputs: list[Output]
    labels: list[np.ndarray | None]
    inputs: list[np.ndarray]


def run_all(
    runner: Runner, file: FileModel, model: tf_keras.Model, dataset: tf.data.Dataset, keep: int
) -> Runs:
    """Runs a file and its model over a dataset.

    Args:
        dataset: as `verify_tflite` takes it. keep: of how many examples the inputs are kept.

    Raises:
        FileError: the file cannot be run on the data, or its outputs are not the model's.
        QatError: an empty dataset, or one without an end.
    """
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise QatError("the dataset to verify on has no end; give dataset.take(n)")
    predict = predictor(model)
    from_file, from_model, labels, first = [], [], [], []
    for batch in dataset:
        x, y = inputs_and_labels(model, batch)
        arrays = [tensor.numpy() for tensor in x]
        if sum(len(parts[0]) for parts in first) < keep:
            first.append(arrays)
        from_file.append(runner.run(*arrays))
        outputs = tf.nest.flatten(predict(x))
        from_model.append([output.numpy().astype(np.float32) for output in outputs])
        _require_same_shapes(runner.path, from_file[-1], from_model[-1])
        labels.append(None if y is None or tf.nest.is_nested(y) else np.asarray(y))
    if not labels:
        raise QatError("the dataset to verify on is empty")
    outputs = [
        Output(
            tensor.name,
            _step(file, tensor),
            np.concatenate(real),
            np.concatenate([part.values for part in codes]),
        )
        for tensor, codes, real in zip(
            file.outputs, zip(*from_file, strict=True), zip(*from_model, strict=True), strict=True
        )
    ]
    inputs = [np.concatenate(parts)[:keep] for parts in zip(*first, strict=True)]
    return Runs(outputs, labels, inputs)


def _require_same_shapes(
    path: str | os.PathLike, of_file: list[Codes], of_model: list[np.ndarray]
) -> None:
    shapes = [output.codes.shape for output in of_file]
    if shapes != [output.shape for output in of_model]:
        expected = ", ".join(str(output.shape) for output in of_model)
        raise FileError(
            f"{path} is not of this model: for a batch it gives {', '.join(map(str, shapes))}, the "
            f"model {expected}"
        )


def _step(file: FileModel, tensor: FileTensor) -> float | None:
    """A float output lies on the grid of what its DEQUANTIZE reads."""
    source = next((op.inputs[0] for op in file.operators if op.outputs[0] is tensor), tensor)
    scale = tensor.scale if len(tensor.scale) else source.scale
    return float(scale[0]) if len(scale) else None


def _same_length(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(one), len(other))
    return one[:length], other[:length]
