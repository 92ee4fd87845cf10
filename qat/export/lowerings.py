"""The table of lowerings: for a layer's type, the function that writes its operators."""

from __future__ import annotations

from collections.abc import Callable

import tf_keras

from qat.export import (
    lower_activation,
    lower_embedding,
    lower_merge,
    lower_move,
    lower_norm,
    lower_operators,
    lower_shape,
)
from qat.export.builder import Builder, Stored
from qat.export.pending import Pending

layers = tf_keras.layers
Value = Stored | Pending
Shape = tuple[int, ...]
Lowering = Callable[[Builder, layers.Layer, list[Value], Shape], Value]

LOWERINGS: dict[type, Lowering] = {
    **lower_activation.LOWERINGS,
    **lower_embedding.LOWERINGS,
    **lower_merge.LOWERINGS,
    **lower_move.LOWERINGS,
    **lower_norm.LOWERINGS,
    **lower_operators.LOWERINGS,
    **lower_shape.LOWERINGS,
}
# These take operators that still wait for a grid; all others need their inputs in the file.
TAKES_PENDING = (
    layers.Activation,
    layers.Concatenate,
    layers.Dropout,
    layers.ELU,
    layers.LeakyReLU,
    layers.Maximum,
    layers.Minimum,
    layers.ReLU,
    layers.ThresholdedReLU,
)
