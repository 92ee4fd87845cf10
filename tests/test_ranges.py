"""Ranges against NumPy reductions, a NumPy loop, and searches by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from qat import ranges
from qat.grid import symmetric_grid
from qat.histogram import Histogram, bin_counts

SHAPES = [(7,), (5, 3), (4, 5, 3), (3, 3, 4, 2), (2, 3, 3, 4, 2)]  # ranks 1 to 5


def sample(shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)


def reduced(x, kept, function):
    """A reduction written as a loop over the channels, sizes kept: {channel index: number}."""
    kept = [axis % x.ndim for axis in kept]
    out = np.empty([n if axis in kept else 1 for axis, n in enumerate(x.shape)], np.float64)
    for index in np.ndindex(*out.shape):
        pick = tuple(i if axis in kept else slice(None) for axis, i in enumerate(index))
        out[index] = function(x[pick].astype(np.float64))
    return out


@pytest.mark.parametrize(
    ("rank", "axes", "expected"),
    [
        (1, None, [0]),
        (1, (-1,), []),
        (2, (-1,), [0]),
        (2, (0,), [1]),
        (4, (-1,), [0, 1, 2]),
        (4, (-2, -1), [0, 1]),
        (4, (2, 3), [0, 1]),
        (4, (-2,), [0, 1, 3]),
        (5, (-1,), [0, 1, 2, 3]),
        (3, (), [0, 1, 2]),
    ],
)
def test_reduction_axes(rank, axes, expected):
    assert ranges.reduction_axes(rank, axes) == expected


@pytest.mark.parametrize(
    ("shape", "axes"),
    [(s, a) for s in SHAPES for a in [(-1,), (0,), (-2, -1)] if len(a) <= len(s)],
)
def test_channel_reductions(shape, axes):
    x = sample(shape)
    low, high = ranges.tensor_range(tf.constant(x), axes)
    np.testing.assert_array_equal(low, reduced(x, axes, np.min))
    np.testing.assert_array_equal(high, reduced(x, axes, np.max))
    bound = ranges.tensor_bound(tf.constant(x), axes)
    np.testing.assert_array_equal(bound, reduced(x, axes, lambda v: np.max(np.abs(v))))
    mean = ranges.mean_magnitude(tf.constant(x), axes)
    # A sum of n float32 terms is off by n half ulps at most.
    count = x.size / np.asarray(mean).size
    expected = reduced(x, axes, lambda v: np.mean(np.abs(v)))
    np.testing.assert_allclose(mean, expected, rtol=(count + 1) * 2**-24)
    for value in (low, high, bound, mean):
        assert value.dtype == tf.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_tensor_reductions_are_scalars(shape):
    x = sample(shape)
    low, high = ranges.tensor_range(tf.constant(x))
    assert (low.shape, high.shape) == ((), ())
    assert (low.numpy(), high.numpy()) == (x.min(), x.max())
    assert ranges.tensor_bound(tf.constant(x)).numpy() == np.abs(x).max()
    mean = float(ranges.mean_magnitude(tf.constant(x)))
    assert mean == pytest.approx(np.abs(x.astype(float)).mean(), rel=(x.size + 1) * 2**-24)


def test_depthwise_kernels_have_a_range_for_each_output_channel():
    low, _ = ranges.tensor_range(tf.constant(sample((3, 3, 4, 2))), (-2, -1))
    assert low.shape == (1, 1, 4, 2)
    assert len(np.unique(low)) == 8


def test_the_bound_of_negative_tensors_is_positive():
    x = tf.constant([[-3.0, -1.0], [-2.0, -5.0]])
    assert float(ranges.tensor_bound(x)) == 5.0
    np.testing.assert_array_equal(ranges.tensor_bound(x, (-1,)), [[3.0, 5.0]])


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16, tf.float64])
def test_results_are_float32(dtype):
    x = tf.cast(tf.constant(sample((5, 3))), dtype)
    expected = x.numpy().astype(np.float32)
    low, high = ranges.tensor_range(x, (-1,))
    np.testing.assert_array_equal(low, expected.min(0, keepdims=True))
    np.testing.assert_array_equal(high, expected.max(0, keepdims=True))
    for function in (ranges.tensor_bound, ranges.mean_magnitude):
        assert function(x).dtype == function(x, (-1,)).dtype == tf.float32


@pytest.mark.parametrize("axes", [None, (-1,)])
@pytest.mark.parametrize("position", [0, 3, 7])
def test_nan_is_seen_wherever_it_is(axes, position):
    x = np.ones((8, 2), np.float32)
    x[position, 1] = np.nan
    x = tf.constant(x)
    results = [*ranges.tensor_range(x, axes), ranges.tensor_bound(x, axes)]
    for value in [*results, ranges.mean_magnitude(x, axes)]:
        assert np.isnan(np.ravel(value)[-1])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moving_average_against_its_sum(decay):
    values = sample((40,))
    average = tf.constant(0.0)
    for value in values:
        average = ranges.moving_average(average, tf.constant(value), decay)
    # Unrolled: the value that is k steps old weighs (1 - decay)·decay^k.
    weights = (1.0 - decay) * decay ** np.arange(len(values))[::-1]
    # Every step rounds five times (decay, its complement, two products, a sum), each by half an
    # ulp of a number no greater than the greatest value.
    tolerance = 5 * len(values) * 2**-24 * float(np.abs(values).max())
    assert float(average) == pytest.approx((weights * values.astype(float)).sum(), abs=tolerance)


# Searches.


def symmetric_error(x, bound, bits, narrow_range=True):
    """Mean squared error of a symmetric grid, from its definition."""
    top = 2 ** (bits - 1) - 1
    step = bound / top
    if step == 0:
        return np.square(x).mean()
    codes = np.clip(np.rint(x / step), -top - (not narrow_range), top)
    return np.square(codes * step - x).mean()


def affine_error(x, low, high, bits):
    """Mean squared error of 2^bits levels from low to high, moved so that 0 is one of them."""
    levels = 2**bits - 1
    step = (high - low) / levels
    if step == 0:
        return np.square(x).mean()
    if low == -high:
        step = high / (levels // 2)
    zero = np.clip(np.rint(-low / step), 0, levels)
    codes = np.clip(np.rint(x / step) + zero, 0, levels)
    return np.square((codes - zero) * step - x).mean()


def heavy_tailed(shape, seed=0):
    return np.random.default_rng(seed).standard_t(4, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "narrow"), [(2, True), (2, False), (3, False), (4, True), (8, True)]
)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 3, 5, 6), (-1,)), ((3, 3, 4, 2), (-2, -1)), ((40, 7), None), ((3, 3, 6, 5), (-2,))],
)
def test_mse_bounds_against_brute_force(shape, axes, bits, narrow):
    x = heavy_tailed(shape)
    found = ranges.mse_bound(tf.constant(x), axes, num_bits=bits, narrow_range=narrow)
    assert found.dtype == tf.float32
    expected_shape = (
        [] if axes is None else [n if i - 4 in axes else 1 for i, n in enumerate(shape)]
    )
    assert found.shape == expected_shape
    for index in np.ndindex(*found.shape):
        kept = zip(index, found.shape, strict=True)
        pick = tuple(i if size > 1 else slice(None) for i, size in kept)
        values, bound = x[pick].astype(float), float(found[index])
        largest = np.abs(values).max()
        tried = [symmetric_error(values, largest * i / 1000, bits, narrow) for i in range(1, 1001)]
        actual = symmetric_error(values, bound, bits, narrow)
        assert actual <= tried[-1] * (1 + 1e-5)
        # Few values on many levels: the error jumps a little between any two bounds.
        assert actual <= min(tried) * (1.25 if bits == 8 and values.size < 50 else 1.02)
        assert 0 < bound <= largest


def test_channels_are_searched_independently():
    """Powers of two change no rounding, so each channel's bound follows its own values exactly."""
    x = heavy_tailed((3, 3, 8, 5))
    found = ranges.mse_bound(tf.constant(x), (-1,), num_bits=3)
    factors = np.float32([1, 2**-12, 2**9, 1, 2**-3])
    scaled = ranges.mse_bound(tf.constant(x * factors), (-1,), num_bits=3)
    np.testing.assert_array_equal(scaled, found * factors)
    assert len(np.unique(found)) == 5
    alone = ranges.mse_bound(tf.constant(x[..., 2:3]), (-1,), num_bits=3)
    np.testing.assert_array_equal(alone[..., 0], found[..., 2])


def test_the_work_does_not_grow_with_the_channels(monkeypatch):
    calls = []
    counted = lambda *args, **kwargs: calls.append(1) or symmetric_grid(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(ranges, "symmetric_grid", counted)
    counts = []
    for channels in (2, 256):
        calls.clear()
        ranges.mse_bound(tf.constant(heavy_tailed((3, 3, 2, channels))), (-1,), num_bits=4)
        counts.append(len(calls))
    assert counts[0] == counts[1] < 10


def test_large_kernels_are_searched_in_pieces(monkeypatch):
    x = tf.constant(heavy_tailed((3, 3, 8, 5)))
    whole = ranges.mse_bound(x, (-1,), num_bits=4)
    monkeypatch.setattr(ranges, "_LARGEST_TENSOR", 1000)
    np.testing.assert_array_equal(ranges.mse_bound(x, (-1,), num_bits=4), whole)
    monkeypatch.setattr(ranges, "_LARGEST_TENSOR", 1)
    np.testing.assert_array_equal(ranges.mse_bound(x, (-1,), num_bits=4), whole)


def test_an_outlier_does_not_widen_a_kernels_grid():
    x = np.random.default_rng(0).normal(0, 1, 100_000).astype(np.float32)
    usual = float(ranges.mse_bound(tf.constant(x), num_bits=4))
    x[0] = 100.0
    assert float(ranges.mse_bound(tf.constant(x), num_bits=4)) < 1.3 * usual
    # It does where it is no rarity: one of a hundred.
    assert float(ranges.mse_bound(tf.constant(x[:100]), num_bits=8)) > 50


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_constant_kernels_are_exact(value):
    x = tf.fill([3, 3, 2, 4], value)
    np.testing.assert_allclose(ranges.mse_bound(x, (-1,), num_bits=4), abs(value), rtol=1e-6)


def histogram_of(x):
    x = np.asarray(x, np.float32)
    return Histogram.of(bin_counts(tf.constant(x)).numpy(), x.min(), x.max())


def activations(kind):
    x = np.random.default_rng(1).standard_t(5, 5_000)
    return {"relu": np.maximum(x, 0), "signed": x, "skewed": np.where(x < 0, x / 4, x)}[kind]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "signed", "skewed"])
def test_mse_ranges_against_brute_force(kind, bits):
    x = activations(kind).astype(np.float32).astype(float)
    low, high = ranges.mse_range(histogram_of(x), num_bits=bits)
    least, greatest = min(x.min(), 0.0), x.max()
    assert least <= low <= 0 < high <= greatest
    actual = affine_error(x, low, high, bits)
    assert actual <= affine_error(x, least, greatest, bits) * 1.001
    shares = np.geomspace(2**-6, 1, 30 if least < 0 else 300)
    lows = least * shares if least < 0 else [0.0]
    best = min(affine_error(x, a, b, bits) for a in lows for b in greatest * shares)
    assert actual <= best * 1.02


def test_a_range_of_16_bits_is_symmetric():
    x = activations("skewed")
    low, high = ranges.mse_range(histogram_of(x), num_bits=16, symmetric=True)
    assert low == -high
    # 65,535 levels: nothing is worth cutting off.
    assert high == pytest.approx(np.abs(x).max(), rel=1e-3)
    low, high = ranges.mse_range(histogram_of(x), num_bits=4, symmetric=True)
    tried = [symmetric_error(x, np.abs(x).max() * i / 1000, 4) for i in range(1, 1001)]
    assert symmetric_error(x, high, 4) <= min(tried) * 1.01


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_constant_activations_are_exact(value):
    low, high = ranges.mse_range(histogram_of(np.full(50, value)), num_bits=4)
    assert (low, high) == pytest.approx((min(value, 0.0), max(value, 0.0)))


def test_negative_activations_have_one_end_too():
    x = -np.abs(activations("signed"))
    low, high = ranges.mse_range(histogram_of(x), num_bits=4)
    mirrored = ranges.mse_range(histogram_of(-x), num_bits=4)
    assert high == 0 and low == pytest.approx(-mirrored[1], rel=0.02)


def test_an_outlier_does_not_widen_a_range():
    x = np.abs(np.random.default_rng(0).normal(0, 1, 200_000))
    _, usual = ranges.mse_range(histogram_of(x), num_bits=4)
    x[0] = 100.0
    _, high = ranges.mse_range(histogram_of(x), num_bits=4)
    assert usual < high < 1.3 * usual
