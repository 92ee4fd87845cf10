"""Small .tflite files made by hand, and what LiteRT's kernels answer to them."""

from __future__ import annotations

import dataclasses

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils

ARRAYS = {"int4": np.int8, "int2": np.int8, "bool": np.bool_}
LIMITS = {"int2": (-2, 1), "int4": (-8, 7)}
# The lowest versions that run the types used here.
VERSIONS = {
    "DEPTHWISE_CONV_2D": 6,
    "DEQUANTIZE": 7,
    "BATCH_MATMUL": 3,
    "FULLY_CONNECTED": 14,
    "CONV_2D": 7,
    "LEAKY_RELU": 2,
    "TRANSPOSE_CONV": 5,
    "PRELU": 1,
    "HARD_SWISH": 1,
    "RESHAPE": 1,
    "SQUEEZE": 1,
    "EXPAND_DIMS": 1,
    "SELECT_V2": 1,
    "CAST": 1,
    "ELU": 1,
    "TILE": 1,
}


@dataclasses.dataclass(kw_only=True)
class Tensor:
    """A tensor of the file; `data` makes it a constant."""

    dtype: str
    shape: tuple[int, ...]
    scale: float | np.ndarray | None = None
    zero_point: int = 0
    axis: int = 0
    data: np.ndarray | None = None

    def limits(self) -> tuple[int, int]:
        if self.dtype in LIMITS:
            return LIMITS[self.dtype]
        return int(np.iinfo(self.dtype).min), int(np.iinfo(self.dtype).max)


@dataclasses.dataclass(kw_only=True)
class Operator:
    name: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    options: dict
    version: int | None = None


def constant(values, dtype: str = "int32", **grid) -> Tensor:
    data = np.asarray(values, ARRAYS.get(dtype, dtype))
    return Tensor(dtype=dtype, shape=data.shape, data=data, **grid)


def model(*operators: Operator) -> bytes:
    """The file; tensors that no operator writes and that have no data are its inputs."""
    tensors: list[Tensor] = []
    for operator in operators:
        for tensor in (*operator.inputs, *operator.outputs):
            if tensor is not None and not any(tensor is t for t in tensors):
                tensors.append(tensor)
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    made = schema.ModelT()
    made.version, made.buffers, made.operatorCodes = 3, [schema.BufferT()], []
    graph = schema.SubGraphT()
    graph.tensors = [_tensor(made, tensor, i) for i, tensor in enumerate(tensors)]
    graph.operators = [_operator(made, operator, index) for operator in operators]
    written = {id(tensor) for operator in operators for tensor in operator.outputs}
    read = {id(tensor) for operator in operators for tensor in operator.inputs}
    graph.inputs = [i for i, t in enumerate(tensors) if t.data is None and id(t) not in written]
    graph.outputs = [i for i, t in enumerate(tensors) if id(t) in written - read]
    made.subgraphs = [graph]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(made))


def _tensor(made: schema.ModelT, tensor: Tensor, number: int) -> schema.TensorT:
    result = schema.TensorT()
    result.name, result.shape = f"t{number}", list(tensor.shape)
    result.type = getattr(schema.TensorType, tensor.dtype.upper())
    if tensor.scale is not None:
        scales = np.atleast_1d(np.asarray(tensor.scale, np.float32))
        result.quantization = schema.QuantizationParametersT()
        result.quantization.scale = scales.tolist()
        result.quantization.zeroPoint = [int(tensor.zero_point)] * len(scales)
        result.quantization.quantizedDimension = tensor.axis
    if tensor.data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(_packed(tensor), np.uint8)
        result.buffer = len(made.buffers)
        made.buffers.append(buffer)
    return result


def _packed(tensor: Tensor) -> bytes:
    if tensor.dtype not in LIMITS:
        return np.ascontiguousarray(tensor.data).tobytes()
    per_byte = {"int4": 2, "int2": 4}[tensor.dtype]
    packed = bytearray(-(-tensor.data.size // per_byte))
    for i, code in enumerate(tensor.data.reshape(-1).tolist()):
        bits = 8 // per_byte
        packed[i // per_byte] |= (code & (2**bits - 1)) << bits * (i % per_byte)
    return bytes(packed)


def _operator(made: schema.ModelT, operator: Operator, index: dict[int, int]) -> schema.OperatorT:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, operator.name)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = operator.version or VERSIONS.get(operator.name, 2)
    made.operatorCodes.append(code)
    result = schema.OperatorT()
    result.opcodeIndex = len(made.operatorCodes) - 1
    result.inputs = [-1 if tensor is None else index[id(tensor)] for tensor in operator.inputs]
    result.outputs = [index[id(tensor)] for tensor in operator.outputs]
    kind = OPTIONS[operator.name]
    if kind is not None:
        result.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        result.builtinOptions = getattr(schema, f"{kind}T")()
        for name, value in operator.options.items():
            assert hasattr(result.builtinOptions, name), f"{kind} has no field {name}"
            setattr(result.builtinOptions, name, value)
    return result


OPTIONS = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CAST": "CastOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "ELU": None,
    "EXP": "ExpOptions",
    "EXPAND_DIMS": "ExpandDimsOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GATHER": "GatherOptions",
    "GELU": "GeluOptions",
    "GREATER_EQUAL": "GreaterEqualOptions",
    "HARD_SWISH": "HardSwishOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "LOGISTIC": None,
    "MAXIMUM": "MaximumMinimumOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MUL": "MulOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "PRELU": None,
    "QUANTIZE": "QuantizeOptions",
    "REDUCE_MAX": "ReducerOptions",
    "RELU": None,
    "RELU6": None,
    "RESHAPE": "ReshapeOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "SELECT_V2": "SelectV2Options",
    "SLICE": "SliceOptions",
    "SOFTMAX": "SoftmaxOptions",
    "SPLIT": "SplitOptions",
    "SQUEEZE": "SqueezeOptions",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SUB": "SubOptions",
    "TANH": None,
    "TILE": "TileOptions",
    "TRANSPOSE": "TransposeOptions",
    "TRANSPOSE_CONV": "TransposeConvOptions",
}


def reference(
    content: bytes,
    *inputs: np.ndarray,
    every_tensor: bool = False,
    resolver: OpResolverType = OpResolverType.BUILTIN_REF,
) -> list[np.ndarray] | dict[str, np.ndarray]:
    """BUILTIN_REF's codes: of the outputs, or {name: codes} of every tensor it holds."""
    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=resolver,
        experimental_preserve_all_tensors=every_tensor,
        num_threads=1,
    )
    details = interpreter.get_input_details()
    for detail, codes in zip(details, inputs, strict=True):
        if tuple(detail["shape"]) != codes.shape:
            interpreter.resize_tensor_input(detail["index"], codes.shape)
    interpreter.allocate_tensors()
    for detail, codes in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], codes)
    interpreter.invoke()
    if not every_tensor:
        return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]
    return {
        detail["name"]: interpreter.get_tensor(detail["index"])
        for detail in interpreter.get_tensor_details()
        if detail["name"] and detail["dtype"] is not np.void
    }
