"""Batch normalization statistics of the quantized network, measured once training is over."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.canonical import Call, calls, functional, rebuild
from qat.errors import ModelError

BatchNormalization = tf_keras.layers.BatchNormalization


def reestimate_batch_norm(
    model: tf_keras.Model, dataset: tf.data.Dataset, *, steps: int = 50
) -> tf_keras.Model:
    """Replaces the moving statistics of every batch normalization by averages over batches.

    `μ = mean over batches of the batch's mean`, likewise σ². The moving averages of training lag
    behind weights whose integers flip at every step; below 4 bits that costs whole points
    (arXiv 2203.11086, section 3.2). Kernels, ranges and layers that are not trainable stay as they
    are. Batches are seen as in training: each batch normalization normalizes with the batch's own
    statistics.

    Args:
        model: quantized and trained; changed in place. dataset: batches of x or (x, y), preferably
            augmented as in training. steps: batches to use, at most.

    Returns:
        The model.

    Raises:
        ModelError: an empty dataset.
    """
    network = functional(model)
    found = {id(_inner(call)): _inner(call) for call in calls(network) if _is_measured(call)}
    norms = list(found.values())
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    before = [norm.get_weights() for norm in norms]
    sums, count = None, 0
    try:
        for norm in norms:
            norm.momentum = 0.0  # the moving statistics become the batch's
        twin = _in_training_mode(network)
        probe = tf.function(lambda x: twin(x, training=False))
        for batch in dataset.take(steps):
            probe(batch[0] if isinstance(batch, tuple) else batch)
            measured = [np.float64(v) for norm in norms for v in _statistics(norm)]
            sums = (
                measured if sums is None else [a + b for a, b in zip(sums, measured, strict=True)]
            )
            count += 1
    finally:
        for norm, momentum, weights in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            norm.set_weights(weights)
    if not count:
        raise ModelError("no batch to re-estimate batch normalization with: the dataset is empty")
    means = iter(sums)
    for norm in norms:
        norm.moving_mean.assign((next(means) / count).astype(np.float32))
        norm.moving_variance.assign((next(means) / count).astype(np.float32))
    return model


def _inner(call: Call) -> tf_keras.layers.Layer:
    return getattr(call.layer, "layer", call.layer)


def _is_measured(call: Call) -> bool:
    return isinstance(_inner(call), BatchNormalization) and _inner(call).trainable


def _statistics(norm: BatchNormalization) -> list[Any]:
    return [norm.moving_mean, norm.moving_variance]


def _in_training_mode(model: tf_keras.Model) -> tf_keras.Model:
    """The model, sharing its layers, with its measured batch normalizations in training mode."""

    def visit(call: Call, args: tuple, kwargs: dict) -> Any:
        if isinstance(_inner(call), BatchNormalization):
            kwargs = {**kwargs, "training": _is_measured(call)}
        return call.layer(*args, **kwargs)

    return rebuild(model, visit)
