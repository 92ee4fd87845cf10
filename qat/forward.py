"""Running a functional model call by call, so that single calls can be looked into or replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qat.canonical import Call, calls

# Gives the outputs of a call for its arguments, tensors in place.
Visit = Callable[[Call, tuple, dict], Any]


def forward(model: tf_keras.Model, inputs: Sequence[tf.Tensor], visit: Visit) -> list[tf.Tensor]:
    """The outputs of a functional model, each call's own being what `visit` gives.

    No layer learns of a new call as it would if a model were rebuilt from it.

    Args:
        inputs: in the order of `model.inputs`.
    """
    values = dict(zip(map(id, model.inputs), inputs, strict=True))
    for call in calls(model):
        args, kwargs = tf.nest.map_structure(
            lambda value: values.get(id(value), value), call.arguments
        )
        outputs = tf.nest.flatten(visit(call, args, kwargs))
        values.update(zip(map(id, call.outputs), outputs, strict=True))
    return [values[id(tensor)] for tensor in model.outputs]


def infer(call: Call, args: tuple, kwargs: dict) -> Any:
    """Calls the layer as a model in inference does."""
    return in_mode(call, args, kwargs, training=False)


def in_mode(call: Call, args: tuple, kwargs: dict, *, training: bool) -> Any:
    """Calls the layer in training or in inference, unless the model's builder chose one for it."""
    args, kwargs = call.in_mode(args, kwargs, training)
    return call.layer(*args, **kwargs)


def predictor(model: tf_keras.Model) -> Callable[[Any], Any]:
    """The model in inference, traced once for batches of all sizes, if there are several.

    Left alone, TensorFlow traces again for the last batch, which is smaller.

    Returns:
        From the inputs (one tensor, or several in the model's order, in any structure) to the
        outputs in the model's structure.
    """
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
    any_size = all(spec.shape[0] is None for spec in specs)

    @traced_if_repeated(input_signature=[specs] if any_size else None)
    def predict(inputs: list[tf.Tensor]) -> Any:
        return model(inputs if len(inputs) > 1 else inputs[0], training=False)

    def cast_and_predict(inputs: Any) -> Any:
        flat = zip(tf.nest.flatten(inputs), specs, strict=True)
        return predict([tf.cast(x, spec.dtype) for x, spec in flat])

    return cast_and_predict


def traced_if_repeated(**options: Any) -> Callable[[Callable], Callable]:
    """Decorates a function of batches: the first runs as it is, the rest as a graph.

    Tracing costs as much as several batches.

    Args:
        options: of `tf.function`.
    """

    def decorate(function: Callable) -> Callable:
        traced, is_first = tf.function(function, **options), True

        def run(inputs: Sequence[tf.Tensor]) -> Any:
            nonlocal is_first
            chosen, is_first = function if is_first else traced, False
            return chosen(inputs)

        return run

    return decorate
