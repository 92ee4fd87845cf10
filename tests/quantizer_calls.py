"""Calling a quantizer alone: forward, gradients and codes, eagerly and compiled."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

F32 = np.float32
HALF_ULP = 2.0**-24
AXES = [None, (-1,), (-2, -1)]
every_axes = pytest.mark.parametrize("axes", AXES, ids=str)
# Compiling takes seconds: once per channel and once per tensor is enough.
every_way = pytest.mark.parametrize(
    ("axes", "mode"),
    [*((axes, "eager") for axes in AXES), (None, "graph"), ((-1,), "xla")],
    ids=str,
)


@dataclasses.dataclass(frozen=True)
class Called:
    """What one call gave: output, gradients, and the integers behind the output."""

    y: np.ndarray
    dx: np.ndarray
    gradients: dict[str, np.ndarray]
    codes: np.ndarray
    scale: np.ndarray


def build(quantizer, shape):
    """The quantizer's variables for a tensor of this shape."""
    return quantizer.build(tf.TensorShape(shape), "kernel", tf_keras.layers.Layer())


def call(quantizer, x, weights=None, *, mode="eager", training=False, upstream=None) -> Called:
    """Forward and backward with `upstream` (ones), then the codes; checks shapes and dtypes."""
    x = tf.convert_to_tensor(x)
    weights = weights or {}
    upstream = tf.ones_like(x) if upstream is None else tf.cast(upstream, x.dtype)
    trained = {key: variable for key, variable in weights.items() if variable.trainable}

    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = quantizer(x, training, weights)
        dx, gradients = tape.gradient(y, [x, trained], output_gradients=upstream)
        return y, dx, gradients, quantizer.codes(x, weights), quantizer.grid(weights, x).scale

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    y, dx, gradients, codes, scale = tf.nest.map_structure(np.asarray, run(x, upstream))
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (*[x.dtype.as_numpy_dtype] * 2, *[x.shape] * 2)
    return Called(y=y, dx=dx, gradients=gradients, codes=codes, scale=scale)


def sample(shape=(3, 3, 4, 6), spread=0.3, seed=0):
    """Normal values; the channels of the last axis differ in size and in mean."""
    x = np.random.default_rng(seed).normal(0.1, spread, shape) * np.linspace(0.3, 2.0, shape[-1])
    return x.astype(F32)


def shared_axes(rank, channel_axes):
    """Axes of the elements that share a level, as NumPy's reductions take them."""
    kept = () if channel_axes is None else {axis % rank for axis in channel_axes}
    return tuple(axis for axis in range(rank) if axis not in kept)


def assert_serializable(makers):
    """Config and Keras serialization make an equal quantizer; no two of the makers are equal."""
    for name, make in makers.items():
        quantizer = make()
        config = json.loads(json.dumps(quantizer.get_config()))
        assert type(quantizer).from_config(config) == quantizer
        serialized = tf_keras.utils.legacy.serialize_keras_object(quantizer)
        restored = tf_keras.utils.legacy.deserialize_keras_object(
            json.loads(json.dumps(serialized))
        )
        assert type(restored) is type(quantizer)
        assert [other for other in makers if makers[other]() == restored] == [name]
