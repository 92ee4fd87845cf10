"""Keras 3's activations, `keras.ops.nn` and `keras.ops.image` as TensorFlow calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def _hard_sigmoid(x: Any) -> Any:
    """relu6(x + 3) / 6; tf_keras's function of that name is clip(x / 5 + 1/2, 0, 1)."""
    return tf.nn.relu6(x + 3.0) * (1.0 / 6.0)


def _squareplus(x: Any, b: float = 4) -> Any:
    return (x + tf.sqrt(tf.square(x) + float(b))) * 0.5


def _celu(x: Any, alpha: float = 1.0) -> Any:
    return tf.nn.relu(x) + alpha * tf.math.expm1(tf.minimum(x, 0.0) * (1.0 / alpha))


def _glu(x: Any, axis: int = -1) -> Any:
    values, gates = tf.split(x, 2, axis)
    return values * tf.sigmoid(gates)


def _elu(x: Any, alpha: float = 1.0) -> Any:
    return tf.nn.elu(x) if alpha == 1 else tf.nn.relu(x) + alpha * tf.nn.elu(tf.minimum(x, 0.0))


def _log_softmax(x: Any, axis: int = -1) -> Any:
    return tf.nn.log_softmax(x, axis)


def _soft_shrink(x: Any, threshold: float = 0.5) -> Any:
    return tf.nn.relu(x - threshold) - tf.nn.relu(-x - threshold)


def _threshold(x: Any, threshold: float, default_value: float) -> Any:
    return tf.where(x > threshold, x, default_value)


def _sparse_plus(x: Any) -> Any:
    curve = 0.25 * tf.square(x + 1.0)
    return tf.where(x <= -1.0, tf.zeros_like(x), tf.where(x < 1.0, curve, x))


# {class of the operation: function}; the functions of keras.activations compute the same.
ACTIVATIONS: dict[str, Callable] = {
    "Celu": _celu,
    "Elu": _elu,
    "Gelu": lambda x, approximate=True: tf.nn.gelu(x, approximate),
    "Glu": _glu,
    "HardShrink": lambda x, threshold=0.5: tf.where(tf.abs(x) > threshold, x, tf.zeros_like(x)),
    "HardSigmoid": _hard_sigmoid,
    "HardSilu": lambda x: x * _hard_sigmoid(x),
    "HardTanh": lambda x: tf.clip_by_value(x, -1.0, 1.0),
    "LeakyRelu": lambda x, negative_slope=0.2: tf.nn.leaky_relu(x, negative_slope),
    "LogSigmoid": tf.math.log_sigmoid,
    "LogSoftmax": _log_softmax,
    "Relu": tf.nn.relu,
    "Relu6": tf.nn.relu6,
    "Selu": tf.nn.selu,
    "Sigmoid": tf.sigmoid,
    "Silu": lambda x: tf.nn.silu(x),
    "Softmax": lambda x, axis=-1: tf.nn.softmax(x, axis),
    "Softplus": tf.math.softplus,
    "Softsign": tf.nn.softsign,
    "SoftShrink": _soft_shrink,
    "SparsePlus": _sparse_plus,
    "SparseSigmoid": lambda x: tf.clip_by_value(0.5 * x + 0.5, 0.0, 1.0),
    "Squareplus": _squareplus,
    "Tanh": tf.tanh,
    "TanhShrink": lambda x: x - tf.tanh(x),
    "Threshold": _threshold,
}


def _pool(function: Callable) -> Callable:
    def pool(inputs: Any, pool_size: Any, strides: Any = None, padding: str = "valid") -> Any:
        size = _each(pool_size, inputs)
        strides = size if strides is None else _each(strides, inputs)
        return function(inputs, size, strides, padding.upper())

    return pool


def _convolution(
    inputs: Any, kernel: Any, strides: Any = 1, padding: str = "valid", dilation_rate: Any = 1
) -> Any:
    return tf.nn.convolution(
        inputs,
        kernel,
        _each(strides, inputs),
        padding.upper(),
        dilations=_each(dilation_rate, inputs),
    )


def _each(value: int | Sequence[int], x: Any) -> list[int]:
    """One number for each spatial axis."""
    return [value] * (len(x.shape) - 2) if isinstance(value, int) else list(value)


def _normalize(x: Any, axis: int = -1, order: int = 2, epsilon: float | None = None) -> Any:
    if order != 2:
        raise ValueError(f"order={order}; supported is 2")
    epsilon = 1e-7 if epsilon is None else epsilon
    return tf.math.l2_normalize(x, axis, epsilon**2)


def _one_hot(x: Any, num_classes: int, axis: int = -1, dtype: Any = None) -> Any:
    return tf.one_hot(tf.cast(x, tf.int32), num_classes, axis=axis, dtype=dtype or tf.float32)


def _resize(images: Any, size: Any, interpolation: str = "bilinear", antialias: bool = False):
    return tf.image.resize(images, size, interpolation, antialias=antialias)


def _grayscale(images: Any) -> Any:
    weights = tf.constant([[0.2989], [0.5870], [0.1140]])
    return tf.tensordot(images, weights, [[-1], [0]])


def _pad_images(images: Any, **options: int | None) -> Any:
    rows, columns = _edges(images, options, "padding", _missing_padding)
    return tf.pad(images, [[0, 0], rows, columns, [0, 0]])


def _crop_images(images: Any, **options: int | None) -> Any:
    (top, bottom), (left, right) = _edges(images, options, "cropping", _missing_cropping)
    height, width = images.shape[1:3]
    return images[:, top : height - bottom, left : width - right]


def _missing_padding(size: int, target: int, other: int) -> int:
    return target - size - other


def _missing_cropping(size: int, target: int, other: int) -> int:
    return size - target - other


def _edges(images: Any, options: dict, what: str, missing: Callable) -> list[list[int]]:
    """(before, after) of rows and columns; of the three numbers each one may be left out."""
    found = []
    for size, before, after, target in (
        (images.shape[1], "top", "bottom", "height"),
        (images.shape[2], "left", "right", "width"),
    ):
        first, last = options.get(f"{before}_{what}"), options.get(f"{after}_{what}")
        target = options.get(f"target_{target}")
        if first is None:
            first = missing(size, target, last)
        found.append([first, missing(size, target, first) if last is None else last])
    return found


OPERATIONS: dict[str, Callable] = {
    "AveragePool": _pool(tf.nn.avg_pool),
    "Conv": _convolution,
    "CropImages": _crop_images,
    "DepthToSpace": lambda x, block_size: tf.nn.depth_to_space(x, block_size),
    "MaxPool": _pool(tf.nn.max_pool),
    "Normalize": _normalize,
    "OneHot": _one_hot,
    "PadImages": _pad_images,
    "RGBToGrayscale": _grayscale,
    "Resize": _resize,
    "SpaceToDepth": lambda x, block_size: tf.nn.space_to_depth(x, block_size),
}
