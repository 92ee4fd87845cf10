"""Keras 3 models as functional tf_keras models, one call at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tf_keras
from absl import logging

from qat.deep import deep_models
from qat.errors import ModelError
from qat.loading.keras3_layers import (
    as_numpy,
    computes_in_float32,
    copy_weights,
    describe,
    has_activation,
    is_of_keras,
    tf_keras_layer,
)
from qat.loading.keras3_operations import activation_call, as_float32, call_operation


def is_keras3_model(model: Any) -> bool:
    """Whether an object is a Keras 3 model; does not import Keras 3."""
    kind = getattr(sys.modules.get("keras"), "Model", None)
    return kind is not None and kind is not tf_keras.Model and isinstance(model, kind)


def from_keras3(model: Any, custom_objects: Mapping[str, Any] | None = None) -> tf_keras.Model:
    """The same function as a functional tf_keras model, in float32, with the same layer names.

    Layers become tf_keras's own, operations (`keras.ops.*`, a + b, x[:, 1:]) TensorFlow calls.
    The Keras 3 model is left as it was; weights are copied.

    Args:
        model: functional or Sequential, built.
        custom_objects: {class name: tf_keras class} for layers of the user's own.

    Raises:
        ModelError: a subclassed or unbuilt model; a layer, an operation or an option without a
            counterpart in tf_keras.
    """
    layers: dict[int, Any] = {}
    converted = _Graph(layers, custom_objects or {}).convert(model)
    reduced = [layer for layer, _ in layers.values() if not computes_in_float32(layer)]
    if reduced:
        logging.warning(
            "model %r: %d layers, %s first, computed in %s; they compute in float32 from here on",
            model.name,
            len(reduced),
            describe(reduced[0]),
            reduced[0].dtype_policy.name,
        )
    return converted


class _Graph:
    """One model on its way; nested ones get a graph of their own and share the layers.

    Attributes:
        layers: {id of a Keras 3 layer: (it, the tf_keras layer)}: a layer that is called twice, or
            in two models, is converted once.
        tensors: {id of a symbolic tensor: tf_keras's}.
    """

    def __init__(self, layers: dict[int, Any], custom_objects: Mapping[str, Any]):
        self.layers = layers
        self.custom_objects = custom_objects
        self.tensors: dict[int, Any] = {}
        self.reserved: set[str] = set()
        self.taken: set[str] = set()

    @deep_models()
    def convert(self, model: Any) -> tf_keras.Model:
        import keras

        graph = _functional(model)
        self.reserved = {operation.name for operation in graph.operations}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                outputs = self.input(node) if node.is_input else self.call(node)
                flat = keras.tree.flatten(outputs)
                self.tensors.update(zip(map(id, node.outputs), flat, strict=True))
        inputs, outputs = keras.tree.map_structure(self.replace, [graph.input, graph.output])
        converted = tf_keras.Model(inputs, outputs, name=model.name)
        if not model.trainable:
            converted.trainable = False
        return converted

    def input(self, node: Any) -> Any:
        layer = node.operation
        if layer.sparse or getattr(layer, "ragged", False) or getattr(layer, "optional", False):
            raise ModelError(
                f"{describe(layer)} is sparse, ragged or optional; only dense inputs are taken"
            )
        size, *shape = layer.batch_shape
        return tf_keras.Input(shape, size, name=layer.name, dtype=as_float32(layer.dtype))

    def call(self, node: Any) -> Any:
        """The outputs of one call in the Keras 3 graph, on the tensors that exist by now."""
        import keras

        operation, arguments = node.operation, node.arguments
        args, kwargs = keras.tree.map_structure(
            self.replace, [list(arguments.args), dict(arguments.kwargs)]
        )
        # training=True is what augmentation layers say by default; whoever calls the model decides.
        kwargs = {k: v for k, v in kwargs.items() if v is not None and (k, v) != ("training", True)}
        if isinstance(operation, keras.Layer):
            return self.call_layer(operation, args, kwargs)
        outputs = call_operation(operation, args, kwargs, as_float32(node.outputs[0].dtype))
        return self.named(operation.name, outputs)

    def replace(self, value: Any) -> Any:
        """tf_keras's tensor for one of Keras 3, NumPy's array for a constant."""
        import keras

        if isinstance(value, keras.KerasTensor):
            return self.tensors[id(value)]
        constant = isinstance(value, keras.Variable) or keras.ops.is_tensor(value)
        return as_numpy(value) if constant else value

    def call_layer(self, layer: Any, args: list, kwargs: dict) -> Any:
        activation = getattr(layer, "activation", None)
        separate = activation is not None and is_of_keras(layer) and not has_activation(activation)
        if separate and type(layer).__name__ == "Activation":
            return self.activate(layer, args[0], layer.name)
        fresh = id(layer) not in self.layers
        if fresh:
            self.layers[id(layer)] = layer, self.layer(layer)
        converted = self.layers[id(layer)][1]
        try:
            outputs = converted(*args, **kwargs)
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{describe(layer)} cannot be converted: {reason}") from error
        if fresh and not isinstance(converted, tf_keras.Model):
            copy_weights(layer, converted)
        return self.activate(layer, outputs) if separate else outputs

    def layer(self, layer: Any) -> tf_keras.layers.Layer:
        import keras

        if isinstance(layer, keras.Model):
            return _Graph(self.layers, self.custom_objects).convert(layer)
        return tf_keras_layer(layer, self.custom_objects)

    def activate(self, layer: Any, x: Any, name: str | None = None) -> Any:
        """An activation that tf_keras lacks, behind the layer that has it in Keras 3."""
        import keras

        function = layer.activation
        if isinstance(function, keras.Layer):
            return self.call_layer(function, [x], {})
        outputs = activation_call(function, describe(layer))(x)
        if name is None and (name := f"{layer.name}_{function.__name__}") in self.reserved:
            return outputs
        return self.named(name, outputs)

    def named(self, name: str, outputs: Any) -> Any:
        """Gives the last TensorFlow call the operation's name, unless another call has it."""
        layer = tf.nest.flatten(outputs)[0].node.layer
        if layer.name.startswith("tf.") and name not in self.taken:
            self.taken.add(name)
            layer._name = name
        return outputs


def _functional(model: Any) -> Any:
    """The graph of a Keras 3 model.

    Raises:
        ModelError: an unbuilt Sequential, or a subclassed model.
    """
    import keras

    if isinstance(model, keras.Sequential):
        if model._functional is None:
            raise ModelError(
                f"model {model.name!r} is not built: call model.build(input_shape) first"
            )
        return model._functional
    if not hasattr(model, "_nodes_by_depth") or not is_of_keras(type(model).call):
        raise ModelError(
            f"model {model.name!r} is subclassed ({type(model).__name__}); only functional and "
            "Sequential models are converted: rebuild it with keras.Model(inputs, outputs)"
        )
    return model
