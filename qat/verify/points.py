"""Where a Keras model and its file can be compared: the tensors that lie on a grid in both."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat.canonical import Call, calls, rebuild, stand_ins
from qat.deep import deep_models
from qat.grid import Grid
from qat.layers import FakeQuantize
from qat.tflite_file import FileModel, FileTensor

Codes = dict[str, np.ndarray]  # by a tensor's name, (examples, …)
_GRIDS = ("int8", "int16")
# A number that makes a name unique, and what stands behind it where codes go through more than one
# operator.
_NUMBER = r"(_\d+)?"
_LATER = rf"(/(int8|clamped|reshape|sign){_NUMBER})*"


@dataclasses.dataclass(frozen=True)
class Point:
    """A call whose output lies on a grid.

    Attributes:
        call: of a FakeQuantize, or of a wrapper that quantizes its output.
        grid: of the output, NumPy.
        tensor: of the file, that holds the output's codes; None where no tensor does.
    """

    call: Call
    grid: Grid
    tensor: FileTensor | None

    def codes(self, reals: np.ndarray) -> np.ndarray:
        """`round(x / scale) + zero_point`, int64."""
        codes = np.rint(reals.astype(np.float64) / float(self.grid.scale))
        return (codes + float(self.grid.zero_point)).astype(np.int64)

    def reals(self, codes: np.ndarray) -> np.ndarray:
        """`(code - zero_point) · scale` in float32, in Keras's shape (examples, …)."""
        whole = codes.astype(np.float32) - np.float32(self.grid.zero_point)
        return (whole * self.grid.scale).reshape(-1, *self.call.output.shape[1:])


class KerasCodes:
    """The codes of a model at its points, by the names of the file's tensors."""

    def __init__(self, model: tf_keras.Model, found: list[Point], inputs: Sequence[np.ndarray]):
        self.model, self.points, self.inputs = model, found, list(inputs)
        self.shared = [point for point in found if point.tensor is not None]

    @deep_models()
    def codes(self, given: Codes | None = None) -> Codes:
        """Codes of every point; each computed from those given of the points before, if any are."""
        if not self.shared:
            return {}
        if given is None:
            outputs = [point.call.output for point in self.shared]
            reals = tf_keras.Model(self.model.inputs, outputs)(self.inputs, training=False)
        else:
            exact = [point.reals(given[point.tensor.name]) for point in self.shared]
            reals = self._cut([*self.inputs, *exact], training=False)
        reals = reals if isinstance(reals, list) else [reals]
        return {
            point.tensor.name: point.codes(values.numpy())
            for point, values in zip(self.shared, reals, strict=True)
        }

    @functools.cached_property
    def _cut(self) -> tf_keras.Model:
        """The model cut at its points: (inputs, values at all points) → values at all points."""
        given = stand_ins(self.model, [point.call.output for point in self.shared])
        own = {}

        def visit(call, args, kwargs):
            output = call.layer(*args, **kwargs)
            place = id(call.outputs[0])
            if place not in given:
                return output
            own[place] = output
            return given[place]

        cut = rebuild(self.model, visit, more_inputs=list(given.values()))
        return tf_keras.Model(cut.inputs, [own[id(point.call.output)] for point in self.shared])


def points(model: tf_keras.Model, file: FileModel) -> list[Point]:
    """The points of a functional model, in the order of its calls.

    What an operator of the file writes goes with a call if it has the call's name, its grid and as
    many elements. Where pooling keeps its input's grid, it has the pooling layer's name.
    """
    written = [tensor for op in file.operators for tensor in op.outputs]
    layers = {getattr(layer, "layer", layer).name for layer in model.layers}
    producer = {id(call.output): call for call in calls(model) if len(call.outputs) == 1}
    found, taken = [], set()
    for call in calls(model):
        grid = _grid(call.layer)
        if grid is None:
            continue
        here = [
            tensor
            for tensor in written
            if tensor.name not in taken and _lies_on(tensor, grid, call.output.shape[1:])
        ]
        tensor = _tensor(_name(call.layer), here, layers)
        if tensor is None and id(call.inputs[0]) in producer:
            tensor = _tensor(_name(producer[id(call.inputs[0])].layer), here, layers)
        if tensor is not None:
            taken.add(tensor.name)
        found.append(Point(call, grid, tensor))
    return found


def absence(point: Point, model: tf_keras.Model, file: FileModel) -> str:
    """Why no tensor of the file can be compared with a point."""
    if any(tensor.name == f"{_name(point.call.layer)}/sign/bits" for tensor in file.tensors):
        return "its signs are packed bits, which the check of the integers has compared"
    integers = any(tensor.dtype != "float32" for tensor in file.inputs)
    if integers and any(point.call.inputs[0] is tensor for tensor in model.inputs):
        return "the file takes its codes as they are"
    return "no operator of the file writes a tensor with its name, grid and shape"


def _tensor(name: str, tensors: list[FileTensor], layers: set[str]) -> FileTensor | None:
    """The last of the tensors that one call writes under this name."""
    pattern = re.compile(f"({re.escape(name)}{_NUMBER}){_LATER}")
    named = [
        (match[1], tensor)
        for tensor in tensors
        if (match := pattern.fullmatch(tensor.name))
        and (tensor.name == name or tensor.name not in layers)
    ]
    return [tensor for stem, tensor in named if stem == named[0][0]][-1] if named else None


def _name(layer: tf_keras.layers.Layer) -> str:
    return getattr(layer, "layer", layer).name.removesuffix("_fake_quantize")


def _grid(layer: tf_keras.layers.Layer) -> Grid | None:
    if isinstance(layer, FakeQuantize):
        quantizer, weights = layer.quantizer, layer.quantizer_weights
    elif isinstance(layer, QuantizeWrapper) and layer._output_quantizers:
        quantizer, weights = layer._output_quantizers[0], layer._output_quantizer_vars
    else:
        return None
    with tf.device("/CPU:0"):
        return quantizer.grid(weights).numpy()


def _lies_on(tensor: FileTensor, grid: Grid, shape: tuple[int, ...]) -> bool:
    return (
        tensor.dtype in _GRIDS
        and tensor.data is None
        and len(tensor.scale) == 1
        and tensor.scale[0] == grid.scale
        and tensor.zero_point[0] == grid.zero_point
        and np.prod(tensor.shape[1:]) == np.prod(shape)
    )
