"""Operators that wait for their output grid while batch norm and ReLU fuse into them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored, require_no_gain
from qat.export.graph import ExportError
from qat.grid import Grid

FUSED = {
    None: schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending(abc.ABC):
    """An operator's result without a grid yet.

    Attributes:
        name: of the Keras layer. shape: of the output, batch 1.
        activation: None, "relu" or "relu6", fused.
        bound: what a ReLU other than these two cuts its output at.
    """

    name: str
    shape: tuple[int, ...]
    activation: str | None = None
    bound: float | None = None

    def with_activation(self, activation: str, bound: float | None = None) -> Pending:
        """The same operator with a ReLU fused in."""
        if self.activation is not None:
            raise ExportError(f"{self.name!r} has two activations with no quantizer between them")
        if activation not in FUSED:
            raise ExportError(
                f"{self.name!r} has activation={activation!r}, which no operator fuses; make it a "
                f"layer of its own, tf_keras.layers.Activation({activation!r})"
            )
        return dataclasses.replace(self, activation=activation, bound=bound)

    def fuses_activation(self) -> bool:
        """Whether a ReLU can still go into the operator."""
        return self.activation is None

    @abc.abstractmethod
    def emit(self, builder: Builder, name: str, grid: Grid | None) -> Stored:
        """Writes the operator; grid None = float32 output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elementwise(Pending):
    """ADD, SUB, MUL, MEAN, RELU, LOGISTIC, …: any operator on activations without a kernel.

    Attributes:
        inputs: tensors read; extra: constants after them.
        operator: name in the schema; version: of its 8-bit form.
        options: given the fused activation's code, the operator's options or None.
        fuses: whether a ReLU can be fused.
    """

    inputs: tuple[Stored, ...]
    operator: str
    options: Callable[[int], Any]
    version: int = 2
    extra: tuple = ()
    fuses: bool = False

    def fuses_activation(self) -> bool:
        return self.fuses and super().fuses_activation()

    def emit(self, builder, name, grid):
        integer = grid is not None and all(value.grid is not None for value in self.inputs)
        inputs = self.inputs
        if not integer:
            inputs = tuple(builder.to_float(value, self.name) for value in inputs)
        for value in inputs:
            require_no_gain(value, self.name)
        output = builder.activation(
            name if integer or grid is None else f"{name}/float",
            self.shape,
            grid if integer else None,
        )
        tensors = [*(value.tensor for value in inputs), *self.extra]
        options = self.options(FUSED[self.activation])
        builder.operator(self.operator, self.version if integer else 1, tensors, output, options)
        if integer:
            relu = self.activation is not None or self.operator in ("RELU", "RELU6")
            clamped = builder.clamped(Stored(output, grid), name, relu=relu)
            return builder.capped(clamped, self.bound, name)
        real = builder.capped(Stored(output, None), self.bound, name)
        return builder.to_grid(real, grid, name) if grid else real


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(Pending):
    """All inputs go onto the output's grid, pending ones with no extra operator."""

    inputs: tuple[Stored | Pending, ...]

    def fuses_activation(self) -> bool:
        return False

    def stored_inputs(self, builder: Builder, grid: Grid | None) -> list[Stored]:
        """The inputs on the grid, or in float32."""
        stored = []
        for value in self.inputs:
            if isinstance(value, Pending):
                stored.append(value.emit(builder, f"{value.name}/output", grid))
            elif grid is None:
                stored.append(builder.to_float(value, self.name))
            else:
                stored.append(builder.to_grid(value, grid, f"{self.name}/input"))
            require_no_gain(stored[-1], self.name)
        return stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concat(Joined):
    """CONCATENATION."""

    axis: int

    def emit(self, builder, name, grid):
        tensors = [value.tensor for value in self.stored_inputs(builder, grid)]
        options = schema.ConcatenationOptionsT()
        options.axis = self.axis
        output = builder.activation(name, self.shape, grid)
        builder.operator("CONCATENATION", 1 if grid is None else 2, tensors, output, options)
        return Stored(output, grid)
