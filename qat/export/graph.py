"""The operators and tensors of a TFLite file before they are bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qat.errors import QatError
from qat.grid import Grid


class ExportError(QatError):
    """A model or path that cannot be exported. One line: layer, reason, what to do."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: unique; kernels are "<layer>/kernel", biases "<layer>/bias".
        shape: as in the file, batch 1.
        dtype: "float32", "int4", "int8", "uint8", "int16", "int32", "int64" or "bool".
        data: constant values (whole numbers for integer types), or None.
        scale, zero_point: float32 and int64 vectors (one entry, or one per channel), or None.
        axis: the channel axis that `scale` belongs to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    axis: int = 0


@dataclasses.dataclass(eq=False, kw_only=True)
class Operator:
    """One operator: its name in the schema, its version, its options object or None.

    The options of a custom operator are bytes, even if empty; an input left out is None.
    """

    name: str
    version: int
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    options: Any = None


@dataclasses.dataclass(eq=False)
class Graph:
    """Operators in execution order, with the tensors that enter and leave.

    `origins` has the file's tensor for the id of each Keras tensor that exists in the file.
    `notes` says of a layer, by its name, what the target could not do for it.
    """

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    operators: list[Operator] = dataclasses.field(default_factory=list)
    origins: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor once, in order of first use."""
        used = [*self.inputs]
        for operator in self.operators:
            used += [t for t in operator.inputs if t is not None] + operator.outputs
        return list(dict.fromkeys([*used, *self.outputs]))


def activation_dtype(grid: Grid) -> str:
    """The container of an activation tensor: int8, or int16 for a 16-bit grid."""
    return "int16" if grid.qmax > 127 else "int8"


def on_grid(name: str, shape: tuple[int, ...], grid: Grid | None, data=None) -> Tensor:
    """A tensor that lives on a per-tensor grid, or a float32 one for grid None."""
    if grid is None:
        return Tensor(name=name, shape=shape, dtype="float32", data=data)
    return Tensor(
        name=name,
        shape=shape,
        dtype=activation_dtype(grid),
        data=data,
        scale=np.asarray(grid.scale, np.float32).reshape(1),
        zero_point=np.asarray(grid.zero_point, np.int64).reshape(1),
    )


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two frozen per-tensor grids give every real the same code."""
    return (
        np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point, other.zero_point)
        and (one.qmin, one.qmax) == (other.qmin, other.qmax)
    )
