"""Layers for the operators that Keras has no layer for; the canonical form is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

# Layers that change images at random while training and nothing afterwards.
AUGMENTATION = (
    tf_keras.layers.RandomBrightness,
    tf_keras.layers.RandomContrast,
    tf_keras.layers.RandomFlip,
    tf_keras.layers.RandomRotation,
    tf_keras.layers.RandomTranslation,
    tf_keras.layers.RandomZoom,
)
_register = tf_keras.utils.register_keras_serializable("qat")


@_register
def hard_swish(x):
    """`x · relu6(x + 3) / 6` (Howard et al. 2019), which tf_keras lacks."""
    return x * tf.nn.relu6(x + 3.0) * (1.0 / 6.0)


@_register
def hard_sigmoid6(x):
    """`relu6(x + 3) / 6`; tf_keras's own hard_sigmoid is another one, `clip(0.2·x + 0.5, 0, 1)`."""
    return tf.nn.relu6(x + 3.0) * (1.0 / 6.0)


@_register
class Affine(tf_keras.layers.Layer):
    """`multiplier · x + offset` with constants.

    Args:
        multiplier, offset: a number, or a list with one for each channel (the last axis).
    """

    def __init__(
        self,
        multiplier: float | Sequence[float] = 1.0,
        offset: float | Sequence[float] = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.multiplier, self.offset = np.asarray(multiplier).tolist(), np.asarray(offset).tolist()

    def call(self, inputs):
        return inputs * tf.constant(self.multiplier, inputs.dtype) + tf.constant(
            self.offset, inputs.dtype
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = {"multiplier": self.multiplier, "offset": self.offset}
        return {**super().get_config(), **config}


@_register
class ChannelScale(tf_keras.layers.Layer):
    """`γ · x`, γ trained, one for each channel (the last axis)."""

    def build(self, input_shape):
        self.gamma = self.add_weight(name="gamma", shape=input_shape[-1:], initializer="ones")
        super().build(input_shape)

    def call(self, inputs):
        return inputs * tf.cast(self.gamma, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@_register
class MatMul(tf_keras.layers.Layer):
    """`a · b`, or `a · bᵀ`, of two tensors (batch, …, rows, columns).

    Args:
        transpose_b: b is (batch, …, columns of the product, columns).
    """

    def __init__(self, transpose_b: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.transpose_b = transpose_b

    def call(self, inputs):
        a, b = inputs
        return tf.matmul(a, b, transpose_b=self.transpose_b)

    def compute_output_shape(self, input_shape):
        a, b = map(tuple, input_shape)
        return tf.TensorShape([*a[:-1], b[-2 if self.transpose_b else -1]])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "transpose_b": self.transpose_b}


@_register
class Buckets(tf_keras.layers.Layer):
    """The number of boundaries that x reaches, float32: Keras's Discretization, without gradient.

    Args:
        boundaries: rising numbers, at most 255, so that 8 bits can hold every bucket's number.
    """

    def __init__(self, boundaries: Sequence[float], **kwargs):
        super().__init__(**kwargs)
        self.boundaries = [float(number) for number in boundaries]

    def call(self, inputs):
        buckets = tf.raw_ops.Bucketize(
            input=tf.stop_gradient(tf.cast(inputs, tf.float32)), boundaries=self.boundaries
        )
        return tf.cast(buckets, tf.float32)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "boundaries": self.boundaries}


@_register
class Slice(tf_keras.layers.Layer):
    """`x[:, start:stop:step, …]`.

    Args:
        slices: (start, stop, step), each an integer or None, for every axis but the batch.
    """

    def __init__(self, slices: Sequence[Sequence[int | None]], **kwargs):
        super().__init__(**kwargs)
        self.slices = [list(part) for part in slices]

    def call(self, inputs):
        return inputs[(slice(None), *(slice(*part) for part in self.slices))]

    def compute_output_shape(self, input_shape):
        cuts = zip(tuple(input_shape)[1:], self.slices, strict=True)
        sizes = [None if n is None else len(range(n)[slice(*part)]) for n, part in cuts]
        return tf.TensorShape([input_shape[0], *sizes])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "slices": self.slices}


@_register
class Pad(tf_keras.layers.Layer):
    """Zeros around any axes.

    Args:
        paddings: (before, after) for every axis but the batch.
    """

    def __init__(self, paddings: Sequence[Sequence[int]], **kwargs):
        super().__init__(**kwargs)
        self.paddings = [list(pair) for pair in paddings]

    def call(self, inputs):
        return tf.pad(inputs, [[0, 0], *self.paddings])

    def compute_output_shape(self, input_shape):
        sizes = zip(tuple(input_shape)[1:], self.paddings, strict=True)
        padded = [None if n is None else n + sum(pair) for n, pair in sizes]
        return tf.TensorShape([input_shape[0], *padded])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "paddings": self.paddings}


class _Reduce(tf_keras.layers.Layer):
    def __init__(self, axes: Sequence[int], keepdims: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.axes, self.keepdims = sorted(axes), keepdims

    def compute_output_shape(self, input_shape):
        sizes = list(enumerate(input_shape))
        if self.keepdims:
            return tf.TensorShape([1 if axis in self.axes else n for axis, n in sizes])
        return tf.TensorShape([n for axis, n in sizes if axis not in self.axes])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axes": self.axes, "keepdims": self.keepdims}


@_register
class ReduceMean(_Reduce):
    """The mean over some axes, counted from 0, the batch.

    Args:
        axes: without the batch. keepdims: whether they stay as axes of size 1.
    """

    def call(self, inputs):
        return tf.reduce_mean(inputs, self.axes, keepdims=self.keepdims)


@_register
class ReduceMax(_Reduce):
    """The largest number over some axes; see `ReduceMean`."""

    def call(self, inputs):
        return tf.reduce_max(inputs, self.axes, keepdims=self.keepdims)


@_register
class FoldedAway(tf_keras.layers.Layer):
    """The identity, in the place of a layer that the kernel behind it has taken in.

    Args:
        replaced: class name of the layer that stood here. into: name of the kernel's layer.
    """

    def __init__(self, replaced: str, into: str, **kwargs):
        super().__init__(**kwargs)
        self.replaced, self.into = replaced, into

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "replaced": self.replaced, "into": self.into}
