"""First ranges from data, before any training step."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from qat.errors import ModelError, QatError
from qat.layers import FakeQuantize


def calibrate(
    model: tf_keras.Model, dataset: tf.data.Dataset, *, steps: int | None = None
) -> tf_keras.Model:
    """Lets every activation quantizer observe its range over some batches; changes no weight.

    The model runs as in inference: batch normalization uses its moving statistics, dropout is off.

    Args:
        model: quantized; changed in place.
        dataset: batches of x or (x, y).
        steps: batches to use; None = all.

    Returns:
        The model.

    Raises:
        ValueError: an empty dataset, or a model without FakeQuantize layers.
    """
    observers = [layer for layer in model.layers if isinstance(layer, FakeQuantize)]
    if not observers:
        raise ModelError(f"model {model.name!r} has no FakeQuantize layer; quantize it first")
    run = tf.function(lambda x: model(x, training=False))
    seen = 0
    try:
        for layer in observers:
            layer.observing = True
        for batch in dataset.take(-1 if steps is None else steps):
            run(batch[0] if isinstance(batch, tuple) else batch)
            seen += 1
    finally:
        for layer in observers:
            layer.observing = False
    if not seen:
        raise QatError("the dataset to calibrate on is empty")
    return model
