"""Layers that are several operators of the file: swish, averages of tensors, layers over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tf_keras

from qat.errors import ModelError

layers = tf_keras.layers
# `once(layer, suffix, make, of=layer)`: a layer made from `of`, shared by all calls of that one and
# named after `layer`.
Once = Callable[..., layers.Layer]
_OVER_TIME = (layers.Dense, layers.Activation, layers.ReLU, layers.Dropout, layers.Conv2D)


def is_linear(layer: layers.Layer) -> bool:
    """Whether the layer has no activation of its own."""
    return getattr(layer, "activation", None) in (None, tf_keras.activations.linear)


def is_swish(layer: layers.Layer) -> bool:
    """Whether the layer is `x · sigmoid(x)`, under either of its names."""
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return isinstance(layer, layers.Activation) and name in ("swish", "silu")


def split_swish(layer: layers.Activation, x: Any, once: Once) -> Any:
    """swish → LOGISTIC and MUL: a quantizer wherever the file has a tensor."""
    gate = once(layer, "sigmoid", lambda name: layers.Activation("sigmoid", name=name))
    product = once(layer, "product", lambda name: layers.Multiply(name=name))
    return product([x, gate(x)])


def split_average(layer: layers.Average, inputs: list, once: Once) -> Any:
    """Average of n → sums of two and two, then `Rescaling(1 / n)`."""
    x, *rest = inputs
    for index, other in enumerate(rest):
        x = once(layer, f"sum{index}", lambda name: layers.Add(name=name))([x, other])
    share = 1.0 / len(inputs)
    return once(layer, "share", lambda name: layers.Rescaling(share, name=name))(x)


def without_time(
    layer: layers.TimeDistributed, once: Once
) -> tuple[layers.Layer, Callable[[], None]]:
    """(layer, setter of its weights): what TimeDistributed repeats takes one more axis by itself.

    Raises:
        ModelError: it does not.
    """
    inner = layer.layer
    if not isinstance(inner, _OVER_TIME):
        legal = ", ".join(kind.__name__ for kind in _OVER_TIME)
        raise ModelError(
            f"layer {layer.name!r} (TimeDistributed) repeats a {type(inner).__name__}; only "
            f"{legal} can be repeated: apply it to each step, or leave time out"
        )

    def make(name: str) -> layers.Layer:
        config = {**inner.get_config(), "name": name}
        if not is_linear(inner) and not isinstance(inner, layers.Activation):
            config["activation"] = "linear"
        return type(inner).from_config(config)

    made = once(layer, "each", make, inner)
    return made, lambda: made.set_weights(inner.get_weights())
