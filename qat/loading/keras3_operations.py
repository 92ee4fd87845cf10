"""Keras 3 operations (`keras.ops.*`, a + b, x[:, 1:]) as TensorFlow calls on tf_keras's tensors.

A call on a symbolic tensor becomes a TFOpLambda layer, as if the user had written it in tf_keras.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.errors import ModelError
from qat.loading import keras3_nn, keras3_numpy

# Computed in the type of the result: Keras 3 promotes types, TensorFlow refuses to mix them.
_ARITHMETIC: dict[str, Callable] = {**keras3_numpy.ARITHMETIC, **keras3_nn.ACTIVATIONS}
_OTHER: dict[str, Callable] = {**keras3_numpy.OTHER, **keras3_nn.OPERATIONS}
SUPPORTED = frozenset({*_ARITHMETIC, *_OTHER})
# They say nothing without pad_to_aspect_ratio, which is not supported.
_IGNORED = ("fill_mode", "fill_value")
_COMPARISONS = ("Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "Where")


def call_operation(operation: Any, args: Sequence, kwargs: dict, dtype: str) -> Any:
    """The outputs of a Keras 3 operation on tf_keras's symbolic tensors.

    Args:
        operation: of Keras 3, not a layer. args, kwargs: of the call, tensors in place.
        dtype: of the operation's first output in Keras 3.

    Raises:
        ModelError: an operation, or an option of it, without a counterpart here.
    """
    kind = type(operation).__name__
    described = f"operation {operation.name!r} ({kind})"
    call = _ARITHMETIC.get(kind) or _OTHER.get(kind)
    if call is None:
        raise ModelError(
            f"{described} has no counterpart here; use layers, or one of: "
            f"{', '.join(sorted(SUPPORTED))}"
        )
    options = {k: v for k, v in vars(operation).items() if k[0] != "_" and k != "name"} | kwargs
    if options.get("dtype") is not None:
        options["dtype"] = as_float32(options["dtype"])
    options = _accepted(call, options, described)
    if kind in _ARITHMETIC:
        args = _cast(args, dtype)
    elif kind in _COMPARISONS:
        args = _promote(args, keep_first=kind == "Where")
    try:
        return call(*args, **options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{described} cannot be converted: {reason}") from error


def activation_call(function: Any, described: str) -> Callable:
    """The TensorFlow calls of an activation of keras.activations that tf_keras lacks.

    Args:
        described: the layer that has it, for messages.

    Raises:
        ModelError: a function of the user's own, or an unknown one.
    """
    name = getattr(function, "__name__", "")
    call = keras3_nn.ACTIVATIONS.get("".join(part.capitalize() for part in name.split("_")))
    if call is None or not str(function.__module__).startswith("keras."):
        raise ModelError(
            f"{described} has activation={name or function!r}, which tf_keras lacks; use one of "
            "keras.activations, or layers behind it"
        )
    return call


def as_float32(dtype: str) -> str:
    """float32 for every floating type; others as they are."""
    return "float32" if "float" in dtype else dtype


def _accepted(call: Callable, options: dict, described: str) -> dict:
    """The options that the function takes; others must be what they are by default."""
    known = inspect.signature(call).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known.values())
    accepted = {}
    for name, value in options.items():
        unset = value is None or value is False or (name, value) == ("data_format", "channels_last")
        if name in known or takes_all and name != "data_format":
            accepted[name] = value
        elif not unset and name not in _IGNORED:
            raise ModelError(f"{described} has {name}={value!r}, which is not supported")
    return accepted


def _cast(args: Any, dtype: str) -> Any:
    def cast(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return x.astype(tf.as_dtype(dtype).as_numpy_dtype)
        return tf.cast(x, dtype) if _is_tensor(x) and x.dtype != dtype else x

    return tf.nest.map_structure(cast, args)


def _promote(args: Sequence, keep_first: bool) -> Sequence:
    """Tensors of different types as the larger of them, floating before integer."""
    kept, compared = (args[:1], args[1:]) if keep_first else ((), args)
    types = {x.dtype for x in compared if _is_tensor(x)}
    if len(types) < 2:
        return args
    widest = max(types, key=lambda kind: (kind.is_floating, kind.size))
    return [*kept, *_cast(compared, widest)]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, tf_keras.__internal__.KerasTensor)
