"""The model, the file on two sets of kernels, and the simulator, compared tensor by tensor.

Each pair is compared twice. In total: each computes from the images on, so that a layer's codes
differ by what came before, too. On its own: both compute a layer from the same codes, those that
the pair's kernels gave, so that only the layer's own arithmetic is left.

| pair | first | second | on its own |
|---|---|---|---|
| keras_default | Keras model | default kernels | Keras reads the second's codes |
| keras_reference | Keras model | reference kernels | Keras reads the second's codes |
| default_reference | default kernels | reference kernels | the simulator reads the first's codes |
| reference_simulator | reference kernels | simulator | the simulator reads the first's codes |

Default kernels are XNNPACK's, or LiteRT's without it in files of target tflm (`open_runner`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tf_keras

from qat.canonical import functional
from qat.errors import QatError
from qat.tflite_file import FileError, FileModel, FileOperator, FileTensor
from qat.verify.differences import Difference, difference
from qat.verify.integer import SimulationError
from qat.verify.interpreter import Runner
from qat.verify.points import Codes, KerasCodes, absence, points
from qat.verify.recording import record, recordable, simulate

# Layers that a tensor is named after, in the name of what their operators read.
_KERNEL = re.compile(r"(.+)/(kernel|slope)(_\d+)?(/\w+)?")
# Steps of 16 bits that LiteRT's softmax may be off where a class is nearly sure: its two exponents
# half of 10 / 2^16 each (2.5 steps), the interpolation of exp (1.6) and the roundings (1).
_SOFTMAX_16 = 8
PAIRS = (
    ("keras", "default"),
    ("keras", "reference"),
    ("default", "reference"),
    ("reference", "simulator"),
)
PAIR_NAMES = tuple(map("_".join, PAIRS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One tensor computed in two ways; `own` is None where no way has the other's inputs."""

    total: Difference
    own: Difference | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A tensor of the file.

    Attributes:
        layer: whose kernel its operator reads, else whose name it has.
        tensor, dtype, operator: its name and type, and what writes it.
        pairs: by the pair's name; those that could be compared.
    """

    layer: str
    tensor: str
    dtype: str
    operator: str
    pairs: dict[str, Pair]

    def beyond_rounding(self, pair: str) -> bool:
        """Whether a layer's own codes differ by more than the kernels' roundings explain.

        The simulator must give the reference kernels' codes. Otherwise both compute one real
        number and round it, once or twice: codes are at most one step apart, two in 16 bits, whose
        curves are interpolated (more for softmax, see `_SOFTMAX_16`), and less than half of
        them are (of means, a quarter was seen).
        """
        own = self.pairs[pair].own if pair in self.pairs else None
        if own is None:
            return False
        if pair == "reference_simulator":
            return own.different > 0
        if self.dtype == "int16":
            return own.largest > (_SOFTMAX_16 if self.operator == "SOFTMAX" else 2)
        return own.largest > 1 or own.share > 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """All tensors of a file in order of execution.

    Attributes:
        examples: how many were run.
        rows: a tensor each.
        not_compared: {pair, or tensor of the model: why}.
    """

    examples: int
    rows: list[LayerRow]
    not_compared: dict[str, str]

    def first_departure(self, pair: str) -> LayerRow | None:
        """The first row on which the pair differs in total."""
        rows = (row for row in self.rows if pair in row.pairs)
        return next((row for row in rows if row.pairs[pair].total.different), None)


def affordable_examples(file: FileModel, most: int, multiplications: int = 10**9) -> int:
    """How many examples take so many multiplications: 1 at least, no more than `most`.

    NumPy simulates some 3·10^8 a second, the reference kernels compute ten times as many.
    """
    each = 1
    for op in file.operators:
        kernel = next((tensor for tensor in op.inputs if _KERNEL.match(tensor.name)), None)
        if kernel is not None:
            positions = int(np.prod(op.outputs[0].shape[1:-1]))
            each += int(np.prod(kernel.shape)) * positions
        if op.name == "BATCH_MATMUL":
            each += int(np.prod(op.outputs[0].shape)) * op.inputs[0].shape[-1]
    return min(most, max(1, multiplications // each))


def compare_layers(
    model: tf_keras.Model,
    file: FileModel,
    runners: Mapping[str, Runner | QatError],
    inputs: Sequence[np.ndarray],
) -> LayerComparison:
    """Compares every tensor of a file that lies on a grid.

    Args:
        model: the quantized model that the file was made from.
        file: as read.
        runners: "default" and "reference", or why there is none.
        inputs: float32 arrays (examples, …), one for each input.
    """
    try:
        tensors = recordable(file)
    except FileError as error:
        not_compared = {pair: str(error) for pair in PAIR_NAMES}
        return LayerComparison(examples=0, rows=[], not_compared=not_compared)
    return _Comparison(functional(model), file, tensors, runners, inputs).run()


class _Comparison:
    def __init__(self, model, file: FileModel, tensors: list[FileTensor], runners, inputs):
        self.file, self.tensors, self.inputs = file, tensors, inputs
        self.path = next(r.path for r in runners.values() if isinstance(r, Runner))
        names = {tensor.name for tensor in tensors}
        found = [  # of a damaged file perhaps not every tensor can be recorded
            point if point.tensor is None or point.tensor.name in names
            else dataclasses.replace(point, tensor=None)
            for point in points(model, file)
        ]  # fmt: skip
        self.keras = KerasCodes(model, found, inputs)
        self.not_compared = {
            point.call.layer.name: absence(point, model, file)
            for point in self.keras.points
            if point.tensor is None
        }
        self.codes: dict[str, Codes] = {"keras": self.keras.codes()}
        self.failed: dict[str, str] = {}
        for name, runner in runners.items():
            self._try(name, lambda runner=runner: self._recorded(runner))
        self._try("simulator", self._simulated)

    def run(self) -> LayerComparison:
        total, own = {}, {}
        for pair, name in zip(PAIRS, PAIR_NAMES, strict=True):
            missing = [way for way in pair if way not in self.codes]
            if missing:
                self.not_compared[name] = self.failed[missing[0]]
            else:
                total[name] = _differences(*(self.codes[way] for way in pair))
                own[name] = self._own(*pair, total[name])
        rows = []
        for op in self.file.operators:
            for tensor in op.outputs:
                pairs = {
                    name: Pair(total=found[tensor.name], own=own[name].get(tensor.name))
                    for name, found in total.items()
                    if tensor.name in found
                }
                if pairs and tensor.dtype != "bool":
                    names = {"layer": _layer(op), "tensor": tensor.name, "operator": op.name}
                    rows.append(LayerRow(**names, dtype=tensor.dtype, pairs=pairs))
        return LayerComparison(
            examples=len(self.inputs[0]), rows=rows, not_compared=self.not_compared
        )

    def _own(self, first: str, second: str, total: dict[str, Difference]) -> dict[str, Difference]:
        if not any(found.different for found in total.values()):
            return total  # with nothing inherited either
        if first == "keras":
            fed = self.keras.codes(given=self.codes[second])
            return _differences(fed, self.codes[second])
        if "simulator" in self.codes:
            self._try("fed", lambda: self._simulated(given=self.codes[first]))
        if "fed" in self.codes:
            return _differences(self.codes[first], self.codes.pop("fed"))
        reason = self.failed.get("simulator") or self.failed.get("fed")
        self.not_compared[f"{first}_{second}, each layer on its own"] = reason
        return {}

    def _try(self, name: str, compute: Callable[[], Codes]) -> None:
        try:
            self.codes[name] = compute()
        except (FileError, SimulationError) as error:
            self.failed[name] = f"{name}: {error}"

    def _recorded(self, runner: Runner | QatError) -> Codes:
        if isinstance(runner, QatError):
            raise runner
        return record(runner, self.tensors, self.inputs)

    def _simulated(self, given: Codes | None = None) -> Codes:
        return simulate(self.path, self.tensors, self.inputs, given)


def _differences(first: Codes, second: Codes) -> dict[str, Difference]:
    return {
        name: difference(codes.reshape(second[name].shape), second[name])
        for name, codes in first.items()
    }


def _layer(op: FileOperator) -> str:
    matches = (_KERNEL.fullmatch(tensor.name) for tensor in op.inputs)
    match = next(filter(None, matches), None)
    return match[1] if match else op.outputs[0].name.split("/")[0]
