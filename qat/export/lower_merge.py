"""Maximum and Minimum → MAXIMUM and MINIMUM, which compare codes of one grid."""

from __future__ import annotations

import dataclasses

import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Stored
from qat.export.pending import Joined

layers = tf_keras.layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extreme(Joined):
    """The greatest or least of all inputs, two by two.

    Attributes:
        operator: MAXIMUM or MINIMUM.
    """

    operator: str

    def emit(self, builder, name, grid):
        first, *others = self.stored_inputs(builder, grid)
        result = first.tensor
        for number, other in enumerate(others, start=1):
            is_last = number == len(others)
            output = builder.activation(
                name if is_last else f"{name}/part", self.shape if is_last else first.shape, grid
            )
            options = schema.MaximumMinimumOptionsT()
            version = 1 if grid is None else 2
            result = builder.operator(
                self.operator, version, [result, other.tensor], output, options
            )
        return Stored(result, grid)


def _extreme(operator: str):
    def lower(builder, layer, inputs, shape):
        return Extreme(name=layer.name, shape=shape, inputs=tuple(inputs), operator=operator)

    return lower


LOWERINGS = {layers.Maximum: _extreme("MAXIMUM"), layers.Minimum: _extreme("MINIMUM")}
