"""Puts operators into a graph: constants, conversions between grids, clamps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qat.export.graph import (
    ExportError,
    Graph,
    Operator,
    Tensor,
    activation_dtype,
    on_grid,
    same_grid,
)
from qat.export.target import LITERT, Target
from qat.grid import Grid

# The finest step on which GREATER_EQUAL is used; it is exact from 1/256 on.
_FINEST_COMPARED = 2.0**-7


@dataclasses.dataclass(eq=False, frozen=True)
class Stored:
    """A Keras tensor that exists in the file.

    Attributes:
        tensor: the file's tensor. grid: its frozen grid, None in float32.
        gain: Keras value = gain · file value; a Rescaling leaves it to the kernels that read it.
    """

    tensor: Tensor
    grid: Grid | None
    gain: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


class Builder:
    """A graph under construction; tensor names are made unique.

    Args:
        weight_storage: "size" or "speed", see `kernel_container`.
        target: the kernels that will run the file.
    """

    def __init__(self, *, weight_storage: str = "size", target: Target = LITERT):
        self.weight_storage, self.target = weight_storage, target
        self.graph = Graph()
        self._names: set[str] = set()
        self._floats: dict[int, Stored] = {}

    def name(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def constant(self, name: str, data: np.ndarray, dtype: str, **quantization) -> Tensor:
        return Tensor(
            name=self.name(name), shape=np.shape(data), dtype=dtype, data=data, **quantization
        )

    def scalar(self, name: str, grid: Grid, code: float) -> Tensor:
        """A constant of no dimensions on a grid."""
        return on_grid(self.name(name), (), grid, np.asarray(code))

    def unpacked(self, kernel: Tensor, dtype: str, scale: np.ndarray) -> Tensor:
        """A constant on finer scales in a wider type, unpacked whenever the file runs."""
        real = Tensor(name=self.name(f"{kernel.name}/float"), shape=kernel.shape, dtype="float32")
        self.operator("DEQUANTIZE", 7, [kernel], real, schema.DequantizeOptionsT())
        name = self.name(f"{kernel.name}/{dtype}")
        wider = dataclasses.replace(kernel, name=name, dtype=dtype, data=None, scale=scale)
        return self.operator("QUANTIZE", 3, [real], wider, schema.QuantizeOptionsT())

    def row_numbers(self, x: Tensor, first: int, name: str) -> Tensor:
        """`x + first` as int32, which GATHER takes; x holds float32 or int8 whole numbers."""
        options = schema.CastOptionsT()
        options.inDataType = getattr(schema.TensorType, x.dtype.upper())
        options.outDataType = schema.TensorType.INT32
        code = Tensor(name=self.name(f"{name}/code"), shape=x.shape, dtype="int32")
        self.operator("CAST", 1, [x], code, options)
        if not first:
            return code
        offset = self.constant(f"{name}/first", np.asarray(first), "int32")
        index = Tensor(name=self.name(f"{name}/index"), shape=x.shape, dtype="int32")
        return self.operator("ADD", 1, [code, offset], index, schema.AddOptionsT())

    def activation(self, name: str, shape: tuple[int, ...], grid: Grid | None) -> Tensor:
        return on_grid(self.name(name), tuple(shape), grid)

    def operator(
        self, name: str, version: int, inputs: list[Tensor | None], output: Tensor, options=None
    ) -> Tensor:
        self.graph.operators.append(
            Operator(name=name, version=version, inputs=inputs, outputs=[output], options=options)
        )
        return output

    def reshape(self, value: Stored, shape: tuple[int, ...], name: str) -> Stored:
        """The same codes under another shape; the batch dimension stays free."""
        if tuple(shape) == value.shape:
            return value
        target = np.asarray([-1, *shape[1:]], np.int32)
        output = self.activation(name, shape, value.grid)
        options = schema.ReshapeOptionsT()
        options.newShape = target.tolist()
        constant = self.constant(f"{name}/shape", target, "int32")
        self.operator("RESHAPE", 1, [value.tensor, constant], output, options)
        return dataclasses.replace(value, tensor=output)

    def moved(
        self,
        x: Stored,
        name: str,
        shape: tuple[int, ...],
        operator: str,
        *,
        options: Any,
        version: int = 2,
        constants: dict[str, Any] | None = None,
    ) -> Stored:
        """An operator that moves codes: its output lies on its input's grid.

        Args:
            version: of its 8-bit form; float32 is 1, but for RESIZE_…, which have one.
            constants: by name, the int32 tensors that it reads after x.
        """
        read = [
            self.constant(f"{name}/{key}", np.asarray(value, np.int32), "int32")
            for key, value in (constants or {}).items()
        ]
        output = self.activation(name, shape, x.grid)
        version = version if x.grid is not None or operator.startswith("RESIZE") else 1
        self.operator(operator, version, [x.tensor, *read], output, options)
        return dataclasses.replace(x, tensor=output)

    def to_grid(self, value: Stored, grid: Grid, name: str) -> Stored:
        """The value on another grid, with the clamp that the grid asks for.

        8-bit codes are requantized by adding a zero: LiteRT's QUANTIZE rounds twice (reference) or
        with a short multiplier (XNNPACK), its ADD gets all 256 codes right.
        """
        if value.grid is not None and same_grid(value.grid, grid):
            return value
        require_no_gain(value, name)
        output = self.activation(name, value.shape, grid)
        if value.grid is not None and value.tensor.dtype == output.dtype == "int8":
            zero = self.scalar(f"{name}/zero", value.grid, value.grid.zero_point)
            self.operator("ADD", 2, [value.tensor, zero], output, schema.AddOptionsT())
        else:
            version = 1 if value.grid is None else 2
            self.operator("QUANTIZE", version, [value.tensor], output, schema.QuantizeOptionsT())
        return self.clamped(Stored(output, grid), name, relu=_never_negative(value.grid))

    def back_on_grid(self, value: Stored, grid: Grid, name: str) -> Stored:
        """What a kernel wrote counted from the lowest code (`qat.ties.from_lowest`), as it is.

        An ADD of `-(zero_point - qmin) · scale`, which moves no code off the grid.
        """
        zero = dataclasses.replace(grid, zero_point=np.float32(127))
        offset = self.scalar(f"{name}/offset", zero, 127 + grid.qmin - grid.zero_point)
        output = self.activation(name, value.shape, grid)
        self.operator("ADD", 2, [value.tensor, offset], output, schema.AddOptionsT())
        return Stored(output, grid)

    def to_float(self, value: Stored, name: str) -> Stored:
        """The value in float32, dequantized once however often it is read."""
        if value.grid is None:
            return value
        key = id(value.tensor)
        if key not in self._floats:
            output = self.activation(f"{name}/float", value.shape, None)
            self.operator("DEQUANTIZE", 2, [value.tensor], output, schema.DequantizeOptionsT())
            self._floats[key] = Stored(output, None)
        return dataclasses.replace(self._floats[key], gain=value.gain)

    def clamped(self, value: Stored, name: str, *, relu: bool = False) -> Stored:
        """Clamps codes below qmin where neither the container nor a ReLU at zero does it.

        relu: no real value below 0 can arrive.
        """
        grid = value.grid
        if grid is None or activation_dtype(grid) == "int16" or grid.qmin <= -128:
            return value
        if relu and int(grid.zero_point) == grid.qmin:
            return value
        lowest = self.scalar(f"{name}/lowest", grid, grid.qmin)
        output = self.activation(f"{name}/clamped", value.shape, grid)
        options = schema.MaximumMinimumOptionsT()
        self.operator("MAXIMUM", 2, [value.tensor, lowest], output, options)
        return Stored(output, grid)

    def capped(self, value: Stored, bound: float | None, name: str) -> Stored:
        """`min(value, bound)`, by an operator only where the grid reaches beyond the bound."""
        if bound is None:
            return value
        if value.grid is None:
            limit = self.constant(f"{name}/bound", np.float32(bound), "float32")
        else:
            grid = value.grid
            code = np.rint(np.float32(bound) / np.float32(grid.scale)) + grid.zero_point
            if code >= grid.qmax:
                return value
            limit = self.scalar(f"{name}/bound", grid, code)
        output = self.activation(f"{name}/clamped", value.shape, value.grid)
        options = schema.MaximumMinimumOptionsT()
        version = 1 if value.grid is None else 2
        self.operator("MINIMUM", version, [value.tensor, limit], output, options)
        return Stored(output, value.grid)

    def sign(self, value: Stored, grid: Grid, name: str, thresholds: np.ndarray) -> Stored:
        """±1 of an integer tensor: GREATER_EQUAL a code, then SELECT_V2.

        Args:
            thresholds: per channel or one for all, the lowest code that becomes +1; above qmax
                where none does: there both choices of the SELECT_V2 are -1.
        """
        value = self._comparable(value, name)
        shape = [1] * (len(value.shape) - 1) + [thresholds.size] if thresholds.size > 1 else []
        codes = thresholds.reshape(shape)
        never = codes > value.grid.qmax
        limit = on_grid(
            self.name(f"{name}/threshold"),
            tuple(shape),
            value.grid,
            np.minimum(codes, value.grid.qmax),
        )
        is_positive = Tensor(name=self.name(f"{name}/positive"), shape=value.shape, dtype="bool")
        self.operator(
            "GREATER_EQUAL", 2, [value.tensor, limit], is_positive, schema.GreaterEqualOptionsT()
        )
        chosen = np.where(never, grid.qmin, grid.qmax) if never.any() else np.asarray(grid.qmax)
        plus = on_grid(self.name(f"{name}/plus"), chosen.shape, grid, chosen)
        minus = self.scalar(f"{name}/minus", grid, grid.qmin)
        output = self.activation(name, value.shape, grid)
        self.operator("SELECT_V2", 1, [is_positive, plus, minus], output, schema.SelectV2OptionsT())
        return Stored(output, grid)

    def packed_convolution(self, linear: Any, name: str, grid: Grid) -> Stored | None:
        """The convolution in a bit-packed operator of the target's own, if it has one."""
        return None

    def _comparable(self, value: Stored, name: str) -> Stored:
        """The same codes in steps of 1/128 to 1, between which GREATER_EQUAL tells all codes apart.

        It compares `round(256 · real)`: below 1/256 neighbours become equal. At steps of 1 it
        aborts the process, above it shifts by a negative number. A MUL by a power of two changes
        the step and no code.
        """
        step = np.float32(value.grid.scale)
        if _FINEST_COMPARED <= step < 1.0:
            return value
        mantissa, exponent = np.frexp(step)
        factor = self.constant(
            f"{name}/factor",
            np.asarray(1),
            "int8",
            scale=np.exp2([-np.float64(exponent)]).astype(np.float32),
            zero_point=np.zeros(1, np.int64),
        )
        grid = dataclasses.replace(value.grid, scale=np.float32(mantissa))
        output = self.activation(f"{name}/rescaled", value.shape, grid)
        self.operator("MUL", 2, [value.tensor, factor], output, schema.MulOptionsT())
        return Stored(output, grid)


def _never_negative(grid: Grid | None) -> bool:
    return grid is not None and int(grid.zero_point) == grid.qmin


def require_no_gain(value: Stored, name: str) -> None:
    """A scale left over from a Rescaling can only go into a kernel."""
    if value.gain != 1.0:
        raise ExportError(
            f"{name!r} reads a rescaled tensor that only a convolution or dense layer can absorb; "
            "put the Rescaling in front of those alone"
        )
