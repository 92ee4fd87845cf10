"""Hard sigmoid and hard swish, however applications write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tf_keras

from qat.canonical.graph import Call
from qat.operator_layers import Affine, hard_sigmoid6, hard_swish

layers = tf_keras.layers


class Match(NamedTuple):
    """A function of a tensor and the calls that compute it, the last one first."""

    source: Any
    calls: tuple[Call, ...]


def hard_activation(
    call: Call, producer: Mapping[int, Call]
) -> tuple[Callable[[Any], Any], Match] | None:
    """(function, match) of the hard activation that a call ends; None if it ends none.

    Args:
        producer: for the id of each tensor the call that makes it.
    """
    patterns = _Patterns(producer)
    for function, find in (
        (hard_swish, patterns.swish),
        (hard_sigmoid6, patterns.sigmoid),
        (tf_keras.activations.hard_sigmoid, patterns.keras_sigmoid),
    ):
        match = find(call)
        if match is not None:
            return function, match
    return None


def is_affine(layer: layers.Layer) -> bool:
    """Whether the layer is `multiplier · x + offset` with constants."""
    return isinstance(layer, Affine | layers.Rescaling)


def factors(layer: layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, offset) of an affine layer."""
    multiplier = layer.multiplier if isinstance(layer, Affine) else layer.scale
    return np.asarray(multiplier, float), np.asarray(layer.offset, float)


class _Patterns:
    """Each pattern answers for the call that ends it, or for the tensor that it makes."""

    def __init__(self, producer: Mapping[int, Call]):
        self.producer = producer

    def swish(self, call: Call) -> Match | None:
        """x · hard_sigmoid(x), (x / 6) · relu6(x + 3), or (x · relu6(x + 3)) / 6."""
        if type(call.layer) is layers.Multiply:
            return self._product(call, self._sigmoid_of) or self._product(call, self._gate)
        product = self._affine(call, 1 / 6, 0)
        product = None if product is None else self.producer.get(id(product.source))
        if product is None or type(product.layer) is not layers.Multiply:
            return None
        for x, other in _orders(product.inputs):
            gate = self._gate(other)
            if gate is not None and gate.source is x:
                return Match(x, (call, product, *gate.calls))
        return None

    def _product(self, call: Call, find: Callable[[Any], Match | None]) -> Match | None:
        """x · sigmoid(x), or (x / 6) · relu6(x + 3)."""
        for x, other in _orders(call.inputs):
            match = find(other)
            calls, source = (), x
            if match is not None and find == self._gate:
                scaled = self._affine(self.producer.get(id(x)), 1 / 6, 0)
                source, calls = (None, ()) if scaled is None else scaled
            if match is not None and match.source is source:
                return Match(source, (call, *calls, *match.calls))
        return None

    def _sigmoid_of(self, tensor: Any) -> Match | None:
        call = self.producer.get(id(tensor))
        return None if call is None else self.sigmoid(call)

    def sigmoid(self, call: Call) -> Match | None:
        """relu6(x + 3) / 6."""
        scaled = self._affine(call, 1 / 6, 0)
        gate = None if scaled is None else self._gate(scaled.source)
        return None if gate is None else Match(gate.source, (call, *gate.calls))

    def keras_sigmoid(self, call: Call) -> Match | None:
        """clip(0.2·x + 0.5, 0, 1), the factor and the offset in one layer or in two."""
        if _bound(call.layer) != 1:
            return None
        affine = self.producer.get(id(call.inputs[0]))
        found = self._affine(affine, 0.2, 0.5)
        if found is not None:
            return Match(found.source, (call, affine))
        shifted = self._affine(affine, 1, 0.5)
        scaled = None if shifted is None else self.producer.get(id(shifted.source))
        found = self._affine(scaled, 0.2, 0)
        return None if found is None else Match(found.source, (call, affine, scaled))

    def _gate(self, tensor: Any) -> Match | None:
        """relu6(x + 3)."""
        relu = self.producer.get(id(tensor))
        if relu is None or _bound(relu.layer) != 6:
            return None
        shifted = self.producer.get(id(relu.inputs[0]))
        found = self._affine(shifted, 1, 3)
        return None if found is None else Match(found.source, (relu, shifted))

    def _affine(self, call: Call | None, multiplier: float, offset: float) -> Match | None:
        """multiplier · x + offset."""
        if call is None or not is_affine(call.layer):
            return None
        found = factors(call.layer)
        if found[0].ndim or found[1].ndim or not np.allclose(found, (multiplier, offset)):
            return None
        return Match(call.inputs[0], (call,))


def _bound(layer: layers.Layer) -> float | None:
    """The upper bound of a ReLU that has one and is plain otherwise."""
    if isinstance(layer, layers.Activation):
        return 6.0 if getattr(layer.activation, "__name__", "") == "relu6" else None
    if not isinstance(layer, layers.ReLU) or layer.negative_slope or layer.threshold:
        return None
    return layer.max_value


def _orders(pair: tuple) -> tuple:
    """Both orders of two; nothing of more."""
    return (pair, pair[::-1]) if len(pair) == 2 else ()
