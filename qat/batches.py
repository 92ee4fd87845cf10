"""The inputs that a model reads of a dataset's batches, with or without labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras

from qat.errors import ModelError, QatError


def input_batches(
    model: tf_keras.Model, dataset: tf.data.Dataset, steps: int | None
) -> Iterator[list[tf.Tensor]]:
    """Of each of the first `steps` batches (None = all) the tensors for `model.inputs`, in order.

    A batch is x, (x, y) or (x, y, sample weights), x being a tensor, or a tuple or dictionary of
    one tensor for each input; for several inputs it may also be their tuple alone.

    Raises:
        QatError: no dataset, an empty one, one without an end and no `steps`, `steps` below 1, or
            NaN or infinite inputs.
        ModelError: batches that do not fit the model's inputs.
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise QatError(
            f"need a tf.data.Dataset of batches, got {type(dataset).__name__}; for an array x pass "
            "tf.data.Dataset.from_tensor_slices(x).batch(32)"
        )
    if steps is not None and steps < 1:
        raise QatError(f"steps must be at least 1, or None for all batches; got {steps!r}")
    if steps is None and int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise QatError("the dataset has no end: say how many batches to take, e.g. steps=20")
    count = 0
    for batch in dataset.take(-1 if steps is None else steps):
        count += 1
        tensors, _ = inputs_and_labels(model, batch)
        if not all(_is_finite(tensor) for tensor in tensors):
            raise QatError(f"batch {count} of the dataset holds NaN or infinite values; clean it")
        yield [tf.cast(x, own.dtype) for x, own in zip(tensors, model.inputs, strict=True)]
    if not count:
        raise ModelError("the dataset is empty: it has no batch")


def inputs_and_labels(model: tf_keras.Model, batch: Any) -> tuple[list[tf.Tensor], Any]:
    """A batch's tensors for `model.inputs`, in order, and its y, None without.

    Forms and errors as of `input_batches`.
    """
    wanted = len(model.inputs)
    x, y = batch, None
    if isinstance(batch, tuple) and (_count(batch[0]) == wanted or _count(batch) != wanted):
        x, y = (*batch, None)[:2]
    if isinstance(x, dict):
        nested = model._nested_inputs
        names = sorted(nested) if isinstance(nested, dict) else model.input_names
        x = [x[name] for name in names if name in x]
    if _count(x) != wanted:
        raise ModelError(
            f"model {model.name!r} takes {wanted} inputs ({', '.join(model.input_names)}), and the "
            f"dataset's batches hold {_count(x)}; make each batch x or (x, y), x a tuple of them"
        )
    return tf.nest.flatten(x), y


def _is_finite(tensor: tf.Tensor) -> bool:
    return not tensor.dtype.is_floating or bool(tf.reduce_all(tf.math.is_finite(tensor)))


def _count(nested: Any) -> int:
    return len(tf.nest.flatten(nested))
