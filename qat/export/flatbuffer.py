"""A graph as the bytes of a .tflite file."""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from qat.export.containers import pack
from qat.export.graph import Graph, Operator, Tensor

_SCHEMA_VERSION = 3
_TARGET_METADATA = "qat.target"
_PLACEHOLDER_BUILTIN = 127  # what readers of old schemas see for newer operators
_NUMPY = {
    "float32": np.float32,
    "int2": np.int8,
    "int4": np.int8,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
_TYPES = {name: getattr(schema.TensorType, name.upper()) for name in _NUMPY}


def to_bytes(graph: Graph, *, description: str, target: str) -> bytes:
    """The file, with one subgraph, a "serving_default" signature, and its target as metadata."""
    writer = _Writer(graph)
    model = schema.ModelT()
    model.version = _SCHEMA_VERSION
    model.description = description
    model.subgraphs = [writer.subgraph()]
    model.metadata = [writer.metadata(_TARGET_METADATA, target)]
    model.operatorCodes = writer.operator_codes
    model.buffers = writer.buffers
    model.signatureDefs = [writer.signature()]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


class _Writer:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.tensors = graph.tensors()
        self.index = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        self.buffers = [schema.BufferT()]  # buffer 0 is "no data" by convention
        self.operator_codes: list[schema.OperatorCodeT] = []
        self.code_index: dict[tuple[str, int], int] = {}

    def subgraph(self) -> schema.SubGraphT:
        subgraph = schema.SubGraphT()
        subgraph.name = "main"
        subgraph.tensors = [self.tensor(tensor) for tensor in self.tensors]
        subgraph.operators = [self.operator(operator) for operator in self.graph.operators]
        subgraph.inputs = [self.index[id(tensor)] for tensor in self.graph.inputs]
        subgraph.outputs = [self.index[id(tensor)] for tensor in self.graph.outputs]
        return subgraph

    def tensor(self, tensor: Tensor) -> schema.TensorT:
        made = schema.TensorT()
        made.name, made.shape = tensor.name, list(tensor.shape)
        made.type = _TYPES[tensor.dtype]
        made.buffer = self.buffer(tensor)
        if tensor.scale is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = tensor.scale.astype(np.float32).tolist()
            made.quantization.zeroPoint = tensor.zero_point.astype(np.int64).tolist()
            made.quantization.quantizedDimension = tensor.axis
        return made

    def buffer(self, tensor: Tensor) -> int:
        if tensor.data is None:
            return 0
        data = np.asarray(tensor.data).astype(_NUMPY[tensor.dtype])
        packed = pack(data, tensor.dtype) if tensor.dtype in ("int2", "int4") else data
        return self.added(np.ascontiguousarray(packed).tobytes())

    def added(self, content: bytes) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(content, np.uint8)
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def metadata(self, name: str, content: str) -> schema.MetadataT:
        made = schema.MetadataT()
        made.name, made.buffer = name, self.added(content.encode())
        return made

    def operator(self, operator: Operator) -> schema.OperatorT:
        made = schema.OperatorT()
        made.opcodeIndex = self.operator_code(operator)
        made.inputs = [-1 if t is None else self.index[id(t)] for t in operator.inputs]
        made.outputs = [self.index[id(tensor)] for tensor in operator.outputs]
        if isinstance(operator.options, bytes):
            made.customOptions = np.frombuffer(operator.options, np.uint8)
        elif operator.options is not None:
            made.builtinOptions = operator.options
            kind = type(operator.options).__name__.removesuffix("T")
            made.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        return made

    def operator_code(self, operator: Operator) -> int:
        key = operator.name, operator.version
        if key not in self.code_index:
            code = schema.OperatorCodeT()
            if isinstance(operator.options, bytes):
                code.builtinCode, code.customCode = schema.BuiltinOperator.CUSTOM, operator.name
            else:
                code.builtinCode = getattr(schema.BuiltinOperator, operator.name)
            code.deprecatedBuiltinCode = min(code.builtinCode, _PLACEHOLDER_BUILTIN)
            code.version = operator.version
            self.code_index[key] = len(self.operator_codes)
            self.operator_codes.append(code)
        return self.code_index[key]

    def signature(self) -> schema.SignatureDefT:
        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.subgraphIndex = 0
        signature.inputs = [self.tensor_map(tensor) for tensor in self.graph.inputs]
        signature.outputs = [self.tensor_map(tensor) for tensor in self.graph.outputs]
        return signature

    def tensor_map(self, tensor: Tensor) -> schema.TensorMapT:
        made = schema.TensorMapT()
        made.name, made.tensorIndex = tensor.name, self.index[id(tensor)]
        return made
