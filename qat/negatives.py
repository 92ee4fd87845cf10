"""Where a float model's tensors can be negative: some quantizers would cut that off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tf_keras

from qat.canonical.graph import Call
from qat.roles import KEEPS_GRID, Role, fixed_range

layers = tf_keras.layers
# Of numbers from 0 up they make numbers from 0 up.
_COMBINE = (
    layers.Add,
    layers.Multiply,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
)


def never_negative(
    tensor: Any,
    producer: Mapping[int, Call],
    role_of: Callable[[Call], Role],
    input_range: tuple[float, float] | None,
) -> bool:
    """Whether it follows from the layers, whatever their weights, that no number is below 0.

    Args:
        tensor: symbolic, of a functional model.
        producer: for the id of each tensor the call that makes it; inputs have none.
        role_of: the role of a call.
        input_range: (minimum, maximum) of the model's inputs, if it is known.
    """
    call = producer.get(id(tensor))
    if call is None:
        return input_range is not None and input_range[0] >= 0
    found = role_of(call)
    if found is Role.RELU:
        return True
    if found is Role.FIXED:
        return fixed_range(call.layer, 8)[0] >= 0
    keeps = found in (*KEEPS_GRID, Role.CONCAT) or isinstance(call.layer, _COMBINE)
    return keeps and all(never_negative(x, producer, role_of, input_range) for x in call.inputs)
