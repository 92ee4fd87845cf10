"""Keras 3 operations (`keras.ops.*`, a + b, x[:, 1:]) as TensorFlow calls on tf_keras's tensors.

A call on a symbolic tensor becomes a TFOpLambda layer, as if the user had written it in tf_keras.
Each function here takes an operation's inputs and its options, under Keras 3's names for them.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.errors import ModelError
from qat.loading import keras3_nn

# Computed in the type of the result: Keras 3 promotes types, TensorFlow refuses to mix them.
_ARITHMETIC: dict[str, Callable] = {
    **dict.fromkeys(("Absolute", "Abs"), tf.abs),
    "Add": lambda x1, x2: x1 + x2,
    "Average": lambda x, axis=None: tf.reduce_mean(x, axis),
    "Ceil": tf.math.ceil,
    "Clip": lambda x, x_min, x_max: tf.clip_by_value(x, x_min, x_max),
    "Cos": tf.cos,
    **dict.fromkeys(("Divide", "TrueDivide"), lambda x1, x2: x1 / x2),
    "DivideNoNan": tf.math.divide_no_nan,
    "Erf": tf.math.erf,
    "Exp": tf.exp,
    "Expm1": tf.math.expm1,
    "Floor": tf.floor,
    "FloorDivide": lambda x1, x2: x1 // x2,
    "Log": tf.math.log,
    "Log10": lambda x: tf.math.log(x) * (1.0 / math.log(10.0)),
    "Log1p": tf.math.log1p,
    "Log2": lambda x: tf.math.log(x) * (1.0 / math.log(2.0)),
    "Logsumexp": lambda x, axis=None, keepdims=False: tf.reduce_logsumexp(x, axis, keepdims),
    **dict.fromkeys(
        ("Max", "Amax"), lambda x, axis=None, keepdims=False: tf.reduce_max(x, axis, keepdims)
    ),
    "Maximum": tf.maximum,
    "Mean": lambda x, axis=None, keepdims=False: tf.reduce_mean(x, axis, keepdims),
    **dict.fromkeys(
        ("Min", "Amin"), lambda x, axis=None, keepdims=False: tf.reduce_min(x, axis, keepdims)
    ),
    "Minimum": tf.minimum,
    "Mod": lambda x1, x2: x1 % x2,
    "Multiply": lambda x1, x2: x1 * x2,
    "Negative": lambda x: -x,
    "Power": lambda x1, x2: x1**x2,
    "Prod": lambda x, axis=None, keepdims=False: tf.reduce_prod(x, axis, keepdims),
    "Reciprocal": tf.math.reciprocal,
    "Round": lambda x, decimals=0: _round(x, decimals),
    "Rsqrt": tf.math.rsqrt,
    "Sign": tf.sign,
    "Sin": tf.sin,
    "Sqrt": tf.sqrt,
    "Square": tf.square,
    "Std": lambda x, axis=None, keepdims=False: tf.math.reduce_std(x, axis, keepdims),
    "Subtract": lambda x1, x2: x1 - x2,
    "Sum": lambda x, axis=None, keepdims=False: tf.reduce_sum(x, axis, keepdims),
    "Var": lambda x, axis=None, keepdims=False: tf.math.reduce_variance(x, axis, keepdims),
    "Dot": lambda x1, x2: _dot(x1, x2),
    "Einsum": lambda *operands, subscripts: tf.einsum(subscripts, *operands),
    "Matmul": tf.matmul,
    "Norm": lambda x, ord=None, axis=None, keepdims=False: tf.norm(
        x, "euclidean" if ord is None else ord, axis, keepdims
    ),
    "Tensordot": lambda x1, x2, axes=2: tf.tensordot(x1, x2, axes),
    **keras3_nn.ACTIVATIONS,
}
_OTHER: dict[str, Callable] = {
    # Comparisons and choices.
    "All": lambda x, axis=None, keepdims=False: tf.reduce_all(x, axis, keepdims),
    "Any": lambda x, axis=None, keepdims=False: tf.reduce_any(x, axis, keepdims),
    "Argmax": lambda x, axis=None, keepdims=False: _argument(tf.argmax, x, axis, keepdims),
    "Argmin": lambda x, axis=None, keepdims=False: _argument(tf.argmin, x, axis, keepdims),
    "Equal": tf.equal,
    "Greater": lambda x1, x2: x1 > x2,
    "GreaterEqual": lambda x1, x2: x1 >= x2,
    "Less": lambda x1, x2: x1 < x2,
    "LessEqual": lambda x1, x2: x1 <= x2,
    "LogicalAnd": tf.logical_and,
    "LogicalNot": tf.logical_not,
    "LogicalOr": tf.logical_or,
    "NotEqual": tf.not_equal,
    "Where": lambda condition, x1, x2: tf.where(condition, x1, x2),
    # Values moved about.
    "BroadcastTo": lambda x, shape: tf.broadcast_to(x, shape),
    "Cast": lambda x, dtype: tf.cast(x, dtype),
    "Concatenate": lambda xs, axis=0: tf.concat(xs, axis),
    "ConvertToTensor": lambda x, dtype=None: x if dtype is None else tf.cast(x, dtype),
    "Copy": tf.identity,
    "ExpandDims": lambda x, axis: _expand(x, axis),
    "Flip": lambda x, axis=None: tf.reverse(x, _axes(x, axis)),
    "FullLike": lambda x, fill_value, dtype=None: tf.zeros_like(x, dtype) + fill_value,
    "GetItem": lambda x, key: _item(x, key),
    "Moveaxis": lambda x, source, destination: _move(x, source, destination),
    "OnesLike": lambda x, dtype=None: tf.ones_like(x, dtype),
    "Pad": lambda x, pad_width, mode="constant", constant_values=None: tf.pad(
        x, _pairs(x, pad_width), mode.upper(), constant_values or 0
    ),
    "Ravel": lambda x: tf.reshape(x, [-1]),
    "Repeat": lambda x, repeats, axis=None: tf.repeat(x, repeats, axis),
    "Reshape": lambda x, newshape: tf.reshape(x, newshape),
    "Roll": lambda x, shift, axis: tf.roll(x, shift, axis),
    "SaturateCast": lambda x, dtype: tf.saturate_cast(x, dtype),
    "Split": lambda x, indices_or_sections, axis=0: _split(x, indices_or_sections, axis),
    "Squeeze": lambda x, axis=None: tf.squeeze(x, axis),
    "Stack": lambda x, axis=0: tf.stack(x, axis),
    "StopGradient": tf.stop_gradient,
    "Swapaxes": lambda x, axis1, axis2: _swap(x, axis1, axis2),
    "Take": lambda x, indices, axis: tf.gather(x, indices, axis=axis),
    "Tile": lambda x, repeats: tf.tile(x, _leading(x, repeats, 1)),
    "Transpose": lambda x, axes=None: tf.transpose(x, axes),
    "Unstack": lambda x, num=None, axis=0: tf.unstack(x, num, axis),
    "ZerosLike": lambda x, dtype=None: tf.zeros_like(x, dtype),
    **keras3_nn.OPERATIONS,
}
SUPPORTED = frozenset({*_ARITHMETIC, *_OTHER})
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
        elif not unset:
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


def _axes(x: Any, axis: Any) -> list[int]:
    if axis is None:
        return list(range(len(x.shape)))
    return [axis] if isinstance(axis, int) else list(axis)


def _round(x: Any, decimals: int) -> Any:
    if not decimals:
        return tf.round(x)
    return tf.round(x * 10.0**decimals) * 10.0**-decimals


def _dot(x1: Any, x2: Any) -> Any:
    if len(x1.shape) < 2 or len(x2.shape) < 2:
        raise ValueError("inputs of one axis")
    return tf.tensordot(x1, x2, [[-1], [-2]])


def _argument(function: Callable, x: Any, axis: int | None, keepdims: bool) -> Any:
    if axis is None:
        raise ValueError("axis=None, over the batch")
    result = function(x, axis, output_type=tf.int32)
    return tf.expand_dims(result, axis) if keepdims else result


def _expand(x: Any, axis: int | Sequence[int]) -> Any:
    if isinstance(axis, int):
        return tf.expand_dims(x, axis)
    rank = len(x.shape) + len(axis)
    for position in sorted(each % rank for each in axis):
        x = tf.expand_dims(x, position)
    return x


def _item(x: Any, key: Any) -> Any:
    keys = key if isinstance(key, tuple | list) else (key,)
    if not all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in keys):
        raise ValueError("an index that is neither a number nor a slice; use ops.take")
    return x[tuple(keys)]


def _move(x: Any, source: Any, destination: Any) -> Any:
    rank = len(x.shape)
    goals = [axis % rank for axis in _axes(x, destination)]
    moved = [axis % rank for axis in _axes(x, source)]
    order = [axis for axis in range(rank) if axis not in moved]
    for goal, axis in sorted(zip(goals, moved, strict=True)):
        order.insert(goal, axis)
    return tf.transpose(x, order)


def _swap(x: Any, axis1: int, axis2: int) -> Any:
    order = list(range(len(x.shape)))
    order[axis1], order[axis2] = order[axis2], order[axis1]
    return tf.transpose(x, order)


def _pairs(x: Any, width: Any) -> list[list[int]]:
    """NumPy's short forms of a padding, written out for each axis."""
    if isinstance(width, int):
        width = (width,)
    if len(width) == 1 or isinstance(width[0], int):
        pair = width[0] if len(width) == 1 else width
        pair = [pair, pair] if isinstance(pair, int) else list(pair)
        return [list(pair) for _ in x.shape]
    return [list(pair) for pair in width]


def _leading(x: Any, values: Any, fill: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return [fill] * (len(x.shape) - len(values)) + values


def _split(x: Any, parts: int | Sequence[int], axis: int) -> list:
    if isinstance(parts, int):
        return tf.split(x, parts, axis)
    edges = [0, *parts, x.shape[axis]]
    return tf.split(x, [end - start for start, end in itertools.pairwise(edges)], axis)
