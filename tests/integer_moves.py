"""Random models of one operator that moves codes or changes their type; see integer_cases.py."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from integer_cases import ACTIVATIONS, Case, Draw, case, image
from single_operator import Operator, Tensor, constant, model


def _on_grid(x: Tensor, shape=(1,)) -> Tensor:
    return Tensor(dtype=x.dtype, shape=shape, scale=x.scale, zero_point=x.zero_point)


@st.composite
def quantize(draw) -> Case:
    d = Draw(draw)
    source, target = d.one(
        ("float32", "int8"), ("float32", "int16"), ("float32", "uint8"), ("int8", "int8"),
        ("int8", "uint8"), ("uint8", "int8"), ("int8", "int16"), ("int16", "int8"),
        ("int16", "int16"), ("uint8", "uint8"), ("uint8", "int16"),
    )  # fmt: skip
    shape = (d.size(1, 2), d.size(1, 200))
    if source == "float32":
        x = Tensor(dtype=source, shape=shape)
        y = d.tensor(target, shape)
        span = float(y.scale) * np.ptp(y.limits())
        values = d.rng.normal(size=shape) * span / 3
        if d.flag():  # ties
            values = (d.rng.integers(-300, 300, shape) + 0.5) * float(y.scale)
        operator = Operator(name="QUANTIZE", inputs=[x], outputs=[y], options={})
        return case(operator, values.astype(np.float32))
    x = d.tensor(source, shape)
    y = d.tensor(target, shape, x.scale * d.one(1, d.scale(0.01, 100)))
    if {source, target} == {"int8", "uint8"} and d.flag():
        y = Tensor(dtype=target, shape=shape, scale=x.scale, zero_point=x.zero_point)
        y.zero_point += 128 if target == "uint8" else -128
    return case(Operator(name="QUANTIZE", inputs=[x], outputs=[y], options={}), d.codes(x))


@st.composite
def dequantize(draw) -> Case:
    d = Draw(draw)
    shape = (d.size(1, 2), d.size(1, 50))
    dtype = d.one("int8", "int16", "uint8", "int4", "int2")
    y = Tensor(dtype="float32", shape=shape)
    if dtype in ("int4", "int2"):
        x, inputs = d.kernel(dtype, shape, d.one(0, 1)), []
    else:
        x = d.tensor(dtype, shape)
        inputs = [d.codes(x)]
    return case(Operator(name="DEQUANTIZE", inputs=[x], outputs=[y], options={}), *inputs)


@st.composite
def unpacked_kernel(draw) -> Case:
    """INT2 or INT4 as storage: DEQUANTIZE to float, QUANTIZE to int8, per channel or not."""
    d = Draw(draw)
    shape = (d.size(1, 4), d.size(1, 20))
    x = d.kernel(d.one("int4", "int2"), shape, 0)
    middle = Tensor(dtype="float32", shape=shape)
    y = Tensor(dtype="int8", shape=shape, scale=x.scale, axis=0)
    first = Operator(name="DEQUANTIZE", inputs=[x], outputs=[middle], options={})
    second = Operator(name="QUANTIZE", inputs=[middle], outputs=[y], options={})
    return model(first, second), []


@st.composite
def concatenation(draw) -> Case:
    d = Draw(draw)
    x = image(d, d.size(1, 4), d.one(*ACTIVATIONS))
    axis = d.size(-4, 3)
    parts = [x]
    for _ in range(d.size(0, 2)):
        shape = list(x.shape)
        shape[axis] = d.size(1, 4)
        parts.append(_on_grid(x, tuple(shape)))
    operator = Operator(
        name="CONCATENATION", inputs=parts, outputs=[_on_grid(x)], options={"axis": axis}
    )
    return case(operator, *(d.codes(part) for part in parts))


@st.composite
def pad(draw) -> Case:
    d = Draw(draw)
    x = image(d, d.size(1, 3), d.one(*ACTIVATIONS))
    amounts = [[d.size(0, 2), d.size(0, 2)] for _ in range(4)]
    if d.flag():
        amounts[0] = amounts[3] = [0, 0]
    inputs = [x, constant(np.asarray(amounts), d.one("int32", "int64"))]
    name = d.one("PAD", "PADV2")
    if name == "PADV2":
        inputs.append(d.fill(_on_grid(x, d.one((), (1,)))))
    return case(Operator(name=name, inputs=inputs, outputs=[_on_grid(x)], options={}), d.codes(x))


@st.composite
def reshaping(draw) -> Case:
    """RESHAPE, SQUEEZE, EXPAND_DIMS."""
    d = Draw(draw)
    x = d.tensor(d.one(*ACTIVATIONS), (1, d.size(1, 4), 1, d.size(1, 4)))
    name = d.one("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
    inputs, options = [x], {}
    if name == "RESHAPE":
        shape = d.one([-1], [1, -1], [x.shape[3], -1, 1], [x.shape[1], x.shape[3]])
        options["newShape"] = shape
        if d.flag():
            inputs.append(constant(shape))
    elif name == "SQUEEZE":
        options["squeezeDims"] = d.one([0], [2], [0, -2], [])
    else:
        inputs.append(constant(d.one(d.size(-5, 4), [d.size(-5, 4)])))
    operator = Operator(name=name, inputs=inputs, outputs=[_on_grid(x)], options=options)
    return case(operator, d.codes(x))


@st.composite
def transpose(draw) -> Case:
    d = Draw(draw)
    x = d.tensor(d.one(*ACTIVATIONS), [d.size(1, 4) for _ in range(d.size(1, 5))])
    order = d.rng.permutation(len(x.shape))
    inputs = [x, constant(order)]
    shape = tuple(x.shape[axis] for axis in order)
    operator = Operator(name="TRANSPOSE", inputs=inputs, outputs=[_on_grid(x, shape)], options={})
    return case(operator, d.codes(x))


@st.composite
def split(draw) -> Case:
    d = Draw(draw)
    parts, axis = d.size(1, 3), d.size(-3, 2)
    shape = [d.size(1, 4) for _ in range(3)]
    shape[axis] *= parts
    x = d.tensor(d.one(*ACTIVATIONS), shape)
    operator = Operator(
        name="SPLIT",
        inputs=[constant(axis), x],
        outputs=[_on_grid(x) for _ in range(parts)],
        options={"numSplits": parts},
    )
    return case(operator, d.codes(x))


@st.composite
def slicing(draw) -> Case:
    d = Draw(draw)
    x = d.tensor(d.one(*ACTIVATIONS), [d.size(1, 6) for _ in range(d.size(1, 4))])
    begins = [d.size(0, n - 1) for n in x.shape]
    sizes = [d.one(-1, d.size(1, n - b)) for n, b in zip(x.shape, begins, strict=True)]
    shape = tuple(n - b if s == -1 else s for n, b, s in zip(x.shape, begins, sizes, strict=True))
    kind = d.one("int32", "int64")
    inputs = [x, constant(begins, kind), constant(sizes, kind)]
    operator = Operator(name="SLICE", inputs=inputs, outputs=[_on_grid(x, shape)], options={})
    return case(operator, d.codes(x))


@st.composite
def strided_slicing(draw) -> Case:
    d = Draw(draw)
    x = d.tensor(d.one(*ACTIVATIONS), [d.size(1, 6) for _ in range(d.size(1, 4))])
    used = d.size(1, len(x.shape))
    begins, ends, strides = [], [], []
    options = {"beginMask": 0, "endMask": 0, "shrinkAxisMask": 0}
    for axis, size in enumerate(x.shape[:used]):
        stride = d.one(1, 1, 2, -1, -2)
        begin = d.size(0, size - 1)
        kind = d.one("plain", "begin", "end", "both", "shrink")
        end = begin + d.size(1, size) if stride > 0 else begin - d.size(1, size)
        if kind in ("begin", "both"):
            options["beginMask"] |= 1 << axis
            end = size if stride > 0 else -size - 1
        if kind in ("end", "both") or (stride < 0 and end < 0 and kind == "plain"):
            options["endMask"] |= 1 << axis
        if kind == "shrink":
            options["shrinkAxisMask"] |= 1 << axis
            begin, stride = begin - d.one(0, size), 1
            end = begin + 1
        elif stride > 0:
            begin -= d.one(0, size)
        begins, ends, strides = [*begins, begin], [*ends, end], [*strides, stride]
    inputs = [x, constant(begins), constant(ends), constant(strides)]
    operator = Operator(name="STRIDED_SLICE", inputs=inputs, outputs=[_on_grid(x)], options=options)
    return case(operator, d.codes(x))


@st.composite
def resizing(draw) -> Case:
    d = Draw(draw)
    x = image(d, d.size(1, 3), d.one(*ACTIVATIONS))
    corners = d.flag()
    name = d.one("RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR")
    centers = d.flag() and not (corners and name == "RESIZE_BILINEAR")
    inputs = [x, constant([d.size(1, 12), d.size(1, 12)])]
    options = {"alignCorners": corners, "halfPixelCenters": centers}
    operator = Operator(name=name, inputs=inputs, outputs=[_on_grid(x)], options=options)
    return case(operator, d.codes(x))
