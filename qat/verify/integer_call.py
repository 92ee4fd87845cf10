"""One operator with the codes that it reads: what every simulated kernel receives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qat.verify.arithmetic import round_away, to_int32
from qat.verify.reader import ARRAY_TYPES, MAX_ELEMENTS, Operator, SimulationError, Tensor

_FUSED = {v: k for k, v in vars(schema.ActivationFunctionType).items() if isinstance(v, int)}
# Activation → real bounds; None = the type's own.
_BOUNDS = {"NONE": (None, None), "RELU": (0, None), "RELU6": (0, 6), "RELU_N1_TO_1": (-1, 1)}


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor and its codes, in the tensor's array type."""

    tensor: Tensor
    codes: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def scale(self) -> np.float32:
        return self.tensor.scale

    def centered(self) -> np.ndarray:
        """`code - zero_point`, int64."""
        return self.codes.astype(np.int64) - self.tensor.zero_point


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator's inputs (None where left out) and the tensors it writes."""

    operator: Operator
    inputs: tuple[Value | None, ...]
    outputs: tuple[Tensor, ...]

    @property
    def output(self) -> Tensor:
        self.require(len(self.outputs) == 1, f"writes {len(self.outputs)} tensors, needs 1")
        return self.outputs[0]

    def require(self, condition: bool, message: str) -> None:
        """Raises SimulationError with the message unless the condition holds."""
        if not condition:
            raise SimulationError(message)

    def require_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array to be made, if it is a sane one."""
        sane = min(shape, default=1) >= 0 and math.prod(shape) <= MAX_ELEMENTS
        self.require(sane, f"would make a tensor of shape {shape}; try fewer examples at once")
        return shape

    def arguments(self, least: int, most: int | None = None) -> tuple[Value | None, ...]:
        """The inputs, `least` of them present, filled up with None to `most`."""
        most = most or least
        present = self.inputs[:least]
        self.require(
            least <= len(self.inputs) <= most and None not in present,
            f"has {len(self.inputs)} inputs, needs {least}" + ("" if most == least else f"-{most}"),
        )
        return self.inputs + (None,) * (most - len(self.inputs))

    def option(self, name: str):
        """A field of the operator's options."""
        self.require(hasattr(self.operator.options, name), f"lacks the option {name!r}")
        return getattr(self.operator.options, name)

    def require_types(self, *legal: str, values: tuple[Value, ...]) -> str:
        """The one type that the values and all outputs have.

        Raises:
            SimulationError: they differ, or the type is not among the legal ones.
        """
        types = {value.dtype for value in values} | {tensor.dtype for tensor in self.outputs}
        self.require(
            len(types) == 1 and types <= set(legal),
            f"runs on {' and '.join(sorted(types))}; simulated are {', '.join(legal)}",
        )
        return types.pop()

    def constant(self, value: Value, *dtypes: str) -> list[int]:
        """The numbers of a small index tensor (axes, paddings, shapes)."""
        self.require(
            value.dtype in dtypes and value.codes.size <= 64,
            f"takes its {value.tensor.name!r} as {value.dtype}{list(value.shape)}",
        )
        return [int(number) for number in value.codes.reshape(-1)]

    def axis(self, axis: int, rank: int) -> int:
        """A dimension's number, counted from the front."""
        self.require(-rank <= axis < rank, f"names dimension {axis} of a tensor of rank {rank}")
        return axis % rank

    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code of the output's type."""
        limits = np.iinfo(ARRAY_TYPES[self.output.dtype])
        return int(limits.min), int(limits.max)

    def clamp(self, codes: np.ndarray, fused: int | None = None) -> np.ndarray:
        """Codes within the output's type and the fused activation
        (CalculateActivationRangeQuantized in kernel_util.cc)."""
        name = "NONE" if fused is None else _FUSED.get(fused, str(fused))
        self.require(name in _BOUNDS, f"has the fused activation {name}, which is not simulated")
        return self.clamp_real(codes, *_BOUNDS[name])

    def clamp_real(self, codes: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
        """Codes within the output's type and between two reals, None = the type's own bound."""
        lowest, highest = self.code_range()
        if low is not None:
            lowest = max(lowest, self._code(low))
        if high is not None:
            highest = min(highest, self._code(high))
        return np.minimum(np.maximum(codes, lowest), highest)

    def _code(self, real: float) -> int:
        steps = round_away(np.float32(real) / self.output.scale)
        return int(to_int32(np.asarray(steps))) + self.output.zero_point


def same_grid(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors give every real the same code."""
    return one.scale == other.scale and one.zero_point == other.zero_point


def broadcast_shape(call: Call, *values: Value) -> tuple[int, ...]:
    """The common shape of several values, as NumPy and LiteRT both define it."""
    try:
        shape = np.broadcast_shapes(*(value.shape for value in values))
    except ValueError as error:
        shapes = ", ".join(str(value.shape) for value in values)
        raise SimulationError(f"combines the shapes {shapes}, which do not fit") from error
    return call.require_size(shape)
