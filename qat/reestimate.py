"""Batch normalization statistics of the quantized network, measured on data."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from absl import logging

from qat.batches import input_batches
from qat.canonical import Call, calls, functional, leaves
from qat.errors import ModelError
from qat.forward import Visit, forward, in_mode, infer, traced_if_repeated

BatchNormalization = tf_keras.layers.BatchNormalization
# Examples of a batch, and values of a channel, that statistics are worth something from.
FEWEST = 32


def reestimate_batch_norm(
    model: tf_keras.Model,
    dataset: tf.data.Dataset,
    *,
    steps: int | None = 50,
    fewest: int = FEWEST,
) -> tf_keras.Model:
    """Replaces the moving statistics of every batch normalization by averages over batches.

    `μ = mean over batches of the batch's mean`, by their sizes, likewise σ²; of a layer that is
    called several times, over its calls too. The moving averages of training lag behind weights
    whose integers flip at every step; below 4 bits that costs whole points (arXiv 2203.11086,
    section 3.2). Kernels, ranges and layers that are not trainable or are called with
    `training=False` stay as they are. Batches are seen as in training: each batch normalization
    normalizes with the batch's own statistics. Batches of too few examples are therefore joined;
    where all of them give a channel too few values, its statistics stay, with a warning.

    Args:
        model: quantized; changed in place. dataset: batches of x or (x, y), preferably augmented as
            in training. steps: (joined) batches to use, at most; None = all. fewest: examples of a
            batch, and values of a channel, that statistics are taken from.

    Returns:
        The model.

    Raises:
        QatError: as `qat.batches.input_batches`, e.g. an empty dataset.
        ModelError: activations that are not finite, or a nested model with batch normalizations
            that train, which would not be measured.
    """
    most = None if steps is None else steps * fewest
    batches = input_batches(functional(model), dataset, most)
    measure_batch_norm(model, batches, infer, steps, fewest)
    return model


def measure_batch_norm(
    model: tf_keras.Model,
    batches: Iterable[list[tf.Tensor]],
    visit: Visit,
    most: int | None = None,
    fewest: int = FEWEST,
) -> None:
    """`reestimate_batch_norm` with all other layers called by `visit`.

    Args:
        batches: as `input_batches` gives them. most: so many of them, once joined.
    """
    network = functional(model)
    _require_flat(network)
    measured = [call for call in calls(network) if _is_measured(call)]
    if not measured:
        return
    batches = itertools.islice(_joined(batches, fewest), most)
    first = next(batches)
    norms = _with_enough_values(measured, len(first[0]), fewest)
    if not norms:
        return

    probe = _probe(network, norms, visit)
    sums, count = [0.0] * len(norms), 0
    with _measuring(norms):
        for inputs in itertools.chain([first], batches):
            size = len(inputs[0])  # the last batch may be smaller
            sums = [a + b.numpy() * size for a, b in zip(sums, probe(inputs), strict=True)]
            count += size
    _require_finite(norms, sums)
    for norm, total in zip(norms, sums, strict=True):
        mean, variance = (total / count).astype(np.float32)
        norm.moving_mean.assign(mean)
        norm.moving_variance.assign(variance)


def _probe(
    network: tf_keras.Model, norms: list[BatchNormalization], visit: Visit
) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
    """From a batch's inputs to each layer's (mean, variance), averaged over its calls."""

    @traced_if_repeated(reduce_retracing=True)
    def probe(inputs):
        seen: dict[int, list[tf.Tensor]] = {id(norm): [] for norm in norms}

        def in_training(call: Call, args: tuple, kwargs: dict) -> Any:
            norm = _inner(call)
            if not isinstance(norm, BatchNormalization):
                return visit(call, args, kwargs)
            if id(norm) not in seen or not _is_measured(call):
                return infer(call, args, kwargs)
            outputs = in_mode(call, args, kwargs, training=True)
            # At once: the layer's next call overwrites them.
            seen[id(norm)].append(tf.stack([norm.moving_mean, norm.moving_variance]))
            return outputs

        forward(network, inputs, in_training)
        return [tf.reduce_mean(tf.cast(tf.stack(each), tf.float64), 0) for each in seen.values()]

    return probe


def _joined(batches: Iterable[list[tf.Tensor]], fewest: int) -> Iterator[list[tf.Tensor]]:
    """Consecutive batches of too few examples as one; a rest joins the last one."""
    whole, parts = [], []
    for inputs in batches:
        parts.append(inputs)
        if sum(len(part[0]) for part in parts) >= fewest:
            yield from whole
            whole, parts = [_concatenated(parts)], []
    yield _concatenated(whole + parts)


def _concatenated(parts: list[list[tf.Tensor]]) -> list[tf.Tensor]:
    return (
        parts[0] if len(parts) == 1 else [tf.concat(each, 0) for each in zip(*parts, strict=True)]
    )


def _with_enough_values(
    measured: list[Call], examples: int, fewest: int
) -> list[BatchNormalization]:
    """The layers whose every call gives a channel enough values; tells of the others."""
    norms = {id(_inner(call)): _inner(call) for call in measured}
    few = {id(_inner(call)) for call in measured if examples * _positions(call) < fewest}
    if few:
        names = ", ".join(norms[number].name for number in norms if number in few)
        logging.warning(
            "batch normalizations keep their statistics, since %d examples are too few to measure "
            "them again (a channel needs %d values): %s",
            examples,
            fewest,
            names,
        )
    return [norm for number, norm in norms.items() if number not in few]


def _positions(call: Call) -> int:
    """Of how many places of an example a channel's statistics are."""
    shape, axis = call.inputs[0].shape, _inner(call).axis
    channels = {number % len(shape) for number in tf.nest.flatten(axis)}
    return math.prod(
        size or 1 for place, size in enumerate(shape) if place and place not in channels
    )


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
