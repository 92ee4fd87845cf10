"""What a .tflite file holds, read from its bytes alone."""

from __future__ import annotations

import collections
import dataclasses
import os

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from qat import larq_file
from qat.errors import QatError

_TYPE_NAMES = {v: k.lower() for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
_OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
_NUMPY = {"int8": np.int8, "uint8": np.uint8, "int16": np.int16, "int32": np.int32}
_NUMPY |= {"int64": np.int64, "float32": np.float32}
_TARGET = b"qat.target"  # metadata of files of ours
_FLOATS = ("float16", "float32", "float64")


class FileError(QatError):
    """A file that is no .tflite model, or that the interpreter refuses. One line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor as the file states it; `bytes` is the size of its constant data, or 0.

    The kernel of an LceBconv2d is of dtype "bit": ±1 in OHWI, whatever the words that hold it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: np.ndarray
    zero_point: np.ndarray
    bytes: int
    data: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOperator:
    """An operator with the tensors it reads and writes."""

    name: str
    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileModel:
    """The main subgraph of a file.

    Attributes:
        target: that the file says it was written for; None in files that are not ours.
    """

    tensors: tuple[FileTensor, ...]
    operators: tuple[FileOperator, ...]
    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    target: str | None = None

    def operator_counts(self) -> dict[str, int]:
        """{operator: how often}, by name."""
        return dict(sorted(collections.Counter(op.name for op in self.operators).items()))

    def float_operators(self) -> list[str]:
        """Names of the operators that compute in float, in order.

        The boundary QUANTIZE and DEQUANTIZE of float inputs and outputs are none, nor is
        unpacking a constant.
        """
        return [op.name for op in self.operators if _is_float(op) and not self._boundary(op)]

    def weight_reads(self) -> list[tuple[FileOperator, FileTensor, FileTensor]]:
        """(operator, the kernel or bias that it reads, the constant that this is unpacked from)."""
        unpacked = self.unpacked_constants()
        read = [(op, tensor) for op in self.operators for tensor in _kernel_and_bias(op)]
        found = [(op, tensor, unpacked.get(tensor.name, tensor)) for op, tensor in read]
        return [(op, tensor, stored) for op, tensor, stored in found if stored.bytes]

    def weights(self) -> list[FileTensor]:
        """All kernels and biases: constants, packed or not, of operators that have kernels."""
        return [stored for _, _, stored in self.weight_reads()]

    def weight_bytes(self) -> int:
        """Packed bytes of all weights."""
        return sum(tensor.bytes for tensor in self.weights())

    def float_weight_bytes(self) -> int:
        """The same weights as float32."""
        return 4 * sum(int(np.prod(tensor.shape)) for tensor in self.weights())

    def unpacked_constants(self) -> dict[str, FileTensor]:
        """For the name of each tensor that constants are unpacked to by DEQUANTIZE, and perhaps a
        QUANTIZE behind it, the constant."""
        found: dict[str, FileTensor] = {}
        for op in self.operators:
            if op.name in ("DEQUANTIZE", "QUANTIZE") and op.inputs and op.outputs:
                (source, *_), (made, *_) = op.inputs, op.outputs
                if source.name in found or (op.name == "DEQUANTIZE" and source.bytes):
                    found[made.name] = found.get(source.name, source)
        return found

    def _boundary(self, op: FileOperator) -> bool:
        if op.name not in ("QUANTIZE", "DEQUANTIZE"):
            return False
        if op.inputs[0].bytes or op.outputs[0].name in self.unpacked_constants():
            return True
        ends = {id(tensor) for tensor in (*self.inputs, *self.outputs)}
        return id(op.inputs[0] if op.name == "QUANTIZE" else op.outputs[0]) in ends


def _is_float(op: FileOperator) -> bool:
    # LceBconv2d's float32 multipliers and biases are what CONV_2D's scales and biases are:
    # constants of the requantization inside an operator that reads bits and writes int8.
    read = () if op.name == larq_file.CONVOLUTION else op.inputs
    return any(tensor.dtype in _FLOATS for tensor in (*read, *op.outputs))


def _kernel_and_bias(op: FileOperator) -> tuple[FileTensor, ...]:
    if op.name == "TRANSPOSE_CONV":
        return op.inputs[1:2] + op.inputs[3:]  # the first is its output's shape
    if op.name == "GATHER":
        return op.inputs[:1] if len(op.inputs[0].shape) > 1 else ()  # rows, not a curve's codes
    kernels = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", larq_file.CONVOLUTION)
    return op.inputs[1:] if op.name in kernels else ()


def read_file(path: str | os.PathLike) -> FileModel:
    """The file's tensors and operators.

    Raises:
        FileError: missing, truncated or foreign.
    """
    content = read_bytes(os.fspath(path))
    try:
        model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
        return _file_model(model)
    except Exception as error:  # the generated reader raises whatever a wild offset leads to
        raise FileError(f"{os.fspath(path)} is damaged: {type(error).__name__}: {error}") from error


def read_bytes(path: str) -> bytes:
    """The file's content, if it says that it is a TFLite flatbuffer.

    Raises:
        FileError: cannot be read, or is something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    if content[4:8] != b"TFL3":
        raise FileError(f"{path} is not a .tflite file ({len(content)} bytes, no TFL3 mark)")
    return content


def _file_model(model: schema.ModelT) -> FileModel:
    graph = model.subgraphs[0]
    tensors = tuple(_tensor(tensor, model.buffers) for tensor in graph.tensors)
    operators = []
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        name = _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        operators.append(
            FileOperator(
                name=code.customCode.decode() if name == "CUSTOM" else name,
                inputs=tuple(tensors[i] for i in op.inputs if i >= 0),
                outputs=tuple(tensors[i] for i in op.outputs),
            )
        )
    return FileModel(
        tensors=tensors,
        operators=tuple(larq_file.seen_as_bits(op, operators) for op in operators),
        inputs=tuple(tensors[i] for i in graph.inputs),
        outputs=tuple(tensors[i] for i in graph.outputs),
        target=_target(model),
    )


def _target(model: schema.ModelT) -> str | None:
    for entry in model.metadata or ():
        if entry.name == _TARGET:
            return bytes(model.buffers[entry.buffer].data).decode()
    return None


def _tensor(tensor: schema.TensorT, buffers: list) -> FileTensor:
    shape = tuple(int(n) for n in (tensor.shape if tensor.shape is not None else ()))
    dtype = _TYPE_NAMES[tensor.type]
    quantization = tensor.quantization
    scale = None if quantization is None else quantization.scale
    zero_point = None if quantization is None else quantization.zeroPoint
    raw = buffers[tensor.buffer].data
    raw = np.zeros(0, np.uint8) if raw is None else np.asarray(raw, np.uint8)
    return FileTensor(
        name=tensor.name.decode(),
        shape=shape,
        dtype=dtype,
        scale=np.asarray([] if scale is None else scale, np.float32),
        zero_point=np.asarray([] if zero_point is None else zero_point, np.int64),
        bytes=len(raw),
        data=_values(raw, dtype, shape) if len(raw) else None,
    )


def _values(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if dtype in ("int2", "int4"):
        bits = int(dtype[-1])
        fields = np.stack([raw >> shift for shift in range(0, 8, bits)], axis=1).reshape(-1)
        codes = (fields[: int(np.prod(shape))] << (8 - bits)).astype(np.int8) >> (8 - bits)
        return codes.reshape(shape)
    return raw.view(_NUMPY[dtype]).reshape(shape) if dtype in _NUMPY else None
