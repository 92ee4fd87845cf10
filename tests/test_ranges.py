"""Ranges against NumPy reductions and a NumPy loop."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from qat import ranges

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
