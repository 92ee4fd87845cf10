"""The file's own arithmetic in the forward pass of a Keras model."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.canonical import Call, calls, functional, rebuild, stand_ins
from qat.errors import ModelError
from qat.export.containers import require_weight_storage
from qat.export.convert import convert
from qat.export.flatbuffer import to_bytes
from qat.export.graph import Tensor
from qat.export.target import find_target
from qat.layers import FakeQuantize
from qat.verify.integer import SimulationError, Simulator


class ExactModel(tf_keras.Model):
    """A quantized model that computes what its TFLite file computes, code for code.

    Forward: `(code - zero_point) · scale` of the codes that LiteRT's reference kernels
    (BUILTIN_REF) give on the bytes that `export_tflite` would write now, by `qat.verify.integer`.
    Backward: the gradient of the fake-quantized model, each of whose layers reads the exact values
    (a straight-through estimator). Fake quantization alone differs by the kernels' rounding of
    multipliers, biases and averages; this does not, so a last epoch can be trained on the integers
    that ship.

    It shares all variables with `model` and trains them (`compile`, `fit`) with batch normalization
    and activation ranges as in inference. The integers follow the variables at every call. It runs
    on the host in NumPy: not under XLA, not in a distribution strategy.

    Args:
        model: quantized, calibrated or trained; 8-bit inputs and outputs may be float32.
        target, weight_storage: of the file, as `export_tflite` takes them.

    Raises:
        ExportError: the model cannot be exported, or an unknown target or weight_storage.
        ModelError: its file computes in float somewhere, has bit-packed convolutions (target lce),
            or an output that is no tensor of the file.
    """

    def __init__(
        self, model: tf_keras.Model, *, target: str = "litert", weight_storage: str = "size"
    ):
        require_weight_storage(weight_storage)
        quantized = functional(model)
        super().__init__(name=f"{model.name}_exact")
        self.quantized = quantized
        self._target, self._weight_storage = find_target(target), weight_storage
        self._quantizes = [c for c in calls(quantized) if isinstance(c.layer, FakeQuantize)]
        self._twin = _twin(quantized, self._quantizes)
        self._fingerprint: list[int] | None = None
        self._simulator: Simulator | None = None
        self._tensors: list[Tensor] = []
        self._refresh([weight.numpy() for weight in quantized.variables])
        examples = [np.zeros((1, *tensor.shape[1:]), np.float32) for tensor in quantized.inputs]
        try:
            self._exact_values(examples)
        except SimulationError as error:
            raise ModelError(
                f"model {model.name!r} has no exact form: {error}; every operator must be integer"
            ) from error

    def call(self, inputs, training=None):
        """Outputs of the file; `training` changes nothing."""
        given = [tf.cast(tensor, tf.float32) for tensor in tf.nest.flatten(inputs)]
        # Handed over as values, so that they are read before an optimizer changes them.
        weights = [tf.convert_to_tensor(weight) for weight in self.quantized.variables]
        exact = tf.numpy_function(
            lambda *arrays: self._forward(arrays[: len(given)], arrays[len(given) :]),
            [*given, *weights],
            [tf.float32] * len(self._quantizes),
        )
        exact = [exact] if tf.is_tensor(exact) else exact
        for tensor, call in zip(exact, self._quantizes, strict=True):
            tensor.set_shape([given[0].shape[0], *call.output.shape[1:]])
        return self._twin((inputs, list(exact)), training=False)

    def _forward(self, inputs, weights) -> list[np.ndarray]:
        self._refresh(weights)
        return self._exact_values(inputs)

    def _refresh(self, weights) -> None:
        fingerprint = [zlib.crc32(np.ascontiguousarray(weight)) for weight in weights]
        if fingerprint == self._fingerprint:
            return
        graph = convert(self.quantized, target=self._target, weight_storage=self._weight_storage)
        self._tensors = [graph.origins[id(call.output)] for call in self._quantizes]
        self._simulator = Simulator(to_bytes(graph, description="exact", target=self._target.name))
        self._fingerprint = fingerprint

    def _exact_values(self, inputs) -> list[np.ndarray]:
        """What each FakeQuantize call gives in the file, in Keras's shapes, float32."""
        types = [tensor.dtype for tensor in self._simulator.inputs]  # whole numbers for Embedding
        given = [np.asarray(x, dtype) for x, dtype in zip(inputs, types, strict=True)]
        codes = self._simulator.tensors(*given)
        values = []
        for call, tensor in zip(self._quantizes, self._tensors, strict=True):
            whole = codes[tensor.name].astype(np.float32) - np.float32(tensor.zero_point[0])
            real = whole * tensor.scale[0]
            values.append(real.reshape(len(inputs[0]), *call.output.shape[1:]))
        return values


@tf_keras.utils.register_keras_serializable("qat")
class TakesExact(tf_keras.layers.Layer):
    """The second of two tensors forward, the gradient to the first."""

    def call(self, inputs):
        @tf.custom_gradient
        def exchange(simulated: tf.Tensor, exact: tf.Tensor):
            return tf.cast(exact, simulated.dtype), lambda gradient: (gradient, None)

        return exchange(*inputs)


def _twin(model: tf_keras.Model, quantizes: list[Call]) -> tf_keras.Model:
    """The model, sharing its layers, with another input that replaces each FakeQuantize's value."""
    exact = stand_ins(model, [call.output for call in quantizes])

    def visit(call: Call, args: tuple, kwargs: dict) -> Any:
        output = call.layer(*args, **kwargs)
        if id(call.output) in exact:
            output = TakesExact()([output, exact[id(call.output)]])
        return output

    return rebuild(model, visit, more_inputs=list(exact.values()))
