"""`keras.ops.numpy` and the like as TensorFlow calls on tf_keras's symbolic tensors.

Each function takes an operation's inputs and its options, under Keras 3's names for them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# Computed in the type of the result: Keras 3 promotes types, TensorFlow refuses to mix them.
ARITHMETIC: dict[str, Callable] = {
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
    "Matmul": tf.matmul,
    "Norm": lambda x, ord=None, axis=None, keepdims=False: _norm(x, ord, axis, keepdims),
    "Tensordot": lambda x1, x2, axes=2: tf.tensordot(x1, x2, axes),
}
# Comparisons, choices, and values moved about: each type as it is.
OTHER: dict[str, Callable] = {
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
}


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


def _norm(x: Any, order: Any, axis: Any, keepdims: bool) -> Any:
    if isinstance(axis, tuple | list) and len(axis) == 1:
        (axis,) = axis
    return tf.norm(x, "euclidean" if order is None else order, axis, keepdims)


def _item(x: Any, key: Any) -> Any:
    """x[key]; tf_keras cannot save an ellipsis."""
    keys = list(key) if isinstance(key, tuple | list) else [key]
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        missing = len(x.shape) - sum(each is not None for each in keys) + 1
        keys[place : place + 1] = [slice(None)] * missing
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
