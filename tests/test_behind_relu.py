"""A quantizer behind a ReLU leaves the ReLU's gradient out, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from qat.grid import affine_grid
from qat.quantizers import LearnedGrid, MovingAverageQuantizer, fake_quantize
from qat.quantizers.behind_relu import relu_in_front

RELUS = {"relu": tf.nn.relu, "relu6": tf.nn.relu6}
X = np.concatenate(
    [
        np.random.default_rng(3).normal(2.0, 4.0, 500),
        [-1.0, -0.0, 0.0, 1e-3, 3.0, np.nextafter(np.float32(3.0), 4), 5.999, 6.0, 6.5, 50.0],
    ]
).astype(np.float32)
UPSTREAM = np.linspace(-2.0, 3.0, X.size).astype(np.float32)


def gradients(function, scale):
    """(values, dx, dscale, operators of the graph) in a graph."""

    @tf.function
    def run(x, scale):
        with tf.GradientTape() as tape:
            tape.watch([x, scale])
            y = function(x, scale)
        return y, tape.gradient(y, [x, scale], tf.constant(UPSTREAM))

    concrete = run.get_concrete_function(tf.constant(X), tf.constant(scale))
    y, (dx, dscale) = concrete(tf.constant(X), tf.constant(scale))
    types = [op.type for op in concrete.graph.get_operations()]
    return y.numpy(), dx.numpy(), None if dscale is None else dscale.numpy(), types


def grid(scale, lowest=0.0, bits=4):
    made = affine_grid(tf.constant(lowest), tf.constant(3.0), num_bits=bits)
    return type(made)(scale=scale, zero_point=made.zero_point, qmin=made.qmin, qmax=made.qmax)


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("top", [3.0, 6.0, 9.0])
@pytest.mark.parametrize("lowest", [0.0, -1.0])
@pytest.mark.parametrize("learned", [None, LearnedGrid(gradient_scale=0.25)])
def test_gradients_are_those_of_both(relu, top, lowest, learned):
    scale = np.float32(top / 15)

    def together(x, scale):
        return fake_quantize(RELUS[relu](x), grid(scale, lowest), learned=learned)

    def apart(x, scale):  # tf.identity hides the ReLU
        return fake_quantize(tf.identity(RELUS[relu](x)), grid(scale, lowest), learned=learned)

    y, dx, dscale, types = gradients(together, scale)
    y2, dx2, dscale2, types2 = gradients(apart, scale)
    np.testing.assert_array_equal(y, y2)
    np.testing.assert_array_equal(dx, dx2)
    if learned is not None:
        # 510 terms of up to 3 · 15 / 4, summed in float32.
        np.testing.assert_allclose(dscale, dscale2, rtol=1e-4, atol=1e-3)
    of_relu = {"relu": "ReluGrad", "relu6": "Relu6Grad"}[relu]
    bypassed = learned is None or relu == "relu"
    assert types2.count(of_relu) == types.count(of_relu) + bypassed


@pytest.mark.parametrize("relu", RELUS)
def test_gradients_against_numpy(relu):
    scale = np.float32(0.2)
    limit = {"relu": np.inf, "relu6": 6.0}[relu]

    def function(x, scale):
        return fake_quantize(RELUS[relu](x), grid(scale))

    y, dx, *_ = gradients(function, scale)
    z = np.clip(X.astype(np.float64), 0, limit)
    np.testing.assert_allclose(y, np.clip(np.round(z / scale), 0, 15) * scale, rtol=1e-6)
    inside = (X > 0) & (z <= np.float32(15) * scale) & (X < limit)
    np.testing.assert_array_equal(dx, np.where(inside, UPSTREAM, 0))
    assert 0 < inside.sum() < X.size


def test_an_offset_that_learns_needs_the_relu():
    """Its gradient counts what lies outside of the grid, and 0 lies inside."""
    learned = LearnedGrid(keeps_lowest=True, offset=tf.constant(-0.4))

    def function(x, scale):
        return fake_quantize(tf.nn.relu(x), grid(scale, -1.0), learned=learned)

    *_, types = gradients(function, np.float32(0.2))
    assert "ReluGrad" in types


def test_a_running_range_behind_a_relu_starts_at_0():
    class Layer(tf.Module):
        def add_weight(self, name, shape, dtype, initializer, **_):
            return tf.Variable(tf.zeros(shape, dtype), name=name, trainable=False)

    quantizer = MovingAverageQuantizer(num_bits=8)
    weights = quantizer.build([None, 3], "x", Layer())
    x = tf.constant([[1.0, 2.0, 5.0]])
    tf.function(lambda: quantizer(tf.nn.relu(x + 0.0), True, weights))()
    made = quantizer.grid(weights)
    np.testing.assert_allclose([made.lowest, made.highest], [0.0, 5.0], rtol=1e-6)


def test_only_a_relu_in_a_graph_counts():
    assert relu_in_front(tf.nn.relu(tf.constant([1.0]))) is None  # eager
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, [3])
        assert relu_in_front(x) is None
        assert relu_in_front(tf.nn.elu(x)) is None
        found = relu_in_front(tf.nn.relu6(x))
        assert found.inputs is x and found.limit == 6.0
