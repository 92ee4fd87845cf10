"""Random models of one operator that works element by element; see integer_cases.py."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from integer_cases import ACTIVATIONS, FUSED, Case, Draw, case, image
from single_operator import Operator, Tensor


def _broadcast(d: Draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = (d.size(1, 2), d.size(1, 4), d.size(1, 4), d.size(1, 6))
    other = d.one(shape, (), shape[3:], (1, 1, 1, shape[3]), (shape[0], 1, shape[2], 1))
    return d.one((shape, other), (other, shape))


def _powers_of_two(d: Draw, shapes) -> tuple[Tensor, Tensor, float]:
    """(a, b, output scale) that ADD and SUB can shift to each other."""
    coarsest, finer = d.size(-15, -5), -d.size(0, 6)
    steps = d.one((0, 0), (0, finer), (finer, 0))
    a, b = (
        d.tensor("int16", shape, 2.0 ** (coarsest + step))
        for shape, step in zip(shapes, steps, strict=True)
    )
    return a, b, 2.0**coarsest


def binary(name: str):
    """ADD, SUB, MUL."""

    @st.composite
    def drawn(draw) -> Case:
        d = Draw(draw)
        shapes, dtype = _broadcast(d), d.one(*ACTIVATIONS)
        options = {"fusedActivationFunction": d.one(*FUSED)}
        if name != "MUL" and dtype == "int16" and d.flag():
            if name == "ADD":
                shapes = shapes[0], shapes[0]
            a, b, scale = _powers_of_two(d, shapes)
            options["potScaleInt16"] = d.flag()
        else:
            a, b = (d.tensor(dtype, shape) for shape in shapes)
            products = float(b.scale) * 2 ** (7 if dtype == "int8" else 15)
            scale = a.scale * d.scale(0.05, 40) * np.float32(products if name == "MUL" else 1)
            if name != "MUL":
                options["potScaleInt16"] = False
        y = d.tensor(dtype, (1,), scale)
        operator = Operator(name=name, inputs=[a, b], outputs=[y], options=options)
        return case(operator, d.codes(a), d.codes(b))

    return drawn()


def unary(name: str, *, types=ACTIVATIONS, grids: dict | None = None, low=1e-3, high=0.3):
    """RELU, LOGISTIC, …; `grids` are the output grids that a type is bound to."""

    @st.composite
    def drawn(draw) -> Case:
        d = Draw(draw)
        dtype = d.one(*types)
        x = d.tensor(dtype, (d.size(1, 2), d.size(1, 300)), d.scale(low, high))
        options = {}
        if name == "LEAKY_RELU":
            options["alpha"] = float(d.rng.uniform(-1.5, 1.5))
        if name == "SOFTMAX":
            options["beta"] = d.one(1.0, float(d.scale(0.1, 4)))
        if grids and dtype in grids:
            scale, zero_point = grids[dtype]
            y = Tensor(dtype=dtype, shape=x.shape, scale=scale, zero_point=zero_point)
        else:
            y = d.tensor(dtype, x.shape, x.scale * d.scale(0.1, 10))
        if dtype == "int16" and name in ("LOGISTIC", "TANH") and d.flag():
            x.scale = d.one(2.0**-12, 2.0**-11, 2.0**-10)
        return case(Operator(name=name, inputs=[x], outputs=[y], options=options), d.codes(x))

    return drawn()


@st.composite
def prelu(draw) -> Case:
    d = Draw(draw)
    x = image(d, d.size(1, 5), d.one(*ACTIVATIONS))
    shape = d.one(x.shape[3:], (1, 1, x.shape[3]), x.shape[1:], x.shape)
    alpha = d.fill(d.tensor("int8", shape))
    y = d.tensor(x.dtype, x.shape, x.scale * d.scale(0.1, 10))
    operator = Operator(name="PRELU", inputs=[x, alpha], outputs=[y], options={})
    return case(operator, d.codes(x))


def extreme(name: str):
    @st.composite
    def drawn(draw) -> Case:
        d = Draw(draw)
        shapes, dtype = _broadcast(d), d.one(*ACTIVATIONS)
        a, b = (d.tensor(dtype, shape) for shape in shapes)
        y = Tensor(dtype=dtype, shape=(1,), scale=a.scale, zero_point=a.zero_point)
        operator = Operator(name=name, inputs=[a, b], outputs=[y], options={})
        return case(operator, d.codes(a), d.codes(b))

    return drawn()


@st.composite
def greater_equal(draw) -> Case:
    d = Draw(draw)
    shapes, dtype = _broadcast(d), d.one(*ACTIVATIONS)
    a = d.tensor(dtype, shapes[0])
    b = d.tensor(dtype, shapes[1], a.scale, zero_point=a.zero_point)
    if d.flag():
        b = d.tensor(dtype, shapes[1], np.float32(a.scale * d.scale(0.8, 1.2)))
    codes = [d.codes(a), d.codes(b)]
    if d.one(False, False, True):  # above 1 only a comparison with zero is defined
        a.scale = b.scale = d.scale(1.01, 30)
        b.zero_point, codes[1] = a.zero_point, np.full(b.shape, a.zero_point, dtype)
    y = Tensor(dtype="bool", shape=(1,))
    operator = Operator(name="GREATER_EQUAL", inputs=[a, b], outputs=[y], options={})
    return case(operator, *codes)


@st.composite
def select_v2(draw) -> Case:
    d = Draw(draw)
    shapes, dtype = _broadcast(d), d.one(*ACTIVATIONS)
    condition = Tensor(dtype="bool", shape=shapes[0])
    a = d.tensor(dtype, shapes[1])
    b = d.tensor(dtype, d.one((), shapes[0]), a.scale, zero_point=a.zero_point)
    y = Tensor(dtype=dtype, shape=(1,), scale=a.scale, zero_point=a.zero_point)
    operator = Operator(name="SELECT_V2", inputs=[condition, a, b], outputs=[y], options={})
    chosen = d.rng.integers(0, 2, condition.shape).astype(bool)
    return case(operator, chosen, d.codes(a), d.codes(b))
