"""Histograms against NumPy on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from qat.histogram import NUM_BINS, Histogram, bin_counts, holds_only_numbers

WIDTH = 1 / 64  # of a bin, as a share of its values, at most


def histogram_of(x) -> Histogram:
    x = np.asarray(x, np.float32)
    return Histogram.of(bin_counts(tf.constant(x)).numpy(), x.min(), x.max())


def sample(kind: str, count: int = 60_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, count)
    if kind == "relu":
        x = np.maximum(x, 0)
    if kind == "outliers":
        x[:3] = [1e4, -300, 1e-30]
    if kind == "negative":
        x = -np.abs(x) - 0.5
    return x.astype(np.float32)


KINDS = ["normal", "relu", "outliers", "negative"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_lies_in_one_narrow_bin(kind):
    x = sample(kind)
    found = histogram_of(x)
    assert found.counts.sum() == len(x)
    assert (found.minimum, found.maximum) == (x.min(), x.max())
    assert (found.lows[1:] >= found.highs[:-1]).all()
    widths = found.highs - found.lows
    assert (widths <= WIDTH * np.minimum(np.abs(found.lows), np.abs(found.highs)) + 1e-12).all()
    for low, high, count in list(zip(found.lows, found.highs, found.counts, strict=True))[::37]:
        # Magnitudes belong to the bin that they begin.
        inside = (x >= low) & (x < high) if low >= 0 else (x > low) & (x <= high)
        if low in (x.min(), 0.0) or high in (x.max(), 0.0):
            inside = (x >= low) & (x <= high)
        assert inside.sum() == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.5, 0.9, 0.9999, 1.0])
def test_quantiles(kind, share):
    x = sample(kind)
    # Between the neighbours of the wanted value, and off by a bin at most.
    shares = np.clip([share - 1 / len(x), share + 1 / len(x)], 0, 1)
    low, high = np.quantile(x.astype(float), shares)
    found = histogram_of(x).quantile(share)
    assert low - WIDTH * abs(low) <= found <= high + WIDTH * abs(high)


def rounded(x, scale, lowest, highest):
    return np.rint(np.clip(x.astype(float), lowest, highest) / scale) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.01, 0.1, 0.7])
def test_mean_squared_error_of_several_grids(kind, scale):
    x = sample(kind)
    ends = [(-300, 300), (-3, 5), (0, 7), (-1, 0), (0, 0)]
    lowest, highest = (scale * np.array(side) for side in zip(*ends, strict=True))
    found = histogram_of(x).mean_squared_error(np.full(len(ends), scale), lowest, highest)
    grids = zip(lowest, highest, strict=True)
    expected = [np.square(x - rounded(x, scale, *grid)).mean() for grid in grids]
    # The values' own spread inside a bin is not even: 1/√(values) of the error at most.
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_the_error_of_evenly_spread_values_is_exact():
    low, high = 1.0, 1.0 + WIDTH
    one = Histogram(lows=np.array([low]), highs=np.array([high]), counts=np.array([7.0]))
    x = low + (np.arange(200_000) + 0.5) / 200_000 * WIDTH
    for grid in [(0.003, 0.0, 3.0), (0.003, 0.0, 1.005), (0.4, 0.0, 0.8), (0.003, -1.2, -0.6)]:
        found = one.mean_squared_error(*(np.array([value]) for value in grid))
        assert found[0] == pytest.approx(np.square(x - rounded(x, *grid)).mean(), rel=1e-6)


def test_many_grids_are_worked_on_in_pieces(monkeypatch):
    found = histogram_of(sample("normal"))
    scales = np.linspace(0.01, 1.0, 50)
    whole = found.mean_squared_error(scales, -3 * scales, 4 * scales)
    monkeypatch.setattr("qat.histogram._LARGEST_ARRAY", 5000)
    pieces = found.mean_squared_error(scales, -3 * scales, 4 * scales)
    np.testing.assert_allclose(whole, pieces, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-40, 3e38, -1e-20])
def test_constants(value):
    found = histogram_of(np.full(9, value))
    assert found.counts.tolist() == [9]
    assert found.minimum == found.maximum
    assert found.maximum == pytest.approx(np.float32(value), abs=1e-37)
    assert found.quantile(0.3) == found.maximum
    size = max(abs(value), 1e-30)
    (error,) = found.mean_squared_error(np.array([size]), np.array([-size]), np.array([size]))
    assert error == pytest.approx(0.0, abs=size**2 * 1e-12)


def test_counts_add_up():
    x, y = sample("normal"), sample("outliers")
    both = bin_counts(tf.concat([x, y], 0)).numpy()
    np.testing.assert_array_equal(both, bin_counts(x).numpy() + bin_counts(y).numpy())
    assert both.shape == (NUM_BINS,)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_seen(value):
    x = np.zeros((4, 5), np.float32)
    assert holds_only_numbers(bin_counts(x).numpy())
    assert holds_only_numbers(bin_counts(x + np.finfo(np.float32).max).numpy())
    x[2, 3] = value
    assert not holds_only_numbers(bin_counts(x).numpy())


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64, tf.int32])
def test_other_types_are_counted_as_float32(dtype):
    x = tf.cast(10 * sample("normal")[:500].reshape(5, 100), dtype)
    expected = bin_counts(tf.cast(x, tf.float32)).numpy()
    np.testing.assert_array_equal(bin_counts(x).numpy(), expected)
    np.testing.assert_array_equal(tf.function(bin_counts)(x).numpy(), expected)
