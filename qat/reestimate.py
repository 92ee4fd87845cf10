"""Batch normalization statistics of the quantized network, measured on data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.batches import input_batches
from qat.canonical import Call, calls, functional, leaves
from qat.errors import ModelError
from qat.forward import Visit, forward, in_mode, infer, traced_if_repeated

BatchNormalization = tf_keras.layers.BatchNormalization


def reestimate_batch_norm(
    model: tf_keras.Model, dataset: tf.data.Dataset, *, steps: int | None = 50
) -> tf_keras.Model:
    """Replaces the moving statistics of every batch normalization by averages over batches.

    `μ = mean over batches of the batch's mean`, by their sizes, likewise σ²; of a layer that is
    called several times, over its calls too. The moving averages of training lag behind weights
    whose integers flip at every step; below 4 bits that costs whole points (arXiv 2203.11086,
    section 3.2). Kernels, ranges and layers that are not trainable or are called with
    `training=False` stay as they are. Batches are seen as in training: each batch normalization
    normalizes with the batch's own statistics.

    Args:
        model: quantized; changed in place. dataset: batches of x or (x, y), preferably augmented as
            in training, of 16 examples or more. steps: batches to use, at most; None = all.

    Returns:
        The model.

    Raises:
        QatError: as `qat.batches.input_batches`, e.g. an empty dataset.
        ModelError: activations that are not finite, or a nested model with batch normalizations
            that train, which would not be measured.
    """
    measure_batch_norm(model, dataset, steps, infer)
    return model


def measure_batch_norm(
    model: tf_keras.Model, dataset: tf.data.Dataset, steps: int | None, visit: Visit
) -> None:
    """`reestimate_batch_norm` with all other layers called by `visit`."""
    network = functional(model)
    _require_flat(network)
    found = {id(_inner(call)): _inner(call) for call in calls(network) if _is_measured(call)}
    norms = list(found.values())
    if not norms:
        return

    @traced_if_repeated(reduce_retracing=True)
    def probe(inputs):
        seen: dict[int, list[tf.Tensor]] = {id(norm): [] for norm in norms}

        def in_training(call: Call, args: tuple, kwargs: dict) -> Any:
            norm = _inner(call)
            if not isinstance(norm, BatchNormalization):
                return visit(call, args, kwargs)
            if not _is_measured(call):
                return infer(call, args, kwargs)
            outputs = in_mode(call, args, kwargs, training=True)
            # At once: the layer's next call overwrites them.
            seen[id(norm)].append(tf.stack([norm.moving_mean, norm.moving_variance]))
            return outputs

        forward(network, inputs, in_training)
        return [tf.reduce_mean(tf.cast(tf.stack(each), tf.float64), 0) for each in seen.values()]

    sums, count = [0.0] * len(norms), 0
    with _measuring(norms):
        for inputs in input_batches(network, dataset, steps):
            size = len(inputs[0])  # the last batch may be smaller
            sums = [a + b.numpy() * size for a, b in zip(sums, probe(inputs), strict=True)]
            count += size
    _require_finite(norms, sums)
    for norm, total in zip(norms, sums, strict=True):
        mean, variance = (total / count).astype(np.float32)
        norm.moving_mean.assign(mean)
        norm.moving_variance.assign(variance)


def _require_flat(network: tf_keras.Model) -> None:
    for layer in network.layers:
        nested = leaves(layer) if isinstance(layer, tf_keras.Model) else ()
        if any(isinstance(leaf, BatchNormalization) and leaf.trainable for leaf in nested):
            raise ModelError(
                f"layer {layer.name!r} is a model of its own; batch normalizations inside it are "
                "not measured: quantize the model first, which flattens it"
            )


def _inner(call: Call) -> tf_keras.layers.Layer:
    return getattr(call.layer, "layer", call.layer)


def _is_measured(call: Call) -> bool:
    """Whether training would move the statistics: not where the model's builder said otherwise."""
    norm = _inner(call)
    trains = isinstance(norm, BatchNormalization) and norm.trainable
    return trains and call.chosen_mode in (None, True)


def _require_finite(norms: list[BatchNormalization], sums: list[np.ndarray]) -> None:
    for norm, values in zip(norms, sums, strict=True):
        if not np.isfinite(values).all():
            raise ModelError(
                f"layer {norm.name!r} gets NaN or infinite values, though the data "
                "has none; look at the weights of the layers before it"
            )


@contextlib.contextmanager
def _measuring(norms: list[BatchNormalization]) -> Iterator[None]:
    """Inside, moving statistics become those of the last batch; afterwards they are as before."""
    momenta = [norm.momentum for norm in norms]
    before = [norm.get_weights() for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, weights in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            norm.set_weights(weights)
