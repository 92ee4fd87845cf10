"""Operators that wait for their output grid while batch norm and ReLU fuse into them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored, require_no_gain
from qat.export.containers import Container, kernel_container
from qat.export.graph import ExportError, Tensor, activation_dtype
from qat.grid import Grid
from qat.ties import early

_FUSED = {
    None: schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


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
        if activation not in _FUSED:
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
        options = self.options(_FUSED[self.activation])
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Pending):
    """A convolution or dense layer whose scale and bias batch normalization still changes.

    Attributes:
        x: the tensor read.
        operator: CONV_2D, DEPTHWISE_CONV_2D, TRANSPOSE_CONV or FULLY_CONNECTED.
        kernel: file layout; integers if `scale` is given, else float values.
        channel_axis: of the kernel's output channels.
        scale: float64 per channel, Keras units; None for a float kernel.
        bits: width of the integers, which are whole multiples of `unit`.
        bias: float64 per channel, Keras units.
        options: given the fused activation's code, the options.
        leading: constants in front of the kernel (TRANSPOSE_CONV's output shape).
        reshape_to: the Keras shape when it is not the operator's (1-D convolutions).
    """

    x: Stored
    operator: str
    kernel: np.ndarray
    channel_axis: int
    scale: np.ndarray | None
    bits: int
    unit: int = 1
    bias: np.ndarray
    options: Callable[[int], Any]
    leading: tuple = ()
    reshape_to: tuple[int, ...] | None = None

    def affine(self, multiplier: np.ndarray, offset: np.ndarray) -> Linear:
        """`multiplier · y + offset` per channel; a negative multiplier flips the integers."""
        multiplier = np.broadcast_to(multiplier, self.bias.shape)
        bias = self.bias * multiplier + offset
        shape = [1] * self.kernel.ndim
        shape[self.channel_axis] = -1
        if self.scale is None:
            kernel = self.kernel * multiplier.reshape(shape)
            return dataclasses.replace(self, kernel=kernel, bias=bias)
        flip = np.where(multiplier < 0, -1, 1).reshape(shape)
        return dataclasses.replace(
            self,
            kernel=self.kernel * flip,
            scale=self.scale * np.abs(multiplier),
            bias=bias,
        )

    def emit(self, builder, name, grid):
        integer = grid is not None and self.scale is not None and self.x.grid is not None
        stored = self._integer(builder, name, grid) if integer else self._float(builder, name, grid)
        if self.reshape_to is not None:
            stored = builder.reshape(stored, self.reshape_to, f"{name}/reshape")
        return stored

    def _integer(self, builder, name, grid):
        stored = builder.packed_convolution(self, name, grid)
        return self._in_bytes(builder, name, grid) if stored is None else stored

    def _in_bytes(self, builder, name, grid):
        x_scale = np.float64(self.x.tensor.scale[0])
        container = kernel_container(
            self.kernel,
            bits=self.bits,
            unit=self.unit,
            operator=self.operator,
            output=grid,
            storage=builder.weight_storage,
            target=builder.target,
        )
        scale = self._kernel_scale(x_scale, grid, container.finer)
        kernel = self._kernel_constant(builder, container, scale)
        step = x_scale * scale.astype(np.float64)
        ahead = early(step, grid) if container.rounds_twice(self.operator) else 0.0
        limit = 2**31 - 1
        codes = np.clip(np.rint(self.bias / step - ahead), -limit, limit)
        bias = builder.constant(
            f"{self.name}/bias",
            codes.astype(np.int64),
            "int64" if activation_dtype(grid) == "int16" else "int32",
            scale=step.astype(np.float32),
            zero_point=np.zeros(len(step), np.int64),
        )
        output = builder.activation(name, self.shape, grid)
        inputs = [*self.leading, kernel, self.x.tensor, bias]
        if self.operator != "TRANSPOSE_CONV":
            inputs = [self.x.tensor, kernel, bias]
        options = self.options(_FUSED[self.activation])
        builder.operator(
            self.operator, self._version(container.read, grid), inputs, output, options
        )
        clamped = builder.clamped(Stored(output, grid), name, relu=self.activation is not None)
        return builder.capped(clamped, self.bound, name)

    def _kernel_constant(self, builder: Builder, container: Container, scale: np.ndarray) -> Tensor:
        """The tensor that the operator reads, on the given scales."""
        stored = builder.constant(
            f"{self.name}/kernel",
            self.kernel // container.divisor,
            container.stored,
            axis=self.channel_axis,
            scale=scale * np.float32(container.factor),
            zero_point=np.zeros(len(scale), np.int64),
        )
        if container.read == container.stored:
            return stored
        return builder.unpacked(stored, container.read, scale)

    def _kernel_scale(self, x_scale: np.float64, grid: Grid, finer: float) -> np.ndarray:
        """float32 scales of the codes that the operator reads; they keep every bias inside int32.

        A batch-norm gamma of (nearly) zero leaves a channel that is its bias alone. Raising the
        scale until the bias fits adds less than the output's rounding, once the bias itself is
        cut to what the output grid can tell apart.
        """
        scale = np.maximum(self.scale * self.x.gain / finer, _SMALLEST_NORMAL)
        span = 512.0 * float(grid.scale) * (256.0 if activation_dtype(grid) == "int16" else 1.0)
        needed = np.minimum(np.abs(self.bias), span) / (x_scale * 2.0**30)
        return np.maximum(scale, needed).astype(np.float32)

    def _version(self, dtype: str, grid: Grid) -> int:
        """The operator versions that the converter writes for the same kinds of tensors.

        INT4 depthwise is written as 6, not 7: the reference kernels register up to 6 and run it.
        """
        kind = "int16" if activation_dtype(grid) == "int16" else dtype
        return {
            "CONV_2D": {"int4": 7, "int8": 3, "int16": 4},
            "DEPTHWISE_CONV_2D": {"int4": 6, "int8": 3, "int16": 5},
            "FULLY_CONNECTED": {"int2": 14, "int4": 12, "int8": 12, "int16": 12},
            "TRANSPOSE_CONV": {"int8": 4, "int16": 4},
        }[self.operator][kind]

    def _float(self, builder, name, grid):
        x = builder.to_float(self.x, self.name)
        kernel = self.kernel.astype(np.float64) * x.gain
        if self.scale is not None:
            shape = [1] * kernel.ndim
            shape[self.channel_axis] = -1
            kernel = kernel * self.scale.reshape(shape)
        weights = builder.constant(f"{self.name}/kernel", kernel.astype(np.float32), "float32")
        bias = builder.constant(f"{self.name}/bias", self.bias.astype(np.float32), "float32")
        output = builder.activation(name if grid is None else f"{name}/float", self.shape, None)
        inputs = [*self.leading, weights, x.tensor, bias]
        if self.operator != "TRANSPOSE_CONV":
            inputs = [x.tensor, weights, bias]
        version = 3 if self.operator == "TRANSPOSE_CONV" else 1
        builder.operator(
            self.operator, version, inputs, output, self.options(_FUSED[self.activation])
        )
        stored = builder.capped(Stored(output, None), self.bound, name)
        return stored if grid is None else builder.to_grid(stored, grid, name)
