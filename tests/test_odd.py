"""Odd-coded weights (DoReFa, StatsQ) and DoReFa's activations, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from quantizer_calls import (
    F32,
    HALF_ULP,
    assert_serializable,
    build,
    call,
    every_axes,
    every_way,
    sample,
    shared_axes,
)

from qat.grid import SMALLEST_SCALE
from qat.quantizers import (
    DorefaActivationQuantizer,
    DorefaWeightQuantizer,
    FixedRangeQuantizer,
    StatsqQuantizer,
)

WEIGHTS = {
    "dorefa": lambda **options: DorefaWeightQuantizer(**options),
    "paper": lambda **options: DorefaWeightQuantizer(scaled=False, **options),
    "statsq": lambda **options: StatsqQuantizer(**options),
}
every_weight = pytest.mark.parametrize("kind", WEIGHTS)


def dorefa(w, bits, axes, scaled):
    """(levels before rounding in units of codes, scale), from the paper's equation."""
    shared, n = shared_axes(w.ndim, axes), 2**bits - 1
    t = np.tanh(w)
    bound = np.abs(w).max(shared, keepdims=True) if scaled else np.ones([1] * w.ndim)
    return n * (t / (2 * np.abs(t).max(shared, keepdims=True)) + 0.5), bound / n


def statsq(w, bits, axes):
    """(levels before clipping and rounding, scale), likewise."""
    shared, n = shared_axes(w.ndim, axes), 2 ** (bits - 1)
    s = 2 * np.abs(w).mean(shared, keepdims=True)
    return n * w / s - 0.5, s / (2 * n)


def twin(kind, w, bits, axes):
    """(value that is rounded, codes, scale) in float64."""
    w, n = w.astype(float), 2 ** (bits - 1)
    if kind == "statsq":
        v, scale = statsq(w, bits, axes)
        clipped = np.clip(v + 0.5, -n, n * (1 - 1e-6)) - 0.5  # as the authors clip
        return v, 2 * np.rint(clipped) + 1, scale
    v, scale = dorefa(w, bits, axes, scaled=kind == "dorefa")
    return v, 2 * np.rint(v) - (2**bits - 1), scale


def dorefa_gradient(w, g, axes, scaled):
    """The derivative of the unrounded weights, the maximum of |tanh| included."""
    shared = shared_axes(w.ndim, axes)
    t = np.tanh(w)
    m = np.abs(t).max(shared, keepdims=True)
    c = np.abs(w).max(shared, keepdims=True) if scaled else 1.0
    pull = np.sum(g * t, shared, keepdims=True) / m**2
    return c * (1 - t**2) * (g / m - np.where(np.abs(t) == m, np.sign(t) * pull, 0))


def test_serialization():
    assert_serializable(
        {
            "dorefa": lambda: DorefaWeightQuantizer(),
            "dorefa3": lambda: DorefaWeightQuantizer(num_bits=3, channel_axes=(-1,)),
            "paper": lambda: DorefaWeightQuantizer(scaled=False),
            "statsq": lambda: StatsqQuantizer(),
            "statsq5": lambda: StatsqQuantizer(num_bits=5, channel_axes=None),
            "activation": lambda: DorefaActivationQuantizer(num_bits=3),
            "wider": lambda: DorefaActivationQuantizer(num_bits=3, maximum=4.0),
            "fixed": lambda: FixedRangeQuantizer(num_bits=3, minimum=0.0, maximum=1.0),
        }
    )


@every_weight
@pytest.mark.parametrize("bits", [1, 8, 16, 2.5, "t"])
def test_widths_without_a_container_are_refused(kind, bits):
    with pytest.raises(ValueError, match=rf"2 to 7 bits, got {bits!r}.*int8.*127") as error:
        WEIGHTS[kind](num_bits=bits)
    assert "\n" not in str(error.value)


@every_weight
@pytest.mark.parametrize("bits", range(2, 8))
def test_the_container_holds_every_code(kind, bits):
    quantizer = WEIGHTS[kind](num_bits=bits)
    called = call(quantizer, np.linspace(-3, 3, 2001, dtype=F32)[:, None])
    assert set(np.unique(called.codes)) == set(range(-(2**bits) + 1, 2**bits, 2))
    grid = quantizer.grid({}, tf.constant(sample()))
    assert (grid.qmin, grid.qmax) == (-(2**bits) + 1, 2**bits - 1)
    assert 2 ** (quantizer.container_bits - 2) <= grid.qmax < 2 ** (quantizer.container_bits - 1)


@every_weight
@every_way
@pytest.mark.parametrize("bits", [2, 7])
def test_values(kind, axes, bits, mode):
    w = sample()
    called = call(WEIGHTS[kind](num_bits=bits, channel_axes=axes), w, mode=mode)
    v, codes, scale = twin(kind, w, bits, axes)
    # A float32 sum of up to w.size terms, or a maximum; one division.
    np.testing.assert_allclose(
        called.scale, scale.reshape(called.scale.shape), rtol=(w.size + 2) * HALF_ULP
    )
    # v is computed from the scale's sum by some operations, tanh of a few ulps among them.
    certain = np.abs(v - np.floor(v) - 0.5) > (w.size + 20) * HALF_ULP * 2**bits
    assert certain.mean() > 0.99
    np.testing.assert_array_equal(called.codes[certain], codes[certain])
    np.testing.assert_array_less(np.abs(called.codes - codes), 3)
    np.testing.assert_array_equal(called.y, (called.codes * called.scale).astype(F32))


@every_way
@pytest.mark.parametrize("scaled", [True, False])
def test_dorefa_gradient(axes, scaled, mode):
    w = sample()
    g = np.random.default_rng(1).normal(size=w.shape).astype(F32)
    quantizer = DorefaWeightQuantizer(num_bits=3, channel_axes=axes, scaled=scaled)
    dx = call(quantizer, w, mode=mode, upstream=g).dx
    expected = dorefa_gradient(w.astype(float), g.astype(float), axes, scaled)
    # The sum of g·t has up to w.size terms that nearly cancel.
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=w.size * HALF_ULP)


@every_axes
@pytest.mark.parametrize("scaled", [True, False])
def test_dorefa_gradient_is_the_slope_of_the_unrounded_weights(axes, scaled):
    """The formula above against finite differences in float64; c is held as it was."""
    w = sample((3, 4, 2)).astype(float)
    g = np.random.default_rng(1).normal(size=w.shape)
    shared = shared_axes(w.ndim, axes)
    c = np.abs(w).max(shared, keepdims=True) if scaled else 1.0

    def loss(w):
        t = np.tanh(w)
        return np.sum(g * c * t / np.abs(t).max(shared, keepdims=True))

    slopes = np.zeros_like(w)
    for index in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[index] = 1e-6
        slopes[index] = (loss(w + step) - loss(w - step)) / 2e-6
    np.testing.assert_allclose(slopes, dorefa_gradient(w, g, axes, scaled), rtol=1e-6, atol=1e-7)


@every_way
def test_statsq_gradient_is_the_identity(axes, mode):
    """Where the weights are clipped too: with spread channels some are."""
    w = sample()
    g = np.random.default_rng(1).normal(size=w.shape).astype(F32)
    called = call(StatsqQuantizer(num_bits=3, channel_axes=axes), w, mode=mode, upstream=g)
    np.testing.assert_array_equal(called.dx, g)
    s = 2 * np.abs(w).mean(shared_axes(w.ndim, axes), keepdims=True)
    assert (np.abs(w / s) > 1).any() and np.abs(called.y / s).max() < 1


@every_axes
def test_scaled_dorefa_keeps_the_largest_weight(axes):
    w = sample()
    shared = shared_axes(w.ndim, axes)
    y = call(DorefaWeightQuantizer(num_bits=2, channel_axes=axes), w).y
    np.testing.assert_allclose(np.abs(y).max(shared), np.abs(w).max(shared), rtol=4 * HALF_ULP)
    y = call(DorefaWeightQuantizer(num_bits=2, channel_axes=axes, scaled=False), w).y
    np.testing.assert_allclose(np.abs(y).max(shared), 1.0, rtol=4 * HALF_ULP)


@every_weight
def test_a_zero_kernel_is_harmless(kind):
    called = call(WEIGHTS[kind](), np.zeros((3, 3, 2, 2), F32))
    assert np.isfinite(called.dx).all()
    if kind != "paper":  # whose levels are odd multiples of 1/n, whatever the weights
        assert np.abs(called.y).max() <= 16 * SMALLEST_SCALE


@every_weight
def test_the_grid_needs_the_tensor(kind):
    with pytest.raises(ValueError, match=r"grid\(weights, inputs\)") as error:
        WEIGHTS[kind]().grid({})
    assert "\n" not in str(error.value)


@every_weight
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_narrow_floats_keep_their_dtype(kind, dtype):
    """Computed in float32; only the result is rounded."""
    w = tf.cast(sample(), dtype)
    wide = call(WEIGHTS[kind](), tf.cast(w, tf.float32))
    called = call(WEIGHTS[kind](), w)
    np.testing.assert_array_equal(called.codes, wide.codes)
    np.testing.assert_array_equal(called.y, tf.cast(wide.y, dtype).numpy())


# ---------------------------------------------------------------------------------------------
# Activations.


@pytest.mark.parametrize(("bits", "mode"), [(2, "eager"), (3, "xla"), (5, "graph"), (8, "eager")])
def test_dorefa_activations(bits, mode):
    x = np.concatenate([np.linspace(-0.5, 1.5, 999), [0, 1, -1e-7, 1 + 1e-6]]).astype(F32)
    quantizer = DorefaActivationQuantizer(num_bits=bits)
    weights = build(quantizer, [None])
    g = np.random.default_rng(1).normal(size=x.shape).astype(F32)
    called = call(quantizer, x, weights, mode=mode, upstream=g)
    n = 2**bits - 1
    v = n * np.clip(x.astype(float), 0, 1)
    certain = np.abs(v - np.floor(v) - 0.5) > 1e-4
    np.testing.assert_allclose(called.y[certain], (np.rint(v) / n)[certain], rtol=4 * HALF_ULP)
    assert len(np.unique(called.y)) == n + 1
    inside = (x >= 0) & (x.astype(float) <= 1)
    np.testing.assert_array_equal(called.dx, np.where(inside, g, 0))


def test_dorefa_activations_need_no_data():
    quantizer = DorefaActivationQuantizer(num_bits=4)
    assert not quantizer.set_range({}, 0.0, 3.0)
    assert quantizer.grid({}).scale.numpy() == F32(1 / 15)
    assert quantizer.method == "dorefa"
