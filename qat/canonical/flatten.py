"""Models nested in models become the layers that they consist of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras

from qat.canonical.graph import Call, LayerCopies, functional, rebuild, replay
from qat.canonical.made import Origins


def leaves(model: tf_keras.Model) -> Iterator[tf_keras.layers.Layer]:
    """The layers of a functional model, those of nested models in these models' places."""
    for layer in model.layers:
        if isinstance(layer, tf_keras.Model):
            yield from leaves(functional(layer))
        else:
            yield layer


def flatten(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, Origins]]:
    """A new functional model of the same float function without nested models.

    Layers keep their names; one whose name is taken gets that of the model it lay in put in front.
    A model called several times becomes layers called several times. `training=False` in a nested
    model's call is handed to its layers, and frozen layers stay frozen. Weights are copied.

    Returns:
        (model, origins): origins holds, for the name of each layer that lay in a nested model, the
        names that a recipe may know it by: its own, its path, and those of the models around it.

    Raises:
        ModelError: a nested model that is subclassed or not built.
    """
    flattening = _Flattening(functional(model))
    result = rebuild(flattening.model, flattening.visit)
    flattening.copies.copy_weights()
    return result, flattening.origins


class _Flattening:
    def __init__(self, model: tf_keras.Model):
        self.model = model
        self.copies = LayerCopies()
        outer = [layer for layer in model.layers if not isinstance(layer, tf_keras.Model)]
        self.names = {id(layer): layer.name for layer in outer}
        self.origins: dict[str, Origins] = {}

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        return self._call(call.layer, (), args, kwargs)

    def _call(self, layer: tf_keras.layers.Layer, path: tuple, args: tuple, kwargs: dict) -> Any:
        """One call of a layer or model that lies in the nested models `path`."""
        if not isinstance(layer, tf_keras.Model):
            return self.copies(layer, self._name(layer, path))(*args, **kwargs)
        inner, path = functional(layer), (*path, layer)
        training = kwargs.get("training", args[1] if len(args) > 1 else None)

        def visit(call: Call, args: tuple, kwargs: dict) -> Any:
            if training is not None:
                args, kwargs = call.in_mode(args, kwargs, training)
            return self._call(call.layer, path, args, kwargs)

        given = args[0] if args else kwargs["inputs"]
        if isinstance(given, dict):
            nested = inner._nested_inputs
            names = sorted(nested) if isinstance(nested, dict) else inner.input_names
            given = [given[name] for name in names]
        return replay(inner, tf.nest.flatten(given), visit)

    def _name(self, layer: tf_keras.layers.Layer, path: tuple) -> str:
        if id(layer) not in self.names:
            name, taken = layer.name, set(self.names.values())
            if name in taken:
                name = f"{path[-1].name}_{name}"
            while name in taken:
                name += "_"
            self.names[id(layer)] = name
            known_as = "/".join(part.name for part in (*path, layer))
            self.origins[name] = (
                (layer.name, type(layer).__name__),
                (known_as, type(layer).__name__),
                *((model.name, type(model).__name__) for model in path),
            )
        return self.names[id(layer)]
