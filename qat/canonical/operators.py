"""Operator calls (`a + b`, `tf.nn.relu(x)`, `x[:, 1:]`) and helper layers become plain layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import tf_keras

from qat.canonical import helper_layers, operator_arithmetic, operator_moves
from qat.canonical.graph import Call, LayerCopies, functional, rebuild
from qat.canonical.made import MadeLayers, Origins
from qat.canonical.operator_call import NoLayerError, OperatorCall
from qat.errors import ModelError

OPERATOR_CALLS = ("TFOpLambda", "SlicingOpLambda")
_REWRITES: dict[str, Callable[..., Any]] = {
    **operator_arithmetic.REWRITES,
    **operator_moves.REWRITES,
}


def is_operator_call(layer: tf_keras.layers.Layer) -> bool:
    """Whether Keras made the layer of a call of a TensorFlow function."""
    return type(layer).__name__ in OPERATOR_CALLS


def is_rewritten(layer: tf_keras.layers.Layer) -> bool:
    """Whether `operators_to_layers` puts others in the layer's place."""
    return is_operator_call(layer) or type(layer) in helper_layers.REWRITES


def operators_to_layers(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, Origins]]:
    """A new functional model of the same float function, with layers in place of operator calls.

    Helper layers go too: Normalization, and LayerScale, StochasticDepth and CustomScaleLayer of
    Keras's applications. Weights are copied.

    Returns:
        (model, origins): origins names the call or the helper that each new layer came from.

    Raises:
        ModelError: an operator call that no layer does, with what to do instead.
    """
    rewriting = _Rewriting(functional(model))
    result = rebuild(rewriting.model, rewriting.visit)
    rewriting.require_none_left(result)
    rewriting.copies.copy_weights()
    return result, rewriting.made.origins


class _Rewriting:
    def __init__(self, model: tf_keras.Model):
        self.model = model
        self.copies = LayerCopies()
        kept = [layer.name for layer in model.layers if not is_rewritten(layer)]
        self.made = MadeLayers(kept)
        self.reasons: dict[str, str] = {}

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        if not is_rewritten(call.layer):
            return self.copies(call.layer)(*args, **kwargs)
        try:
            if type(call.layer) in helper_layers.REWRITES:
                return helper_layers.REWRITES[type(call.layer)](
                    OperatorCall(call, self.made), args[0]
                )
            return self._rewritten(call, args, kwargs)
        except NoLayerError as reason:
            # Not yet an error: what reads it, as a batch size, may do without it.
            self.reasons[call.layer.name] = str(reason)
            return self.copies(call.layer)(*args, **kwargs)

    def _rewritten(self, call: Call, args: tuple, kwargs: dict) -> Any:
        symbol = operator_symbol(call.layer)
        if symbol not in _REWRITES:
            raise NoLayerError("it has no layer here")
        given = inspect.signature(call.layer.function).bind(*args, **kwargs)
        given.apply_defaults()
        arguments = {key: value for key, value in given.arguments.items() if key != "name"}
        return _REWRITES[symbol](OperatorCall(call, self.made), **arguments)

    def require_none_left(self, result: tf_keras.Model) -> None:
        for layer in result.layers:
            if layer.name in self.reasons:
                kind, advice = type(layer).__name__, ""
                if is_operator_call(layer):
                    kind = f"a call of tf.{operator_symbol(layer)}"
                    advice = "; use a layer, or constants"
                raise ModelError(
                    f"layer {layer.name!r} ({kind}) cannot be quantized: "
                    f"{self.reasons[layer.name]}{advice}"
                )


def operator_symbol(layer: tf_keras.layers.Layer) -> str:
    """The TensorFlow function of an operator call, e.g. "nn.softmax"."""
    if type(layer).__name__ == "SlicingOpLambda":
        return "__operators__.getitem"
    return str(layer.symbol).removeprefix("compat.v1.")
