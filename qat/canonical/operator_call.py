"""One operator call on its way to become layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.canonical.graph import Call
from qat.canonical.made import MadeLayers

layers = tf_keras.layers


class NoLayerError(Exception):
    """The reason why an operator call cannot become a layer."""


def is_tensor(value: Any) -> bool:
    """Whether a tensor of the model, not a constant."""
    return hasattr(value, "_keras_history")


def constants(value: Any) -> np.ndarray:
    """Constant numbers, whatever they were given as.

    Raises:
        NoLayerError: they are computed in the model, as from `tf.shape`.
    """
    if any(is_tensor(part) for part in tf.nest.flatten(value)):
        raise NoLayerError("a size is computed in the model, as with tf.shape; give it as a number")
    return np.asarray(tf.nest.map_structure(_constant, value))


def _constant(value: Any) -> Any:
    return value.numpy() if tf.is_tensor(value) else value


def integers(value: Any) -> list[int]:
    """Constant integers, one or many, as a list. Raises as `constants`."""
    return [int(number) for number in np.atleast_1d(constants(value)).reshape(-1)]


class OperatorCall:
    """One call of a TensorFlow function and the layers that take its place.

    The first layer made gets the call's name, others a suffix; a call in a model that was called
    twice makes its layers once.
    """

    def __init__(self, call: Call, made: MadeLayers):
        self.call, self.name, self._made = call, call.layer.name, made

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of the call's first output."""
        return tuple(self.call.outputs[0].shape)

    def layer(self, kind: type, *args: Any, suffix: str = "", **options: Any) -> layers.Layer:
        """`kind(*args, **options)` under the call's name."""
        layer = self.call.layer
        return self._made.once(
            layer,
            suffix,
            f"{layer.name}_{suffix}" if suffix else layer.name,
            ((layer.name, type(layer).__name__),),
            lambda name: kind(*args, name=name, **options),
        )

    def reshaped(self, x: Any, shape: tuple[int | None, ...], suffix: str = "") -> Any:
        """x in another shape, the batch left out of it; at most one size may be unknown."""
        if tuple(x.shape[1:]) == tuple(shape):
            return x
        if sum(size is None for size in shape) > 1:
            raise NoLayerError(f"it makes the shape {shape}; fix the model's input size")
        sizes = [-1 if size is None else int(size) for size in shape]
        return self.layer(layers.Reshape, sizes, suffix=suffix)(x)

    def axis(self, axis: Any, rank: int) -> int:
        """An axis counted from the front; not the batch."""
        (axis,) = integers(axis)
        if axis % rank == 0:
            raise NoLayerError("it works on axis 0, the batch")
        return axis % rank
