"""Random models of one operator with inputs for them, drawn by hypothesis.

Hypothesis draws the sizes, which it can shrink; types, options, scales and codes come from a
generator that it seeds, which is even-handed where hypothesis prefers the first and the smallest.
"""

from __future__ import annotations

import math

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from hypothesis import strategies as st
from single_operator import Operator, Tensor, constant, model

SAME, VALID = schema.Padding.SAME, schema.Padding.VALID
RELU6 = schema.ActivationFunctionType.RELU6
FUSED = (0, schema.ActivationFunctionType.RELU, RELU6, schema.ActivationFunctionType.RELU_N1_TO_1)
ACTIVATIONS = ("int8", "int8", "int16")
Case = tuple[bytes, list[np.ndarray]]


class Draw:
    """Hypothesis's draw function with the vocabulary of this file."""

    def __init__(self, draw):
        self._draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**63)))

    def size(self, least: int, most: int) -> int:
        return self._draw(st.integers(least, most))

    def one(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def scale(self, low: float = 1e-3, high: float = 0.3) -> np.float32:
        """Log-uniform; often a power of two, whose products end in ties."""
        exponent = self.rng.uniform(np.log2(low), np.log2(high))
        whole = np.ceil(exponent)
        return np.float32(2.0 ** (whole if self.flag() and whole <= np.log2(high) else exponent))

    def tensor(self, dtype: str, shape, scale=None, **fields) -> Tensor:
        """An activation on a random grid; int16 is symmetric."""
        tensor = Tensor(dtype=dtype, shape=tuple(shape), scale=scale or self.scale(), **fields)
        if dtype != "int16" and "zero_point" not in fields:
            low, high = tensor.limits()
            tensor.zero_point = self.one(low, high, int(self.rng.integers(low, high + 1)))
        return tensor

    def codes(self, tensor: Tensor) -> np.ndarray:
        """Codes of the whole range, or the two ends of it alone."""
        low, high = tensor.limits()
        container = "int8" if tensor.dtype in ("int2", "int4") else tensor.dtype
        if self.rng.random() < 0.1:
            return self.rng.choice(np.asarray([low, high], container), tensor.shape)
        return self.rng.integers(low, high + 1, tensor.shape).astype(container)

    def fill(self, tensor: Tensor) -> Tensor:
        tensor.data = self.codes(tensor)
        return tensor

    def kernel(self, dtype: str, shape, axis: int, *, symmetric: bool = True) -> Tensor:
        """A constant with one scale, or one per index of the axis."""
        channels = shape[axis] if self.flag() else 1
        scales = np.asarray([self.scale() for _ in range(channels)])
        tensor = Tensor(dtype=dtype, shape=tuple(shape), scale=scales, axis=axis)
        if not symmetric and channels == 1 and dtype == "int8":
            tensor.zero_point = self.one(0, int(self.rng.integers(*tensor.limits())))
        return self.fill(tensor)

    def bias(self, dtype: str, x: Tensor, kernel: Tensor, size: int, spread: float) -> Tensor:
        codes = (self.rng.normal(size=size) * spread).astype(np.int64)
        if self.rng.random() < 0.1:  # a dead channel's bias fills its register
            codes[self.rng.integers(size)] = self.rng.choice([2**31 - 1, -(2**31) + 1])
        return constant(codes, dtype, scale=x.scale * kernel.scale)

    def sum_grid(
        self, x: Tensor, kernel: Tensor, depth: int, *, wild: bool
    ) -> tuple[np.float32, float]:
        """(an output scale, the size of a sum): codes that fill and overflow their type.

        wild: also scales that shift sums to the left, or to nothing.
        """
        spread = math.sqrt(depth) * np.ptp(x.limits()) * np.ptp(kernel.limits()) / 12
        real = spread * float(x.scale) * float(np.mean(kernel.scale))
        steps = self.scale(1e-3, 1e6) if wild and self.one(True, False, False) else None
        steps = steps or self.scale(0.5, 40)
        return np.float32(real / np.ptp(x.limits()) * steps), spread


def case(operator: Operator, *inputs: np.ndarray) -> Case:
    return model(operator), list(inputs)


def _window(d: Draw, size: int, most: int) -> tuple[int, int, int, int]:
    """(window, stride, dilation, padding) that leave something of an image."""
    window, stride, dilation = d.size(1, most), d.size(1, 3), d.size(1, 2)
    fits = (window - 1) * dilation < size
    return window, stride, dilation, d.one(SAME, VALID) if fits else SAME


def _windows(d: Draw, height: int, width: int, most: int = 3):
    rows, columns = _window(d, height, most), _window(d, width, most)
    padding = VALID if rows[3] == columns[3] == VALID else SAME
    options = {"padding": padding, "strideH": rows[1], "strideW": columns[1]}
    dilation = {"dilationHFactor": rows[2], "dilationWFactor": columns[2]}
    return rows[0], columns[0], options, dilation


def image(d: Draw, depth: int, dtype: str) -> Tensor:
    return d.tensor(dtype, (d.size(1, 2), d.size(1, 7), d.size(1, 7), depth))


def _bias_type(d: Draw, x: Tensor, options: dict, narrow: bool) -> str:
    if x.dtype == "int16" and narrow and d.flag():
        options["quantizedBiasType"] = schema.TensorType.INT32
        return "int32"
    return "int64" if x.dtype == "int16" else "int32"


def _linear(d: Draw, name: str, x, kernel, size: int, depth: int, shape, options, *, narrow, front):
    by_float = name == "FULLY_CONNECTED"
    y_scale, spread = d.sum_grid(x, kernel, depth, wild=not by_float)
    options["fusedActivationFunction"] = d.one(*FUSED)
    bias = d.bias(_bias_type(d, x, options, narrow), x, kernel, size, spread)
    if by_float and np.abs(bias.data).max() > 2**30:
        # It converts from float64, which C leaves undefined for values beyond int32.
        y_scale = max(y_scale, np.float32(1.01 * np.max(bias.scale)))
    y = d.tensor(x.dtype, shape, y_scale)
    operator = Operator(name=name, inputs=[*front, bias], outputs=[y], options=options)
    return case(operator, d.codes(x))


@st.composite
def conv_2d(draw) -> Case:
    d = Draw(draw)
    groups, depth, width = d.size(1, 3), d.size(1, 5), d.size(1, 4)
    x = image(d, groups * depth, d.one(*ACTIVATIONS))
    rows, columns, options, dilation = _windows(d, *x.shape[1:3])
    kernel = d.kernel(d.one("int8", "int4"), (groups * width, rows, columns, depth), 0)
    options |= dilation
    return _linear(
        d, "CONV_2D", x, kernel, groups * width, rows * columns * depth, (1, 1, 1, groups * width),
        options, narrow=True, front=[x, kernel],
    )  # fmt: skip


@st.composite
def depthwise_conv_2d(draw) -> Case:
    d = Draw(draw)
    depth, multiplier = d.size(1, 5), d.size(1, 3)
    x = image(d, depth, d.one(*ACTIVATIONS))
    rows, columns, options, dilation = _windows(d, *x.shape[1:3])
    dtype = "int8" if x.dtype == "int16" else d.one("int8", "int4")
    kernel = d.kernel(dtype, (1, rows, columns, depth * multiplier), 3)
    options |= {**dilation, "depthMultiplier": multiplier}
    return _linear(
        d, "DEPTHWISE_CONV_2D", x, kernel, depth * multiplier, rows * columns,
        (1, 1, 1, depth * multiplier), options, narrow=False, front=[x, kernel],
    )  # fmt: skip


@st.composite
def transpose_conv(draw) -> Case:
    d = Draw(draw)
    depth, channels = d.size(1, 4), d.size(1, 4)
    batch, height, width = d.size(1, 2), d.size(1, 9), d.size(1, 9)
    rows, columns, options, _ = _windows(d, height, width, 4)
    sizes = []
    for size, window, stride in (
        (height, rows, options["strideH"]),
        (width, columns, options["strideW"]),
    ):
        room = size if options["padding"] == SAME else size - window + 1
        sizes.append(-(-room // stride))
    if min(sizes) < 1:
        options["padding"], sizes = SAME, [-(-height // options["strideH"]), 1]
        sizes[1] = -(-width // options["strideW"])
    x = d.tensor(d.one(*ACTIVATIONS), (batch, *sizes, depth))
    kernel = d.kernel("int8", (channels, rows, columns, depth), 0)
    shape = (batch, height, width, channels)
    return _linear(
        d, "TRANSPOSE_CONV", x, kernel, channels, depth * 2, shape, options,
        narrow=True, front=[constant(shape), kernel, x],
    )  # fmt: skip


@st.composite
def fully_connected(draw) -> Case:
    d = Draw(draw)
    depth, units = d.size(1, 40), d.size(1, 12)
    keeps = d.flag()
    shape = (d.size(1, 3), d.size(1, 3), depth) if keeps else (d.size(1, 3), depth)
    x = d.tensor(d.one(*ACTIVATIONS), shape)
    types = ("int8", "int4") if x.dtype == "int16" else ("int8", "int4", "int2")
    kernel = d.kernel(d.one(*types), (units, depth), 0, symmetric=x.dtype == "int16")
    options = {"keepNumDims": keeps}
    return _linear(
        d, "FULLY_CONNECTED", x, kernel, units, depth, (*shape[:-1], units), options,
        narrow=True, front=[x, kernel],
    )  # fmt: skip


@st.composite
def batch_matmul(draw) -> Case:
    d = Draw(draw)
    rows, depth, columns = d.size(1, 5), d.size(1, 40), d.size(1, 5)
    batch = tuple(d.size(1, 3) for _ in range(d.size(0, 2)))
    dtype, turned, transposed = d.one(*ACTIVATIONS), d.flag(), d.flag()
    a = d.tensor(dtype, (*batch, *((depth, rows) if turned else (rows, depth))))
    b = d.tensor(dtype, (*batch, *((columns, depth) if transposed else (depth, columns))))
    y_scale, _ = d.sum_grid(a, b, depth, wild=dtype == "int8")
    y = d.tensor(dtype, (*batch, rows, columns), y_scale)
    options = {"adjX": turned, "adjY": transposed}
    operator = Operator(name="BATCH_MATMUL", inputs=[a, b], outputs=[y], options=options)
    return case(operator, d.codes(a), d.codes(b))


def pool(name: str):
    @st.composite
    def drawn(draw) -> Case:
        d = Draw(draw)
        x = image(d, d.size(1, 4), d.one(*ACTIVATIONS))
        rows, columns, options, _ = _windows(d, *x.shape[1:3], 5)
        options |= {"filterHeight": rows, "filterWidth": columns}
        options["fusedActivationFunction"] = d.one(*FUSED)
        y = Tensor(dtype=x.dtype, shape=(1,) * 4, scale=x.scale, zero_point=x.zero_point)
        if rows > x.shape[1] or columns > x.shape[2]:
            options["padding"] = SAME
        operator = Operator(name=name, inputs=[x], outputs=[y], options=options)
        return case(operator, d.codes(x))

    return drawn()


def reduction(name: str):
    @st.composite
    def drawn(draw) -> Case:
        d = Draw(draw)
        x = image(d, d.size(1, 6), d.one(*ACTIVATIONS))
        dimensions = d.one([1, 2], [1], [-1], [2, 1], [0, 1, 2, 3], [1, 3], [-2, 2])
        if name == "MEAN":
            y = d.tensor(x.dtype, (1,), x.scale * d.scale(0.05, 4))
        else:
            y = Tensor(dtype=x.dtype, shape=(1,), scale=x.scale, zero_point=x.zero_point)
        options = {"keepDims": d.flag()}
        inputs = [x, constant(dimensions)]
        operator = Operator(name=name, inputs=inputs, outputs=[y], options=options)
        return case(operator, d.codes(x))

    return drawn()
