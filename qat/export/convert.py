"""A quantized Keras model becomes a graph of integer operators, layer by layer.

The file's structure is derived from the Keras model, never from a converter's choices: each
fused group is the one that training put a single quantizer behind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import (
    QuantizeLayer,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.canonical import Call, calls, consumers, functional
from qat.export import larq
from qat.export.builder import Builder, Stored
from qat.export.freeze import (
    FrozenKernel,
    freeze_activation,
    freeze_kernel,
    freeze_output,
    is_sign,
)
from qat.export.graph import ExportError, Graph, Tensor, activation_dtype
from qat.export.linear import Linear
from qat.export.lower_float import lower_float
from qat.export.lower_linear import AFFINE, affine_of, lower_affine, lower_linear
from qat.export.lower_reactnet import lower_shift, sign_thresholds
from qat.export.lowerings import LOWERINGS, TAKES_PENDING
from qat.export.pending import Pending
from qat.export.target import LCE, LITERT, Target
from qat.grid import Grid
from qat.layers import FakeQuantize
from qat.reactnet import LearnedShift

layers = tf_keras.layers
Value = Stored | Pending
IO_TYPES = ("float32", "int8", "uint8")


def convert(
    model: tf_keras.Model,
    *,
    io: str = "float32",
    weight_storage: str = "size",
    target: Target = LITERT,
) -> Graph:
    """The graph that the file will hold.

    Args:
        model: a quantized model, calibrated or trained.
        io: type of the file's inputs and outputs: float32 (with QUANTIZE and DEQUANTIZE at the
            boundary), int8, or uint8 (a camera's bytes).
        weight_storage: "size" or "speed", see `export_tflite`.
        target: the kernels that will run the file.

    Raises:
        ExportError: a layer without operator, a tensor without grid, NaN weights.
    """
    make = larq.LarqBuilder if target is LCE else Builder
    builder = make(weight_storage=weight_storage, target=target)
    graph = _Converter(functional(model), io, builder).run()
    return larq.finish(graph) if target is LCE else graph


class _Converter:
    def __init__(self, model: tf_keras.Model, io: str, builder: Builder):
        self.model, self.io, self.builder = model, io, builder
        self.readers = consumers(model)
        # For the id of a model input, the file's tensor that takes it.
        self.boundaries: dict[int, Tensor] = {}
        self.values: dict[int, Value] = {}

    def run(self) -> Graph:
        graph = self.builder.graph
        for name, tensor in zip(self.model.input_names, self.model.inputs, strict=True):
            self.values[id(tensor)] = self._input(name, tensor)
        for call in calls(self.model):
            value = self.values[id(call.output)] = self._lower(call)
            if isinstance(value, Stored):
                graph.origins[id(call.output)] = value.tensor
        for name, tensor in zip(self.model.output_names, self.model.outputs, strict=True):
            graph.outputs.append(self._output(name, self._stored(tensor)))
        # In the model's order, not in the order in which its layers first read them.
        found = [self.boundaries.get(id(tensor)) for tensor in self.model.inputs]
        graph.inputs += [boundary for boundary in found if boundary is not None]
        _require_closed(graph, self.io)
        return graph

    def _input(self, name: str, tensor: Any) -> Stored:
        shape = (1, *tensor.shape[1:])
        if None in shape:
            raise ExportError(
                f"input {name!r} has shape {tuple(tensor.shape)}; the file needs fixed sizes: "
                "build the model with a fixed input shape"
            )
        value = Stored(self.builder.activation(name, shape, None), None)
        readers = [reader and reader.layer for reader in self.readers.get(id(tensor), [])]
        numbers = all(isinstance(layer, layers.Embedding) for layer in readers)
        if numbers and tensor.dtype.is_integer:
            value.tensor.dtype = tensor.dtype.name
        if self.io == "float32" or numbers:
            self.boundaries[id(tensor)] = value.tensor
        return value

    def _output(self, name: str, value: Stored) -> Tensor:
        if self.io == "float32":
            return self.builder.to_float(value, name).tensor
        if value.grid is None:
            raise ExportError(f"output {name!r} is float32; only --io=float32 can hold it")
        boundary = self._boundary(value, name)
        if boundary is not value.tensor:
            options = schema.QuantizeOptionsT()
            self.builder.operator("QUANTIZE", 2, [value.tensor], boundary, options)
        return boundary

    def _boundary(self, value: Stored, name: str) -> Tensor:
        """The 8-bit tensor that the caller sees: the value's own for int8, a twin for uint8."""
        if activation_dtype(value.grid) != "int8":
            raise ExportError(f"{name!r} has 16 bits; only --io=float32 can hold it")
        if self.io == "int8":
            return value.tensor
        return Tensor(
            name=self.builder.name(f"{name}/uint8"),
            shape=value.shape,
            dtype="uint8",
            scale=value.tensor.scale,
            zero_point=value.tensor.zero_point + 128,
        )

    def _stored(self, tensor: Any) -> Stored:
        """A tensor of the file; an operator that no quantizer follows is computed in float."""
        value = self.values[id(tensor)]
        if isinstance(value, Pending):
            value = self.values[id(tensor)] = value.emit(self.builder, value.name, None)
        return value

    def _lower(self, call: Call) -> Value:
        layer = call.layer
        if isinstance(layer, FakeQuantize):
            return self._fake_quantize(layer, call.inputs[0])
        if isinstance(layer, QuantizeWrapper):
            return self._wrapped(layer, call)
        if isinstance(layer, AFFINE):
            return self._channel_affine(layer, call.inputs[0])
        if isinstance(layer, layers.Rescaling):
            return self._rescaling(layer, call)
        if isinstance(layer, LearnedShift):
            return lower_shift(self.builder, layer, self._stored(call.inputs[0]))
        if configs.kernels(layer):
            return self._linear(layer, self._stored(call.inputs[0]), None)
        if isinstance(layer, TAKES_PENDING):
            return self._plain(layer, call, [self.values[id(tensor)] for tensor in call.inputs])
        return self._plain(layer, call, [self._stored(tensor) for tensor in call.inputs])

    def _plain(self, layer: layers.Layer, call: Call, inputs: list[Value]) -> Value:
        if isinstance(layer, QuantizeLayer):
            raise ExportError(
                f"layer {layer.name!r} is TFMOT's own quantizer of an input, which no file of ours "
                "holds; use qat.quantize_model, or quantize_apply(…, scheme=qat.scheme(…))"
            )
        lower = LOWERINGS.get(type(layer))
        if lower is not None:
            return lower(self.builder, layer, inputs, _output_shape(layer, inputs))

        def apply(*tensors):
            given = dict(zip(map(id, call.inputs), tensors, strict=True))
            args, kwargs = tf.nest.map_structure(lambda x: given.get(id(x), x), call.arguments)
            mode = {"training": False} if layer._expects_training_arg else {}
            return layer(*args, **{**mode, **kwargs})

        return lower_float(self.builder, layer.name, layer, inputs, apply)

    def _linear(self, layer: layers.Layer, x: Stored, frozen: FrozenKernel | None) -> Linear:
        return lower_linear(self.builder, layer, x, _output_shape(layer, [x]), frozen)

    def _wrapped(self, layer: QuantizeWrapper, call: Call) -> Value:
        inner, tensors = layer.layer, call.inputs
        if isinstance(inner, AFFINE):
            if isinstance(self.values[id(tensors[0])], Stored):
                real = self.builder.to_float(self._stored(tensors[0]), inner.name)
                return self._affine(inner.name, real, *affine_of(inner))
            return self._channel_affine(inner, tensors[0])
        if isinstance(inner, layers.Rescaling):
            value = self.builder.to_float(self._stored(tensors[0]), inner.name)
            return self._affine(inner.name, value, inner.scale, inner.offset)
        waiting = [self.values[id(tensor)] for tensor in tensors]
        if isinstance(inner, TAKES_PENDING) and isinstance(waiting[0], Pending):
            # A float layer that fuses into a float operator.
            return self._plain(inner, call, waiting)
        inputs = [self._stored(tensor) for tensor in tensors]
        if configs.kernels(inner):
            value = self._linear(inner, inputs[0], freeze_kernel(layer))
            activation = inner.activation.__name__
            if activation != "linear":
                value = value.with_activation(activation)
        else:
            floats = [self.builder.to_float(x, inner.name) for x in inputs]
            value = self._plain(inner, call, floats)
        grid = freeze_output(layer)
        return value if grid is None else self._onto(value, grid, inner.name)

    def _fake_quantize(self, layer: FakeQuantize, tensor: Any) -> Stored:
        name = layer.name.removesuffix("_fake_quantize")
        grid, value = freeze_activation(layer), self.values[id(tensor)]
        if is_sign(layer):
            value = self._stored(tensor)
            return self.builder.sign(value, grid, f"{name}/sign", sign_thresholds(layer, value))
        if self.io != "float32" and any(tensor is wanted for wanted in self.model.inputs):
            return self._integer_input(tensor, value.shape, grid, name)
        return self._onto(value, grid, name)

    def _onto(self, value: Value, grid: Grid, name: str) -> Stored:
        if isinstance(value, Pending):
            return value.emit(self.builder, name, grid)
        return self.builder.to_grid(value, grid, name)

    def _integer_input(self, tensor: Any, shape: tuple, grid: Grid, name: str) -> Stored:
        """The input as the caller's 8-bit codes; no float tensor stands in front."""
        value = Stored(self.builder.activation(f"{name}/int8", shape, grid), grid)
        boundary = self._boundary(value, name)
        self.boundaries[id(tensor)] = boundary
        if boundary is not value.tensor:
            options = schema.QuantizeOptionsT()
            self.builder.operator("QUANTIZE", 2, [boundary], value.tensor, options)
        return value

    def _channel_affine(self, layer: layers.Layer, tensor: Any) -> Pending:
        value = self.values[id(tensor)]
        multiplier, offset = affine_of(layer)
        if isinstance(value, Linear) and value.activation is None:
            return value.affine(multiplier, offset)
        return self._affine(layer.name, self._stored(tensor), multiplier, offset)

    def _rescaling(self, layer: layers.Rescaling, call: Call) -> Value:
        value = self._stored(call.inputs[0])
        readers = self.readers[id(call.output)]
        if any(reader is None or isinstance(reader.layer, FakeQuantize) for reader in readers):
            return self._affine(layer.name, value, layer.scale, layer.offset)
        return dataclasses.replace(value, gain=value.gain * float(layer.scale))

    def _affine(self, name: str, value: Stored, multiplier, offset) -> Linear:
        integer = value.grid is not None
        return lower_affine(self.builder, name, value, multiplier, offset, integer=integer)


def _output_shape(layer: layers.Layer, inputs: list[Value]) -> tuple[int, ...]:
    shapes = [value.shape for value in inputs]
    shape = tuple(layer.compute_output_shape(shapes if len(shapes) > 1 else shapes[0]))
    if None in shape:
        raise ExportError(
            f"layer {layer.name!r} has an output of unknown size {shape}; build the model with a "
            "fixed input shape"
        )
    return shape


def _require_closed(graph: Graph, io: str) -> None:
    """With an 8-bit boundary nothing may read the float input that is no longer there."""
    known = {id(tensor) for tensor in graph.inputs}
    for operator in graph.operators:
        for tensor in operator.inputs:
            if tensor is not None and tensor.data is None and id(tensor) not in known:
                raise ExportError(
                    f"{operator.name} reads the float tensor {tensor.name!r}, which --io={io} "
                    "removes; use --io=float32"
                )
        known.update(id(tensor) for tensor in operator.outputs)
