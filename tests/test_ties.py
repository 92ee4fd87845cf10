"""Biases for kernels that round twice, against the arithmetic of LiteRT's reference kernels."""

from __future__ import annotations

import numpy as np
import pytest

from qat.grid import Grid
from qat.ties import away_from_ties, early, from_lowest
from qat.verify.arithmetic import multiply, quantize_multiplier

GRID = Grid(scale=np.float32(0.05), zero_point=np.float32(-9), qmin=-128, qmax=127)
CHANNELS = 200


def channels(products: int):
    """Sums of ±889 and, per channel, a bias and a multiplier that uses about the whole grid."""
    rng = np.random.default_rng(products)
    sums = 889 * np.arange(-products, products + 1, 2)
    spread = 3 * 889 * np.sqrt(products)
    multiplier = rng.uniform(60, 140, CHANNELS) / min(spread, 889 * products)
    return sums, np.rint(rng.normal(0, spread / 3, CHANNELS)), multiplier


def roundings(bias, multiplier, sums) -> tuple[np.ndarray, np.ndarray]:
    """Output codes [sum, channel]: of the kernel, which rounds twice, and rounded once."""
    total = sums[:, None] + bias
    twice = multiply(total.astype(np.int64), *quantize_multiplier(multiplier)) + GRID.zero_point
    once = np.rint(total * multiplier) + GRID.zero_point
    return np.clip(twice, GRID.qmin, GRID.qmax), np.clip(once, GRID.qmin, GRID.qmax)


@pytest.mark.parametrize("products", [9, 16, 144, 576, 4608])
def test_the_kernels_round_every_sum_as_training_does(products):
    sums, bias, multiplier = channels(products)
    twice, once = roundings(bias, multiplier, sums)
    assert (twice != once).any()
    twice, once = roundings(away_from_ties(bias, multiplier, sums, GRID), multiplier, sums)
    np.testing.assert_array_equal(twice, once)


@pytest.mark.parametrize("products", [9, 144, 4608])
def test_biases_move_little_and_once(products):
    sums, bias, multiplier = channels(products)
    found = away_from_ties(bias, multiplier, sums, GRID)
    assert np.abs((found - bias) * multiplier).max() < 1 / 8
    assert np.median(np.abs(found - bias)) <= 2
    np.testing.assert_array_equal(away_from_ties(found, multiplier, sums, GRID), found)


def test_sums_that_the_grid_clips_do_not_matter():
    """Of y = 0.5 and y = 300.5 the kernel may round only the first."""
    sums, multiplier = np.asarray([0.0, 600.0]), np.asarray([0.5])
    bias = np.asarray([601.0])
    np.testing.assert_array_equal(away_from_ties(bias, multiplier, sums, GRID), bias)


def test_channels_without_a_bias_on_the_grid_stay():
    bias, multiplier = np.asarray([np.inf, np.nan, 7.0]), np.asarray([0.0, np.nan, 1e-3])
    sums = 889.0 * np.arange(-2, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = away_from_ties(bias, multiplier, sums, GRID)
    np.testing.assert_array_equal(found[:2], bias[:2])
    assert np.isfinite(found[2])


GRID_FROM_ZERO = Grid(scale=np.float32(0.05), zero_point=np.float32(-8), qmin=-8, qmax=127)


@pytest.mark.parametrize("coarse", [0.9, 0.5, 0.3, 0.03, 1e-3])
def test_early_makes_up_for_the_second_rounding(coarse):
    """Drawn multipliers make no ties."""
    rng = np.random.default_rng(1)
    multiplier = coarse * rng.uniform(0.5, 1, CHANNELS)
    sums = rng.integers(-500, int(130 / multiplier.min()), (3000, CHANNELS))
    ahead = early(multiplier * 0.05, GRID_FROM_ZERO)
    twice = multiply(sums, *quantize_multiplier(multiplier))
    once, late = np.rint((sums + ahead) * multiplier), np.rint(sums * multiplier)
    positive = once > 0
    np.testing.assert_array_equal(twice[positive], once[positive])
    assert (twice <= 0)[~positive].all()
    assert (twice != late)[positive].any()


def test_early_leaves_grids_with_negative_numbers_alone():
    steps = np.asarray([1e-4, 0.01])
    np.testing.assert_array_equal(early(steps, GRID), 0)
    assert (early(steps, GRID, rectified=True) > 0.5).all()  # a ReLU cuts them off


@pytest.mark.parametrize("coarse", [0.9, 0.3, 0.03, 3e-3])
def test_counted_from_the_lowest_code_every_code_is_reached_as_in_training(coarse):
    """Drawn multipliers make no ties."""
    rng = np.random.default_rng(2)
    multiplier = coarse * rng.uniform(0.5, 1, CHANNELS)
    written = from_lowest(multiplier * 0.05, GRID)
    assert written.zero_point == written.qmin and written.scale == GRID.scale
    moved = float(GRID.zero_point - written.zero_point)
    sums = rng.integers(-int(140 / multiplier.min()), int(140 / multiplier.min()), (4000, CHANNELS))
    ahead = early(multiplier * 0.05, written)
    # The file's bias is a whole number; the model's is `ahead` above it, and `moved` codes below.
    bias = np.rint(moved / multiplier)
    model = (sums + bias + ahead) * multiplier - moved
    once = np.clip(np.rint(model) + GRID.zero_point, -128, 127)
    file = multiply(sums + bias.astype(int), *quantize_multiplier(multiplier))
    file = np.clip(file + written.zero_point, -128, 127)
    np.testing.assert_array_equal(file, once)
    assert len(np.unique(once)) == 256
    unmoved = multiply(sums, *quantize_multiplier(multiplier)) + GRID.zero_point
    assert (np.clip(unmoved, -128, 127) != np.clip(np.rint(sums * multiplier) - 9, -128, 127)).any()


def test_what_is_not_counted_from_the_lowest_code():
    wide = Grid(scale=np.float32(0.05), zero_point=np.float32(0), qmin=-32767, qmax=32767)
    narrow = Grid(scale=np.float32(0.05), zero_point=np.float32(120), qmin=112, qmax=127)
    fine = 0.05 * np.asarray([1e-4, 4e-4])
    assert from_lowest(np.asarray([0.01]), wide) is wide and from_lowest(fine, GRID) is GRID
    assert from_lowest(fine, narrow).zero_point == 112  # in the place of a MAXIMUM


def test_early_is_zero_where_the_kernel_rounds_once():
    steps = 0.05 * np.asarray([0.51, 0.7, 1.5, 40.0, 0.0])
    np.testing.assert_array_equal(early(steps, GRID_FROM_ZERO), 0)
