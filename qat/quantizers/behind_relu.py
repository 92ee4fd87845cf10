"""A ReLU in front of a quantizer: what is known of its output, and how to pass by its gradient."""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

# Of each ReLU operator, the number below which its gradient is not 0.
_LIMITS = {"Relu": math.inf, "Relu6": 6.0}


@dataclasses.dataclass(frozen=True)
class Relu:
    """The operator `y = min(max(inputs, 0), limit)` whose y is quantized.

    Attributes:
        inputs: the tensor in front of it.
        limit: math.inf or 6.0.
    """

    inputs: tf.Tensor
    limit: float


def relu_in_front(x: tf.Tensor) -> Relu | None:
    """The ReLU that x comes from, in a graph; None where there is none, and in eager mode.

    A quantizer's gradient selects what the ReLU's would select again, which costs a pass and keeps
    x in memory until then.
    """
    operator = None if tf.executing_eagerly() else getattr(x, "op", None)
    if operator is None or operator.type not in _LIMITS:
        return None
    return Relu(operator.inputs[0], _LIMITS[operator.type])
