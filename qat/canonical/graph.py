"""Walking and rebuilding functional tf_keras models, one layer call at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qat.deep import deep_models
from qat.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer in a functional model.

    Attributes:
        layer: the layer called.
        inputs, outputs: symbolic tensors, flat, in the layer's order.
        arguments: (args, kwargs) of the call, symbolic tensors in place.
    """

    layer: tf_keras.layers.Layer
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    arguments: tuple[tuple, dict]

    @property
    def output(self) -> Any:
        """The only output.

        Raises:
            ValueError: the call has several.
        """
        if len(self.outputs) != 1:
            raise ModelError(
                f"layer {self.layer.name!r} ({type(self.layer).__name__}) has "
                f"{len(self.outputs)} outputs; only layers with one output can be quantized"
            )
        return self.outputs[0]

    def in_mode(self, args: tuple, kwargs: dict, training: bool) -> tuple[tuple, dict]:
        """These arguments with the mode, if the layer knows modes and its builder chose none."""
        spec = self.layer._call_spec
        if not spec.expects_training_arg or self.chosen_mode is not None:
            return args, kwargs
        return spec.set_arg_value("training", training, args, {**kwargs}, inputs_in_args=True)

    @property
    def chosen_mode(self) -> bool | None:
        """Whether the model's builder calls the layer in training or inference; None = neither."""
        args, kwargs = self.arguments
        try:
            spec = self.layer._call_spec
            return spec.get_arg_value("training", args, kwargs, inputs_in_args=True)
        except KeyError:
            return None


@deep_models()
def functional(model: tf_keras.Model) -> tf_keras.Model:
    """The model as a functional one; Sequential shares its layers with the result.

    Raises:
        ValueError: not a tf_keras model, a subclassed one, or one that was never built.
    """
    if not isinstance(model, tf_keras.Model):
        raise ValueError(
            f"need a tf_keras model, got {type(model).__module__}.{type(model).__name__}"
        )
    if isinstance(model, tf_keras.Sequential):
        if not model.built:
            raise ModelError(
                f"model {model.name!r} is not built: call model.build(input_shape) first"
            )
        return tf_keras.Model(model.inputs, model.outputs, name=model.name)
    if not getattr(model, "_is_graph_network", False):
        raise ModelError(
            f"model {model.name!r} is subclassed ({type(model).__name__}); only functional and "
            "Sequential models can be quantized: rebuild it with tf_keras.Model(inputs, outputs)"
        )
    return model


def calls(model: tf_keras.Model) -> list[Call]:
    """The calls of a functional model, producers before consumers, inputs' own left out."""
    found = []
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                found.append(
                    Call(
                        layer=node.layer,
                        inputs=tuple(node.keras_inputs),
                        outputs=tuple(tf.nest.flatten(node.outputs)),
                        arguments=(node.call_args, node.call_kwargs),
                    )
                )
    return found


def consumers(model: tf_keras.Model) -> dict[int, list[Call | None]]:
    """For the id of each symbolic tensor, the calls that read it; None stands for the caller
    of the model, who reads its outputs."""
    readers: dict[int, list[Call | None]] = {}
    for call in calls(model):
        for tensor in call.inputs:
            readers.setdefault(id(tensor), []).append(call)
    for tensor in model.outputs:
        readers.setdefault(id(tensor), []).append(None)
    return readers


def stand_ins(model: tf_keras.Model, tensors: Sequence[Any]) -> dict[int, Any]:
    """{id of a tensor: an input of its shape for a model that is rebuilt without what makes it}.

    Named apart from the model's layers, whose names may be those that Keras would take next.
    """
    names = {layer.name for layer in model.layers}
    prefix = "given"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return {
        id(tensor): tf_keras.Input(tensor.shape[1:], name=f"{prefix}{index}")
        for index, tensor in enumerate(tensors)
    }


@deep_models()
def rebuild(
    model: tf_keras.Model,
    visit: Callable[[Call, tuple, dict], Any],
    on_input: Callable[[Any, Any], Any] = lambda old, new: new,
    more_inputs: Sequence[Any] = (),
) -> tf_keras.Model:
    """A new functional model: `visit(call, args, kwargs)` gives each call's new outputs.

    args and kwargs are the call's own with the new model's tensors in place. `on_input(old, new)`
    may put something after each input. With `more_inputs`, symbolic tensors that `visit` reads, the
    new model takes (the old model's inputs, list of these).
    """
    inputs, given = [], []
    for tensor in model.inputs:
        layer = tensor.node.layer
        inputs.append(type(layer).from_config(layer.get_config()).output)
        given.append(on_input(tensor, inputs[-1]))
    outputs = replay(model, given, visit)
    # Dictionaries and single tensors stay what they were.
    inputs = tf.nest.pack_sequence_as(model._nested_inputs, inputs)
    if more_inputs:
        inputs = inputs, list(more_inputs)
    return tf_keras.Model(inputs, outputs, name=model.name)


def replay(
    model: tf_keras.Model, inputs: Sequence[Any], visit: Callable[[Call, tuple, dict], Any]
) -> Any:
    """The model's outputs, in its structure, for new inputs; `visit` as in `rebuild`."""
    replaced = dict(zip(map(id, model.inputs), inputs, strict=True))
    for call in calls(model):
        args, kwargs = tf.nest.map_structure(
            lambda value: replaced.get(id(value), value), call.arguments
        )
        outputs = tf.nest.flatten(visit(call, args, kwargs))
        replaced.update(zip(map(id, call.outputs), outputs, strict=True))
    return tf.nest.map_structure(lambda old: replaced[id(old)], model._nested_outputs)


class LayerCopies:
    """Copies of layers, each made once however often it is called, that start with its weights."""

    def __init__(self):
        self._copies: dict[int, tuple[tf_keras.layers.Layer, tf_keras.layers.Layer]] = {}

    def __call__(
        self, layer: tf_keras.layers.Layer, name: str | None = None
    ) -> tf_keras.layers.Layer:
        """The layer's copy, under another name if one is given."""
        if id(layer) not in self._copies:
            config = layer.get_config()
            copy = type(layer).from_config({**config, "name": name or layer.name})
            copy.trainable = layer.trainable
            self._copies[id(layer)] = layer, copy
        return self._copies[id(layer)][1]

    def copy_weights(self) -> None:
        """Call once the copies are built, that is after the new model exists."""
        for layer, copy in self._copies.values():
            if not copy.built:
                continue  # all its calls were rewritten away
            copy.set_weights(layer.get_weights())
            if isinstance(copy, tf_keras.layers.Normalization):
                copy.finalize_state()  # it computes with copies of its weights
