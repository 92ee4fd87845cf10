"""An independent simulator of integer TFLite files: NumPy on the bytes, no TensorFlow.

It gives the codes of LiteRT's reference kernels (BUILTIN_REF), every intermediate tensor
included, without a mismatch. It shares no code with the exporter, so that the two check each other.

Covered; activations are int8, and int16 where the table says so:

| operators | kernels, int8 activations | kernels, int16 activations |
|---|---|---|
| CONV_2D (grouped too) | int8, int4 | int8, int4; int64 or declared int32 bias |
| DEPTHWISE_CONV_2D | int8, int4 | int8; int64 bias |
| TRANSPOSE_CONV | int8 | int8; int64 or declared int32 bias |
| FULLY_CONNECTED | int8, int4, int2 | int8, int4; int64 or declared int32 bias |

| operators | besides int8 |
|---|---|
| ADD, SUB, MUL, MAXIMUM, MINIMUM, GREATER_EQUAL, BATCH_MATMUL | int16 |
| RELU, RELU6, LEAKY_RELU, PRELU, LOGISTIC, TANH, SOFTMAX | int16 |
| HARD_SWISH, ELU, GELU (exact), EXP | none |
| MAX_POOL_2D, AVERAGE_POOL_2D, MEAN, REDUCE_MAX, RESIZE_BILINEAR | int16 |
| CONCATENATION, PAD, PADV2, RESHAPE, SQUEEZE, EXPAND_DIMS, SPLIT | int16, uint8, float32, bool |
| SLICE, STRIDED_SLICE, RESIZE_NEAREST_NEIGHBOR, TRANSPOSE, TILE | int16, uint8, float32, bool |
| SELECT_V2, GATHER (first axis) | int16, float32 |
| CAST | int16, int32, float32 as input; int32, int64 as output |
| QUANTIZE | float32, int16 and uint8 as input; int16 and uint8 as output; not int16 to uint8 |
| DEQUANTIZE | int2, int4, int16, uint8 |

ADD also adds int32. Every one of these but ELU has a reference kernel. What BUILTIN_REF refuses
although other kernels run it:

| file | here |
|---|---|
| DEPTHWISE_CONV_2D with int4 kernels, version 7 | the codes of version 6, which BUILTIN_REF runs |

Operator versions are not looked at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np

from qat.verify import (
    integer_curves,
    integer_elementwise,
    integer_linear,
    integer_shape,
    integer_tables,
    integer_windows,
)
from qat.verify.integer_call import Call, Value
from qat.verify.reader import (
    ARRAY_TYPES,
    MAX_ELEMENTS,
    Operator,
    SimulationError,
    Tensor,
    read_model,
)

__all__ = ["SimulationError", "Simulator", "simulate"]

_KERNELS = {
    **integer_curves.KERNELS,
    **integer_elementwise.KERNELS,
    **integer_linear.KERNELS,
    **integer_shape.KERNELS,
    **integer_tables.KERNELS,
    **integer_windows.KERNELS,
}


def simulate(model: bytes | str | os.PathLike, *inputs: np.ndarray) -> list[np.ndarray]:
    """The codes of all outputs; see `Simulator`."""
    return Simulator(model).run(*inputs)


class Simulator:
    """A file, read once and run often.

    Attributes:
        inputs, outputs: the tensors that enter and leave, with their types, shapes and grids.
    """

    def __init__(self, model: bytes | str | os.PathLike):
        """Reads a file, by its path or its bytes.

        Raises:
            SimulationError: missing, truncated, damaged, or no TFLite file.
        """
        self._model = read_model(model)
        self.inputs: tuple[Tensor, ...] = self._tensors(self._model.inputs)
        self.outputs: tuple[Tensor, ...] = self._tensors(self._model.outputs)

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The codes of all outputs, in the outputs' types.

        Args:
            inputs: one array per input, in its type and shape; the first dimension may have any
                size, as after LiteRT's `resize_tensor_input`.

        Raises:
            SimulationError: an operator, type or option that is not covered (the module's
                docstring lists them), a file that LiteRT refuses, inputs that do not fit.
        """
        values = self._values(inputs, {})
        missing = [tensor.name for i, tensor in self._named(self._model.outputs) if i not in values]
        if missing:
            raise SimulationError(f"no operator writes the output {missing[0]!r}")
        return [values[i] for i in self._model.outputs]

    def tensors(
        self, *inputs: np.ndarray, given: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """{name: codes} of the inputs and of everything that an operator writes; see `run`.

        given: codes that operators read in the place of what others have written, by name.
        """
        values = self._values(inputs, given or {})
        names = {i: self._model.tensors[i].name for i in values}
        if len(set(names.values())) < len(names):
            raise SimulationError("several tensors of the file have the same name")
        return {names[i]: codes for i, codes in values.items()}

    def _tensors(self, indices: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(self._model.tensors[i] for i in indices)

    def _named(self, indices: tuple[int, ...]) -> list[tuple[int, Tensor]]:
        return list(zip(indices, self._tensors(indices), strict=True))

    def _values(
        self, inputs: tuple[np.ndarray, ...], given: Mapping[str, np.ndarray]
    ) -> dict[int, np.ndarray]:
        """{index: codes} of all tensors but the constants."""
        if len(inputs) != len(self.inputs):
            raise SimulationError(f"the file has {len(self.inputs)} inputs, got {len(inputs)}")
        values = {
            i: _checked(tensor, codes)
            for (i, tensor), codes in zip(self._named(self._model.inputs), inputs, strict=True)
        }
        written = dict(values)
        with np.errstate(all="ignore"):
            for number, operator in enumerate(self._model.operators):
                try:
                    results = self._results(operator, values)
                except (ArithmeticError, IndexError, MemoryError, TypeError, ValueError) as error:
                    place = f"operator {number} ({operator.name})"
                    reason = " ".join(str(error).split())
                    raise SimulationError(f"{place} {reason}") from error
                written |= results
                names = {i: self._model.tensors[i].name for i in results}
                values |= {i: given.get(names[i], codes) for i, codes in results.items()}
        return written

    def _results(self, operator: Operator, values: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        if operator.name not in _KERNELS:
            raise SimulationError("is not simulated")
        call = Call(
            operator,
            tuple(None if i is None else self._value(i, values) for i in operator.inputs),
            self._tensors(operator.outputs),
        )
        results = _KERNELS[operator.name](call)
        if not isinstance(results, list):
            call.require(len(call.outputs) == 1, f"writes {len(call.outputs)} tensors, not 1")
            results = [results]
        for tensor in call.outputs:
            call.require(tensor.data is None, f"writes the constant {tensor.name!r}")
        # A copy, so that no result is a view of another tensor.
        return {
            i: np.array(codes, ARRAY_TYPES[tensor.dtype])
            for (i, tensor), codes in zip(self._named(operator.outputs), results, strict=True)
        }

    def _value(self, index: int, values: dict[int, np.ndarray]) -> Value:
        tensor = self._model.tensors[index]
        codes = values.get(index, tensor.data)
        if codes is None:
            raise SimulationError(f"reads {tensor.name!r}, which nothing has written")
        return Value(tensor, codes)


def _checked(tensor: Tensor, codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.dtype != ARRAY_TYPES[tensor.dtype]:
        raise SimulationError(f"input {tensor.name!r} is {tensor.dtype}, got {codes.dtype}")
    same_rank = codes.ndim == len(tensor.shape)
    if not same_rank or codes.shape[1:] != tensor.shape[1:] or not 0 < codes.size:
        raise SimulationError(f"input {tensor.name!r} has shape {tensor.shape}, got {codes.shape}")
    if math.prod(codes.shape) > MAX_ELEMENTS:
        raise SimulationError(f"input {tensor.name!r} of shape {codes.shape} is too large")
    return codes
