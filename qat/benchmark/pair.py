"""One pair of widths, from the float network to a file that is checked in all ways there are."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np
import tf_keras

from qat.account import quantization_report
from qat.apply import quantize_model
from qat.benchmark.networks import PIXEL_RANGE, Unwatched
from qat.data import ImageData
from qat.errors import QatError
from qat.export.tflite import export_tflite
from qat.larq_file import runs_on_larq
from qat.recipe import TERNARY, load_recipe
from qat.recommended import train_quantized
from qat.report import counted
from qat.settings import recommended
from qat.tflite_file import FileModel, read_file
from qat.verify.compare import Verification, verify_tflite
from qat.verify.integer import simulate
from qat.verify.larq import open_runner

# Of the test images, for the kernels that run one image at a time.
COMPARED_IMAGES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A pair and what it needs.

    Attributes:
        recipe: e.g. "w4a8". epochs: of quantized training, with the recommended settings.
        float_model: trained, the job's own. data: to train on and to verify with.
        target, weight_storage: as `export_tflite` takes them.
        path: of the .tflite file to write.
    """

    recipe: str
    epochs: int
    float_model: tf_keras.Model
    data: ImageData
    target: str
    weight_storage: str
    path: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a pair.

    Attributes:
        refused: why quantizing the network was refused, before any training; "" if it was not, and
            without it all else is None or empty.
        problems: what the file or the model must not have, one line each.
        levels: the most distinct integers in a channel of a kernel of the recipe's own width.
        containers: {type that a kernel is stored in: how many kernels}.
        activations: types of the tensors between operators.
        weight_bytes, file_bytes, model_accuracy, accuracy, agreement: as `Verification` has them.
        codes: the output codes that were compared. model_file, model_reference, file_reference: of
            them, [share that differs, largest difference in codes] between the Keras model, the
            file on the target's default kernels and on its reference kernels.
    """

    refused: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    levels: int | None = None
    containers: dict[str, int] = dataclasses.field(default_factory=dict)
    activations: list[str] = dataclasses.field(default_factory=list)
    weight_bytes: int | None = None
    file_bytes: int | None = None
    model_accuracy: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    codes: int | None = None
    model_file: list[float] | None = None
    model_reference: list[float] | None = None
    file_reference: list[float] | None = None


def outcome(job: Job) -> Outcome:
    """Quantizes, trains, exports and checks the pair.

    Raises:
        QatError: once training has begun, which is no refusal: something is wrong.
    """
    try:
        model = quantize_model(job.float_model, job.recipe, input_range=PIXEL_RANGE)
    except QatError as error:
        return Outcome(refused=" ".join(str(error).split()))
    train_quantized(
        model,
        job.float_model,
        Unwatched(job.data),
        recommended(job.recipe),
        epochs=job.epochs,
        weight_storage=job.weight_storage,
        target=job.target,
    )
    export_tflite(model, job.path, target=job.target, weight_storage=job.weight_storage)
    found, file = verify_tflite(job.path, model, job.data.test), read_file(job.path)
    bits = {row.name: row.weight_bits for row in quantization_report(model) if row.weight_bits}
    levels = _levels(file)
    outputs = _output_codes(job, model, file)
    return Outcome(
        problems=[
            *_of_file(found),
            *_of_kernels(job.recipe, levels, bits),
            *_of_outputs(outputs),
        ],
        levels=max(
            (levels.get(name, 0) for name in bits if bits[name] == min(bits.values())), default=None
        ),
        containers=_containers(file, bits),
        activations=_activations(file),
        weight_bytes=found.weight_bytes,
        file_bytes=found.bytes,
        model_accuracy=found.model_accuracy,
        accuracy=found.accuracy,
        agreement=found.agreement,
        codes=outputs["model"].size,
        model_file=_difference(outputs["model"], outputs["default"]),
        model_reference=_difference(outputs["model"], outputs["reference"]),
        file_reference=_difference(outputs["default"], outputs["reference"]),
    )


# ---------------------------------------------------------------- kernels


def _kernels(file: FileModel) -> dict[str, tuple[Any, int]]:
    """{layer: (stored kernel, axis of its channels)}, by the names of the file's tensors."""
    unpacked, found = file.unpacked_constants(), {}
    weights = {id(tensor) for tensor in file.weights()}
    for op in file.operators:
        for tensor in op.inputs:
            kernel = unpacked.get(tensor.name, tensor)
            layer, slash, what = kernel.name.rpartition("/")
            if id(kernel) in weights and slash and what == "kernel":
                found[layer] = kernel, 3 if op.name == "DEPTHWISE_CONV_2D" else 0
    return found


def _levels(file: FileModel) -> dict[str, int]:
    """{layer: the most distinct integers in a channel of its kernel}."""
    found = {}
    for layer, (kernel, axis) in _kernels(file).items():
        if kernel.data is not None:
            channels = np.moveaxis(kernel.data, axis, 0).reshape(kernel.shape[axis], -1)
            found[layer] = max(len(np.unique(channel)) for channel in channels)
    return found


def _containers(file: FileModel, layers: Collection[str]) -> dict[str, int]:
    """Of the given layers: batch normalization on its own is a kernel in the file, too."""
    kernels = _kernels(file)
    return dict(collections.Counter(kernels[name][0].dtype for name in layers if name in kernels))


def _activations(file: FileModel) -> list[str]:
    unpacked = file.unpacked_constants()
    written = [tensor for op in file.operators for tensor in op.outputs]
    return sorted(
        {tensor.dtype for tensor in written if len(tensor.scale) and tensor.name not in unpacked}
    )


# ---------------------------------------------------------------- outputs


def _output_codes(job: Job, model: tf_keras.Model, file: FileModel) -> dict[str, np.ndarray]:
    """Codes of the output, (images, classes), by what computed them."""
    images = np.concatenate([x.numpy() for x, _ in job.data.test])[:COMPARED_IMAGES]
    (output,) = file.outputs
    (source,) = (op.inputs[0] for op in file.operators if op.outputs[0] is output)
    outputs = {"model": model(images, training=False).numpy()}
    for kernels in ("default", "reference"):
        (outputs[kernels],) = open_runner(job.path, kernels=kernels, threads=1).run(images)
        outputs[kernels] = outputs[kernels].values
    if not runs_on_larq(file):
        (outputs["simulator"],) = simulate(job.path, images)
    step = float(source.scale[0])
    return {name: np.rint(real / step).astype(np.int64) for name, real in outputs.items()}


def _difference(one: np.ndarray, other: np.ndarray) -> list[float]:
    """[share of codes that differ, the largest difference]."""
    return [float((one != other).mean()), int(np.abs(one - other).max())]


# ---------------------------------------------------------------- problems


def _of_file(found: Verification) -> list[str]:
    floats = found.float_operators
    return [*found.mismatches, *([f"operators in float: {counted(floats)}"] if floats else [])]


def _of_kernels(recipe: str, levels: dict[str, int], bits: dict[str, int]) -> list[str]:
    """Kernels that are missing from the file, or have more levels than their width allows."""
    narrow = load_recipe(recipe).rules[-1].weights.bits
    problems = []
    for layer, width in bits.items():
        # A ternary kernel's quantizer has 2 bits, and one level fewer than they allow.
        allowed = 3 if narrow == TERNARY and width == 2 else 2**width
        if layer not in levels:
            problems.append(f"{layer}: no kernel in the file")
        elif levels[layer] > allowed:
            problems.append(f"{layer}: {levels[layer]} levels in a channel, {allowed} are allowed")
    return problems


def _of_outputs(outputs: dict[str, np.ndarray]) -> list[str]:
    problems = []
    if len(np.unique(outputs["model"].argmax(-1))) < 2:
        problems.append("the model puts all images into one class, so the same class says nothing")
    if "simulator" in outputs:
        different = int((outputs["simulator"] != outputs["reference"]).sum())
        if different:
            problems.append(f"{different} codes differ between simulator and reference kernels")
    return problems
