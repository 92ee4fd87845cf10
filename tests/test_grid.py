"""Grids against NumPy: sizes, exact zeros, saturation, and TensorFlow's own fake quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qat.grid import SMALLEST_SCALE, Grid, affine_grid, symmetric_grid

ULP = 2.0**-23  # of 1 in float32

# What the int8 and int16 containers hold, written out: (bits, narrow) -> (qmin, qmax).
SYMMETRIC = {
    (2, True): (-1, 1),
    (2, False): (-2, 1),
    (3, True): (-3, 3),
    (3, False): (-4, 3),
    (4, True): (-7, 7),
    (4, False): (-8, 7),
    (5, True): (-15, 15),
    (6, True): (-31, 31),
    (7, True): (-63, 63),
    (8, True): (-127, 127),
    (8, False): (-128, 127),
    (16, True): (-32767, 32767),
    (16, False): (-32768, 32767),
}
AFFINE = {1: 126, 2: 124, 3: 120, 4: 112, 5: 96, 6: 64, 7: 0, 8: -128}  # bits -> qmin; qmax 127

ranges_of_reals = st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)).map(
    sorted
)
by_bits = pytest.mark.parametrize("bits", AFFINE)


def twin(x, scale, zero_point, qmin, qmax):
    """Codes in NumPy float32, one rounding for each operation, as IEEE 754 prescribes."""
    ratio = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    codes = np.rint(ratio) + np.asarray(zero_point, np.float32)
    return np.minimum(np.maximum(codes, np.float32(qmin)), np.float32(qmax))


def codes_between(grid):
    return np.arange(grid.qmin, grid.qmax + 1).astype(np.float32)


@pytest.mark.parametrize(("bits", "narrow"), SYMMETRIC)
def test_symmetric_codes_and_scale(bits, narrow):
    grid = symmetric_grid(tf.constant(2.54), num_bits=bits, narrow_range=narrow).numpy()
    assert (grid.qmin, grid.qmax) == SYMMETRIC[bits, narrow]
    assert grid.scale == np.float32(2.54) / np.float32(grid.qmax)
    assert grid.zero_point == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_symmetric_ends_stand_for_the_bound(bits):
    grid = symmetric_grid(tf.constant([0.1, 1.0, 77.7]), num_bits=bits)
    # The scale and its product with the code are each rounded once.
    np.testing.assert_allclose(grid.highest, [0.1, 1.0, 77.7], rtol=ULP)
    np.testing.assert_array_equal(grid.lowest, -grid.highest.numpy())


@pytest.mark.parametrize("bits", [-1, 0, 1])
def test_symmetric_refuses_one_bit(bits):
    with pytest.raises(ValueError, match="at least 2 bits.*Binary") as error:
        symmetric_grid(tf.constant(1.0), num_bits=bits)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_affine_refuses_widths(bits):
    with pytest.raises(ValueError, match="1 to 8 bits, got") as error:
        affine_grid(tf.constant(-1.0), tf.constant(1.0), num_bits=bits)
    assert "\n" not in str(error.value)


@by_bits
def test_affine_takes_the_topmost_codes(bits):
    grid = affine_grid(tf.constant(-1.0), tf.constant(2.0), num_bits=bits)
    assert (grid.qmin, grid.qmax) == (AFFINE[bits], 127)
    x = np.linspace(-1.5, 2.5, 10007).astype(np.float32)
    np.testing.assert_array_equal(np.unique(grid.quantize(x)), codes_between(grid))


@by_bits
@settings(max_examples=60)
@given(ends=ranges_of_reals)
@example(ends=[0.0, 0.0])
@example(ends=[-3.0, -2.0])
@example(ends=[2.0, 3.0])
@example(ends=[-1e6, 1e-6])
@example(ends=[-1.0, 1.0])
def test_affine_scale_and_zero_point(bits, ends):
    grid = affine_grid(*map(tf.constant, ends), num_bits=bits).numpy()
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    balanced = bits > 1 and low == -high  # zero lies between two codes: one code is given up
    scale = (high - low) / (2**bits - 1 - balanced)
    empty = scale < np.finfo(np.float32).tiny
    scale = 1 / (2**bits - 1) if empty else max(scale, SMALLEST_SCALE)
    # float32 rounds the difference and the quotient: one ulp in all, relative.
    assert abs(float(grid.scale) / scale - 1.0) <= ULP
    # Zero is a code: the one nearest to where the range puts it. -low/scale is at most 255, its
    # float32 quotient is off by 255 half ulps more than the scale's own, and then it is rounded.
    assert grid.zero_point == np.rint(grid.zero_point)
    assert grid.qmin <= grid.zero_point <= grid.qmax
    assert abs(float(grid.zero_point) - (grid.qmin - low / scale)) <= 0.5 + 3 * 255 * ULP
    assert grid.dequantize(tf.constant(grid.zero_point)) == 0.0
    # The grid covers the range but for half a step at each end, where zero was made a code.
    assert float(grid.lowest) - low <= (0.5 + 1e-4) * scale
    assert high - float(grid.highest) <= (0.5 + 1e-4) * scale
    if scale > SMALLEST_SCALE and not empty:  # and nothing beyond half a step, or the one given up
        beyond = [low - float(grid.lowest), float(grid.highest) - high]
        assert max(beyond) <= (0.5 + 0.5 * balanced + 1e-4) * scale


@by_bits
@settings(max_examples=60)
@given(ends=ranges_of_reals)
def test_codes_survive_the_round_trip(bits, ends):
    grid = affine_grid(*map(tf.constant, ends), num_bits=bits)
    codes = codes_between(grid)
    np.testing.assert_array_equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize(("bits", "narrow"), SYMMETRIC)
def test_symmetric_codes_survive_the_round_trip(bits, narrow):
    grid = symmetric_grid(tf.constant(0.3), num_bits=bits, narrow_range=narrow)
    codes = codes_between(grid)
    np.testing.assert_array_equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize(
    ("low", "high", "zero_point"), [(-5.0, -1.0, 127), (1.0, 5.0, -128), (0.0, 0.0, -128)]
)
def test_one_sided_ranges_are_widened_to_zero(low, high, zero_point):
    grid = affine_grid(tf.constant(low), tf.constant(high), num_bits=8).numpy()
    assert grid.zero_point == zero_point
    assert grid.scale == np.float32((max(high, 0) - min(low, 0) or 1) / 255)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("bound", [1.0, 0.3, 77.0])
def test_a_balanced_range_loses_neither_end(bits, bound):
    """Nudging would take half a step from one end; both ends are reals of codes instead."""
    grid = affine_grid(tf.constant(-bound), tf.constant(bound), num_bits=bits)
    reals = grid.dequantize(grid.quantize(tf.constant([-bound, bound])))
    np.testing.assert_allclose(reals, [-bound, bound], rtol=4 * ULP)
    assert len(codes_between(grid)) == 2**bits


@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        (affine_grid(tf.constant(0.0), tf.constant(0.0), num_bits=8), 1 / 255),
        (affine_grid(tf.constant(0.0), tf.constant(1e-30), num_bits=8), SMALLEST_SCALE),
        (symmetric_grid(tf.constant(0.0), num_bits=8), SMALLEST_SCALE),
        (symmetric_grid(tf.constant(0.0), num_bits=16), 1 / 32767),
    ],
)
def test_a_range_of_zero_gives_finite_codes(grid, scale):
    assert np.float32(grid.scale) == np.float32(scale)
    x = tf.constant([0.0, -0.0, 1.0, -1.0, 3e38])
    assert np.isfinite(grid.quantize(x)).all()
    np.testing.assert_array_equal(grid.dequantize(grid.quantize(x))[:2], [0.0, 0.0])


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_quantize_equals_the_twin(dtype):
    grid = Grid(scale=np.float32(0.0371), zero_point=np.float32(-11.0), qmin=-128, qmax=127)
    rng = np.random.default_rng(0)
    halves = (np.arange(-140, 140) + 0.5).astype(np.float32) * np.float32(0.0371)
    x = np.concatenate([halves, rng.normal(0, 3, 5000).astype(np.float32), [1e30, -1e30, 0.0]])
    x = tf.cast(tf.constant(x, tf.float32), dtype)
    wide = x.numpy().astype(np.float32)
    expected = twin(wide, 0.0371, -11, -128, 127)
    codes = grid.quantize(x)
    assert codes.dtype == tf.float32
    np.testing.assert_array_equal(codes, expected)
    reals = grid.dequantize(codes)
    np.testing.assert_array_equal(reals, (expected + np.float32(11)) * np.float32(0.0371))


def test_halves_go_to_even():
    grid = Grid(scale=np.float32(0.5), zero_point=np.float32(0), qmin=-8, qmax=7)
    x = tf.constant([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25])  # -2.5, -1.5, … steps
    np.testing.assert_array_equal(grid.quantize(x), [-2, -2, 0, 0, 2, 2])


def test_channels_have_scales_of_their_own():
    bound = np.array([[1.0, 2.0, 4.0]], np.float32)
    grid = symmetric_grid(tf.constant(bound), num_bits=4)
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_array_equal(grid.quantize(x), twin(x, bound / np.float32(7), 0, -7, 7))


def test_nan_is_a_nan_code_and_infinities_saturate():
    grid = affine_grid(tf.constant(-1.0), tf.constant(1.0), num_bits=4)
    codes = grid.quantize(tf.constant([np.nan, np.inf, -np.inf])).numpy()
    assert np.isnan(codes[0])
    np.testing.assert_array_equal(codes[1:], [127, 112])


@pytest.mark.parametrize("ends", [(np.nan, 1.0), (-1.0, np.nan), (np.nan, np.nan)])
def test_a_nan_range_is_a_nan_grid(ends):
    low, high = tf.constant(ends[0], tf.float32), tf.constant(ends[1], tf.float32)
    grids = [
        affine_grid(low, high, num_bits=8),
        symmetric_grid(tf.maximum(-low, high), num_bits=8),
    ]
    for grid in grids:
        assert np.isnan(grid.dequantize(grid.quantize(tf.constant([0.5])))).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("ends", [(-1.3, 2.7), (0.0, 6.0), (-4.0, 0.0), (-0.01, 100.0)])
def test_affine_reals_are_those_of_tensorflows_kernel(bits, ends):
    low, high = map(tf.constant, ends)
    grid = affine_grid(low, high, num_bits=bits)
    x = np.random.default_rng(0).uniform(1.5 * ends[0] - 1, 1.5 * ends[1] + 1, 4001)
    x = x.astype(np.float32)
    steps = x / np.float32(grid.scale)
    # The kernel multiplies by a reciprocal and rounds halves up: leave the halves out. A quotient
    # of up to 400 is off by 400 half ulps in either.
    x = x[np.abs(steps - np.floor(steps) - 0.5) > 400 * ULP]
    expected = tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)
    reals = grid.dequantize(grid.quantize(x))
    np.testing.assert_allclose(reals, expected, rtol=4 * ULP, atol=0)
    assert len(np.unique(reals)) == 2**bits


def test_numpy_keeps_every_bit():
    grid = affine_grid(tf.constant([[-1.0, -7.0]]), tf.constant([[0.1, 3.0]]), num_bits=5)
    frozen = grid.numpy()
    for name in ("scale", "zero_point"):
        value = getattr(frozen, name)
        assert type(value) is np.ndarray and value.dtype == np.float32
        np.testing.assert_array_equal(value, getattr(grid, name))
    assert (frozen.qmin, frozen.qmax) == (grid.qmin, grid.qmax)
