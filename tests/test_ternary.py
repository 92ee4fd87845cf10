"""Ternary weights (TWN, TTQ) against float64 NumPy."""

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
from qat.quantizers import TtqQuantizer, TwnQuantizer

every_kind = pytest.mark.parametrize("kind", [TwnQuantizer, TtqQuantizer])


def level_above(w, threshold, shared):
    """Mean of |w| over |w| > threshold."""
    kept = np.abs(w) > threshold
    total = (np.abs(w) * kept).sum(shared, keepdims=True)
    return total / np.maximum(kept.sum(shared, keepdims=True), 1)


def trained(w, axes, positive, negative, unit=0.2):
    """A TTQ quantizer and its variables, with the given gains (numbers or one per channel)."""
    quantizer = TtqQuantizer(channel_axes=axes)
    weights = build(quantizer, w.shape)
    for key, value in (("unit", unit), ("positive_gain", positive), ("negative_gain", negative)):
        weights[key].assign(np.broadcast_to(value, weights[key].shape).astype(F32))
    return quantizer, weights


def test_serialization():
    assert_serializable(
        {
            "twn": lambda: TwnQuantizer(),
            "twntensor": lambda: TwnQuantizer(channel_axes=None),
            "ttq": lambda: TtqQuantizer(),
            "ttqchannels": lambda: TtqQuantizer(channel_axes=(-2, -1)),
            "ttqthreshold": lambda: TtqQuantizer(threshold=0.1),
        }
    )


@every_kind
def test_the_container_holds_every_code(kind):
    quantizer, w = kind(), sample()
    assert quantizer.num_bits == 2 and quantizer.container_bits == 4
    grid = quantizer.grid(build(quantizer, w.shape), tf.constant(w))
    assert (grid.qmin, grid.qmax, float(grid.zero_point)) == (-7, 7, 0)


@every_kind
def test_the_grid_needs_the_tensor(kind):
    with pytest.raises(ValueError, match=r"grid\(weights, inputs\)") as error:
        kind().grid(build(kind(), (3, 4)))
    assert "\n" not in str(error.value)


@every_way
def test_twn_values(axes, mode):
    w = sample()
    called = call(TwnQuantizer(channel_axes=axes), w, mode=mode)
    shared, wide = shared_axes(w.ndim, axes), w.astype(float)
    delta = 0.7 * np.abs(wide).mean(shared, keepdims=True)
    alpha = level_above(wide, delta, shared)
    certain = np.abs(np.abs(wide) / delta - 1) > w.size * HALF_ULP
    expected = 7 * np.sign(wide) * (np.abs(wide) > delta)
    np.testing.assert_array_equal(called.codes[certain], expected[certain])
    np.testing.assert_allclose(7 * called.scale.reshape(alpha.shape), alpha, rtol=2e-4)
    np.testing.assert_array_equal(called.y, called.codes.astype(F32) * called.scale)
    assert set(np.unique(called.codes)) == {-7, 0, 7}


def test_twn_level_is_the_nearest_to_its_weights():
    """No other level for the same codes has a smaller squared error."""
    w = sample((3, 3, 4, 1))
    called = call(TwnQuantizer(), w)
    error = np.square(w - called.y).sum()
    for factor in (0.97, 1.03):
        assert np.square(w - factor * called.y).sum() > error


@every_way
def test_twn_gradient_is_the_identity(axes, mode):
    w = sample()
    g = np.random.default_rng(1).normal(size=w.shape).astype(F32)
    called = call(TwnQuantizer(channel_axes=axes), w, mode=mode, upstream=g)
    np.testing.assert_array_equal(called.dx, g)


@every_kind
def test_a_zero_kernel_is_harmless(kind):
    w = np.zeros((3, 3, 2, 2), F32)
    called = call(kind(), w, build(kind(), w.shape), training=True)
    assert np.isfinite(called.dx).all() and not called.codes.any() and not called.y.any()
    assert called.scale == pytest.approx(SMALLEST_SCALE)


# Gains (positive, negative) and the codes that the levels snap to.
SNAPS = [
    (1.0, 1.0, 7, 7),
    (1.0, 0.5, 7, 4),  # 3.5 goes to the even code
    (0.3, 1.2, 2, 7),
    (2.0, 0.1, 7, 0),
    (1.0, -0.5, 7, 0),
    (-1.0, 0.9, 0, 7),
]


@every_axes
@pytest.mark.parametrize(("positive", "negative", "above", "below"), SNAPS)
def test_ttq_values(axes, positive, negative, above, below):
    w = sample()
    quantizer, weights = trained(w, axes, positive, negative)
    called = call(quantizer, w, weights)
    t = 0.05 * np.abs(w.astype(float)).max(shared_axes(w.ndim, axes), keepdims=True)
    expected = np.where(w > t, above, np.where(w < -t, -below, 0))
    assert set(np.unique(expected)) == {above, -below, 0}
    np.testing.assert_array_equal(called.codes, expected)
    np.testing.assert_allclose(called.scale, 0.2 * max(positive, negative) / 7, rtol=4 * HALF_ULP)
    np.testing.assert_array_equal(called.y, expected.astype(F32) * called.scale)


@every_way
def test_ttq_gradients(axes, mode):
    w = sample()
    shared = shared_axes(w.ndim, axes)
    kept = np.abs(w.max(shared, keepdims=True)).shape if axes else []
    rng = np.random.default_rng(1)
    positive, negative, unit = (rng.uniform(0.5, 1.5, kept) for _ in range(3))
    quantizer, weights = trained(w, axes, positive, negative, unit)
    g = rng.normal(size=w.shape).astype(F32)
    called = call(quantizer, w, weights, mode=mode, upstream=g)
    np.testing.assert_array_equal(called.y, call(quantizer, w, weights).y)
    t = 0.05 * np.abs(w.astype(float)).max(shared, keepdims=True)
    above, below, wide = w > t, w < -t, g.astype(float)
    slope = np.where(above, unit * positive, np.where(below, unit * negative, 1))
    np.testing.assert_allclose(called.dx, slope * g, rtol=4 * HALF_ULP)
    assert set(called.gradients) == {"positive_gain", "negative_gain"}
    # W = unit · gain, so a gain's gradient is that of the level times the unit.
    for key, pull in (("positive_gain", wide * above), ("negative_gain", -wide * below)):
        expected = (unit * pull.sum(shared, keepdims=True)).reshape(called.gradients[key].shape)
        np.testing.assert_allclose(
            called.gradients[key], expected, rtol=1e-5, atol=w.size * HALF_ULP
        )


def test_a_level_below_zero_can_come_back():
    w = sample()
    quantizer, weights = trained(w, None, 1.0, -0.5)
    called = call(quantizer, w, weights)
    assert called.gradients["negative_gain"] != 0
    negative = w < -0.05 * np.abs(w).max()
    assert not called.dx[negative].any() and called.dx[~negative].all()


@every_way
def test_ttq_starts_at_the_level_nearest_to_the_weights(axes, mode):
    w = sample()
    quantizer = TtqQuantizer(channel_axes=axes)
    weights = build(quantizer, w.shape)
    before = call(quantizer, w, weights)
    assert not weights["unit"].numpy().any()  # inference leaves it alone
    after = call(quantizer, w, weights, mode=mode, training=True)
    np.testing.assert_array_equal(after.y, before.y)
    shared, wide = shared_axes(w.ndim, axes), w.astype(float)
    expected = level_above(wide, 0.05 * np.abs(wide).max(shared, keepdims=True), shared)
    unit = weights["unit"].numpy()
    np.testing.assert_allclose(unit.reshape(expected.shape), expected, rtol=w.size * HALF_ULP)
    call(quantizer, 3 * w, weights, training=True)
    np.testing.assert_array_equal(weights["unit"].numpy(), unit)
    np.testing.assert_allclose(quantizer.grid(weights).scale, unit / 7, rtol=4 * HALF_ULP)


def test_a_channel_that_was_zero_starts_later():
    w = sample((3, 3, 4, 2))
    quantizer = TtqQuantizer(channel_axes=(-1,))
    weights = build(quantizer, w.shape)
    call(quantizer, (w * [1, 0]).astype(F32), weights, training=True)
    first = weights["unit"].numpy().ravel()
    assert first[0] > 0 and first[1] == 0
    call(quantizer, (w * [9, 1]).astype(F32), weights, training=True)
    second = weights["unit"].numpy().ravel()
    assert second[0] == first[0] and second[1] > 0


def test_ttq_trains_gains_alone():
    weights = build(TtqQuantizer(), (3, 3, 4, 6))
    assert {key for key, variable in weights.items() if variable.trainable} == {
        "positive_gain",
        "negative_gain",
    }
    np.testing.assert_array_equal([weights[f"{side}_gain"] for side in ("positive", "negative")], 1)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, float("nan")])
def test_illegal_thresholds(threshold):
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\)") as error:
        TtqQuantizer(threshold=threshold)
    assert "\n" not in str(error.value)
