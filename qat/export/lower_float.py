"""A layer in float32, in the operators that TensorFlow's own converter finds for it.

The converter's choices are harmless here: there are no integers to get wrong. So every layer that
it can write with TFLite's operators can stay in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from qat.export.builder import Builder, Stored
from qat.export.graph import ExportError, Operator, Tensor

_DTYPES = {v: k.lower() for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
_OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
_ARRAYS = {"float32": np.float32, "int32": np.int32, "int64": np.int64, "bool": np.bool_}


def lower_float(
    builder: Builder,
    name: str,
    layer: tf_keras.layers.Layer,
    inputs: Sequence[Stored],
    apply: Callable[..., tf.Tensor] | None = None,
) -> Stored:
    """The layer's operators, copied from a file that the converter makes of this layer alone.

    Args:
        name: of the output.
        apply: of the inputs' tensors; None = the layer is called with the first one.

    Raises:
        ExportError: the converter has no TFLite operators for it, or only those with a state.
    """
    values = [builder.to_float(value, f"{name}/input") for value in inputs]
    for value in values:
        if value.gain != 1.0:
            raise ExportError(f"{name!r} reads a rescaled tensor; put the Rescaling elsewhere")
    file = _converted(name, layer, values, apply or layer)
    graph = file.subgraphs[0]
    if len(file.subgraphs) != 1 or any(tensor.isVariable for tensor in graph.tensors):
        raise ExportError(
            f"layer {name!r} ({type(layer).__name__}) loops or keeps a state in the file"
        )
    tensors = [_tensor(builder, name, tensor, file.buffers) for tensor in graph.tensors]
    for index in graph.inputs:  # not in the function's order
        number = re.search(r"x(\d+)", graph.tensors[index].name.decode())[1]
        tensors[index] = values[int(number)].tensor
    (output,) = graph.outputs
    tensors[output].name = builder.name(name)
    for operator in graph.operators:
        builder.graph.operators.append(_operator(name, operator, file, tensors))
    return Stored(tensors[output], None)


def _converted(name: str, layer, values: list[Stored], apply: Callable) -> schema.ModelT:
    specs = [
        tf.TensorSpec(value.shape, tf.as_dtype(value.tensor.dtype), name=f"x{i}")
        for i, value in enumerate(values)
    ]
    function = tf.function(lambda *tensors: apply(*tensors), autograph=False)
    try:
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [function.get_concrete_function(*specs)], layer
        )
        return flatbuffer_utils.convert_bytearray_to_object(bytearray(converter.convert()))
    except Exception as error:  # the converter raises whatever its passes come upon
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"layer {name!r} ({type(layer).__name__}) has no TFLite operators, not even in "
            f"float32: {reason}"
        ) from error


def _tensor(builder: Builder, name: str, tensor: schema.TensorT, buffers: list) -> Tensor:
    dtype = _DTYPES[tensor.type]
    shape = tuple(int(n) for n in (tensor.shape if tensor.shape is not None else ()))
    raw = buffers[tensor.buffer].data
    data = None
    if raw is not None and len(raw):
        data = np.asarray(raw, np.uint8).view(_ARRAYS[dtype]).reshape(shape)
    own = tensor.name.decode().split(";")[0].split("/")[-1]
    return Tensor(name=builder.name(f"{name}/{own}"), shape=shape, dtype=dtype, data=data)


def _operator(name: str, operator: schema.OperatorT, file: schema.ModelT, tensors) -> Operator:
    code = file.operatorCodes[operator.opcodeIndex]
    builtin = _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
    if builtin == "CUSTOM" or operator.builtinOptions2 is not None:
        raise ExportError(f"layer {name!r} needs the operator {builtin}, which is not TFLite's own")
    return Operator(
        name=builtin,
        version=code.version,
        inputs=[None if i < 0 else tensors[i] for i in operator.inputs],
        outputs=[tensors[i] for i in operator.outputs],
        options=operator.builtinOptions,
    )
