"""A .tflite file as plain data, for the integer simulator.

Only the flatbuffer schema is shared with the rest of the world; every length is checked, since
the file may be truncated, damaged or something else.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qat.errors import QatError

MAX_ELEMENTS = 2**25
_MAX_RANK = 8
_OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
_OPTIONS = {v: k for k, v in vars(schema.BuiltinOptions).items() if isinstance(v, int) and v}
_TYPES = {v: k.lower() for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
# Type in the file → type of the array that holds its values.
ARRAY_TYPES = {
    "bool": np.bool_,
    "float32": np.float32,
    "int2": np.int8,
    "int4": np.int8,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
}
_PACKED_BITS = {"int2": 2, "int4": 4}
_GRIDS = {
    "int2": (-2, 1),
    "int4": (-8, 7),
    "int8": (-128, 127),
    "int16": (-32768, 32767),
    "uint8": (0, 255),
}


class SimulationError(QatError):
    """A file that cannot be simulated: foreign, damaged, or with an operator not covered here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor as the file states it.

    Attributes:
        name: may be empty in foreign files. dtype: "int8", "int4", "float32", … as in the schema.
        shape: dimensions. data: values of a constant (int4 and int2 unpacked to int8), or None.
        scales, zero_points: float32 and int64; one entry, one per channel, or none.
        axis: the dimension that several scales belong to.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray | None
    scales: np.ndarray
    zero_points: np.ndarray
    axis: int

    @property
    def scale(self) -> np.float32:
        """The one scale of an activation tensor."""
        if len(self.scales) != 1:
            raise SimulationError(f"tensor {self.name!r} has {len(self.scales)} scales, needs 1")
        return self.scales[0]

    @property
    def zero_point(self) -> int:
        """The zero point that goes with `scale`."""
        if len(self.zero_points) > 1:
            raise SimulationError(f"tensor {self.name!r} has a zero point per channel, needs 1")
        return int(self.zero_points[0]) if len(self.zero_points) else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator; `inputs` and `outputs` index the model's tensors, None = left out."""

    name: str
    options: Any
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The main subgraph, operators in execution order."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_model(model: bytes | str | os.PathLike) -> Model:
    """Reads a file or its bytes.

    Raises:
        SimulationError: cannot be opened, is no TFLite file, or is truncated or damaged.
    """
    content = bytes(model) if isinstance(model, bytes | bytearray) else _read(model)
    if content[4:8] != b"TFL3":
        raise SimulationError(f"not a .tflite file ({len(content)} bytes, no TFL3 mark)")
    try:
        return _Reader(content).model()
    except (
        # What the generated accessors and NumPy raise when an offset leads out of the file.
        IndexError,
        MemoryError,
        OverflowError,
        TypeError,
        UnicodeDecodeError,
        struct.error,
    ) as error:
        raise SimulationError(f"damaged .tflite file: {error}") from error
    except ValueError as error:
        if isinstance(error, SimulationError):
            raise
        raise SimulationError(f"damaged .tflite file: {error}") from error


def _read(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SimulationError(f"{os.fspath(path)}: {error.strerror}") from error


class _Reader:
    def __init__(self, content: bytes):
        self.size = len(content)
        self.root = schema.Model.GetRootAs(content, 0)

    def model(self) -> Model:
        if self._length(self.root.SubgraphsLength()) < 1:
            raise SimulationError("damaged .tflite file: it has no subgraph")
        graph = self.root.Subgraphs(0)
        tensors = tuple(
            self._tensor(graph.Tensors(i)) for i in range(self._length(graph.TensorsLength()))
        )
        operators = tuple(
            self._operator(graph.Operators(i), len(tensors))
            for i in range(self._length(graph.OperatorsLength()))
        )
        return Model(
            tensors=tensors,
            operators=operators,
            inputs=_indices(graph.InputsAsNumpy(), len(tensors)),
            outputs=_indices(graph.OutputsAsNumpy(), len(tensors)),
        )

    def _length(self, length: int) -> int:
        """A vector of offsets takes four bytes an element; more than fit is damage."""
        if length > self.size // 4:
            raise SimulationError("damaged .tflite file: a vector is longer than the file")
        return length

    def _tensor(self, tensor: schema.Tensor) -> Tensor:
        name = (tensor.Name() or b"").decode()
        dtype = _TYPES.get(tensor.Type(), str(tensor.Type()))
        if dtype not in ARRAY_TYPES:
            raise SimulationError(f"tensor {name!r} has type {dtype}, which is not simulated")
        if tensor.Sparsity() is not None:
            raise SimulationError(f"tensor {name!r} is sparse, which is not simulated")
        shape = tuple(int(n) for n in _vector(tensor.ShapeAsNumpy()))
        if len(shape) > _MAX_RANK or min(shape, default=1) < 0 or math.prod(shape) > MAX_ELEMENTS:
            raise SimulationError(f"tensor {name!r} has the impossible shape {shape[:_MAX_RANK]}")
        scales, zero_points, axis = _quantization(tensor.Quantization(), name, dtype)
        return Tensor(
            name=name,
            dtype=dtype,
            shape=shape,
            data=self._data(tensor.Buffer(), name, dtype, shape),
            scales=scales,
            zero_points=zero_points,
            axis=axis,
        )

    def _data(self, buffer: int, name: str, dtype: str, shape: tuple[int, ...]):
        if buffer >= self.root.BuffersLength():
            raise SimulationError(f"tensor {name!r} names buffer {buffer}, which does not exist")
        raw = _vector(self.root.Buffers(buffer).DataAsNumpy())
        if not len(raw):
            return None
        bits = _PACKED_BITS.get(dtype, 8 * np.dtype(ARRAY_TYPES[dtype]).itemsize)
        if len(raw) != (math.prod(shape) * bits + 7) // 8:
            raise SimulationError(f"tensor {name!r} has {len(raw)} bytes for shape {shape}")
        if dtype in _PACKED_BITS:
            return _unpack(raw, bits, math.prod(shape)).reshape(shape)
        return raw.view(ARRAY_TYPES[dtype]).reshape(shape)

    def _operator(self, operator: schema.Operator, tensors: int) -> Operator:
        index = operator.OpcodeIndex()
        if index >= self._length(self.root.OperatorCodesLength()):
            raise SimulationError(f"damaged .tflite file: operator code {index} does not exist")
        code = self.root.OperatorCodes(index)
        builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        inputs = _vector(operator.InputsAsNumpy())
        name = _OPERATORS.get(builtin, f"operator {builtin}")
        if name == "CUSTOM":
            name = f"custom {(code.CustomCode() or b'').decode()!r}"
        return Operator(
            name=name,
            options=_options(operator),
            inputs=tuple(None if i == -1 else _indices([i], tensors)[0] for i in inputs),
            outputs=_indices(operator.OutputsAsNumpy(), tensors),
        )


def _vector(values) -> np.ndarray:
    """The generated accessors answer 0 for a vector that the file leaves out."""
    return np.zeros(0, np.int64) if isinstance(values, int) else values


def _indices(values, count: int) -> tuple[int, ...]:
    indices = tuple(int(i) for i in _vector(values))
    if any(not 0 <= i < count for i in indices):
        raise SimulationError("damaged .tflite file: it names a tensor that does not exist")
    return indices


def _options(operator: schema.Operator):
    table, kind = operator.BuiltinOptions(), _OPTIONS.get(operator.BuiltinOptionsType())
    if table is None or kind is None:
        return None
    accessor = getattr(schema, kind)()
    accessor.Init(table.Bytes, table.Pos)
    return getattr(schema, f"{kind}T").InitFromObj(accessor)


def _quantization(quantization, name: str, dtype: str) -> tuple[np.ndarray, np.ndarray, int]:
    if quantization is None:
        return np.zeros(0, np.float32), np.zeros(0, np.int64), 0
    scales = _vector(quantization.ScaleAsNumpy()).astype(np.float32)
    zero_points = _vector(quantization.ZeroPointAsNumpy()).astype(np.int64)
    if dtype in _GRIDS:
        lowest, highest = _GRIDS[dtype]
        if not np.all(np.isfinite(scales) & (scales > 0)):
            raise SimulationError(f"tensor {name!r} has a scale that is not a positive number")
        if np.any((zero_points < lowest) | (zero_points > highest)):
            raise SimulationError(f"tensor {name!r} has a zero point outside its type {dtype}")
    return scales, zero_points, quantization.QuantizedDimension()


def _unpack(raw: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Two's complement fields of a byte, the first in its lowest bits."""
    fields = (raw[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
    sign = 2 ** (bits - 1)
    return ((fields.reshape(-1)[:size].astype(np.int16) ^ sign) - sign).astype(np.int8)
