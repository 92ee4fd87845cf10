"""Operators with a kernel: its integers, its container, and the bias on the accumulator's grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from qat.export.builder import Builder, Stored
from qat.export.containers import Container, kernel_container
from qat.export.graph import ExportError, Tensor, activation_dtype
from qat.export.pending import FUSED, Pending
from qat.grid import Grid
from qat.ties import LARGEST_BIAS, early, from_lowest, largest_bias

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
# XNNPACK refuses a file that requantizes int8 by this or more.
_FACTOR_LIMIT = 256


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
        container = kernel_container(
            self.kernel,
            bits=self.bits,
            unit=self.unit,
            operator=self.operator,
            output=grid,
            storage=builder.weight_storage,
            target=builder.target,
        )
        twice = container.rounds_twice(self.operator, builder.target)
        written = self._written(container, grid) if twice else grid
        real_bias = self.bias + float(grid.zero_point - written.zero_point) * float(grid.scale)
        scale = self._kernel_scale(real_bias, grid, container.finer)
        kernel = self._kernel_constant(builder, container, scale)
        bias = self._bias_constant(builder, real_bias, scale, written, twice=twice)
        inputs = [*self.leading, kernel, self.x.tensor, bias]
        if self.operator != "TRANSPOSE_CONV":
            inputs = [self.x.tensor, kernel, bias]
        version = self._version(container.read, grid)
        if written is not grid:
            output = builder.activation(f"{name}/from_lowest", self.shape, written)
            # Below 8 bits the ReLU is the clamp at the lowest code.
            builder.operator(self.operator, version, inputs, output, self.options(FUSED["relu"]))
            return builder.back_on_grid(Stored(output, written), grid, name)
        output = builder.activation(name, self.shape, grid)
        options = self.options(FUSED[self.activation])
        builder.operator(self.operator, version, inputs, output, options)
        clamped = builder.clamped(Stored(output, grid), name, relu=self.activation is not None)
        return builder.capped(clamped, self.bound, name)

    def _written(self, container: Container, grid: Grid) -> Grid:
        """The grid that an operator that rounds twice itself writes on."""
        if self.activation is not None:
            return grid
        step = np.float64(self.x.tensor.scale[0]) * self.scale * self.x.gain / container.finer
        return from_lowest(step, grid)

    def _bias_constant(
        self,
        builder: Builder,
        bias: np.ndarray,
        scale: np.ndarray,
        written: Grid,
        *,
        twice: bool,
    ) -> Tensor:
        step = np.float64(self.x.tensor.scale[0]) * scale.astype(np.float64)
        wide = activation_dtype(written) == "int16"
        if not wide:
            self._require_close_steps(step, written)
        ahead = early(step, written, rectified=self.activation is not None) if twice else 0.0
        # Beyond it no output but an end of its range is left, see `_kernel_scale`.
        limit = largest_bias(step, float(written.scale), wide=wide)
        return builder.constant(
            f"{self.name}/bias",
            np.clip(np.rint(bias / step - ahead), -limit, limit).astype(np.int64),
            "int64" if wide else "int32",
            scale=step.astype(np.float32),
            zero_point=np.zeros(len(step), np.int64),
        )

    def _require_close_steps(self, step: np.ndarray, written: Grid) -> None:
        """At the limit the last bit of a sum is the output's whole range."""
        factor = float((step / np.float64(written.scale)).max())
        if factor >= _FACTOR_LIMIT:
            raise ExportError(
                f"layer {self.name!r}: the smallest step of its sums is {factor:.3g} steps of its "
                f"output, legal: below {_FACTOR_LIMIT}; training diverged (lower the learning "
                "rate), or weights were changed after calibration (calibrate again)"
            )

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

    def _kernel_scale(self, bias: np.ndarray, grid: Grid, finer: float) -> np.ndarray:
        """float32 scales of the codes that the operator reads; they keep biases in half of int32.

        A batch-norm gamma of (nearly) zero leaves a channel that is its bias alone. Raising the
        scale until the bias fits adds less than the output's rounding, once the bias itself is
        cut to what the output grid can tell apart.
        """
        x_scale = np.float64(self.x.tensor.scale[0])
        scale = np.maximum(self.scale * self.x.gain / finer, _SMALLEST_NORMAL)
        span = 512.0 * float(grid.scale) * (256.0 if activation_dtype(grid) == "int16" else 1.0)
        needed = np.minimum(np.abs(bias), span) / (x_scale * LARGEST_BIAS)
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
            self.operator, version, inputs, output, self.options(FUSED[self.activation])
        )
        stored = builder.capped(Stored(output, None), self.bound, name)
        return stored if grid is None else builder.to_grid(stored, grid, name)
