"""PReLU as TFLite's int8 PRELU computes it: what layers with learned slopes share."""

from __future__ import annotations

import tensorflow as tf
import tf_keras


def early_weight(layer: tf_keras.layers.Layer) -> tf.Variable:
    """What `qat.settle_biases` finds out for `prelu`; 0 till then."""
    return layer.add_weight(
        "early",
        shape=(),
        dtype=tf.float32,
        initializer="zeros",
        trainable=False,
        experimental_autocast=False,
    )


def prelu(x: tf.Tensor, slope: tf.Tensor, early: tf.Variable) -> tf.Tensor:
    """`x where x >= 0, else a·x + sign(a·x)·early`: PRELU's codes, when it is rounded once.

    The operator rounds a·x twice and thereby reaches each code that much early, away from 0.
    """
    negative = tf.cast(slope, x.dtype) * x
    return tf.where(x >= 0, x, negative + tf.sign(negative) * tf.cast(early, x.dtype))
