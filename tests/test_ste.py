"""Straight-through estimators against float64 NumPy: hard forwards, and derivatives of proxies."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import ste

DTYPES = [tf.float32, tf.bfloat16, tf.float16]
MODES = ["eager", "graph", "xla"]
# Half an ulp of a number, relative to it: the error of rounding once to the dtype.
HALF_ULP = {tf.float64: 2**-53, tf.float32: 2**-24, tf.bfloat16: 2**-8, tf.float16: 2**-11}
F16_SUBNORMAL = 2**-24  # the grid of float16 below 6e-5, where an ulp is no longer relative

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
by_mode = pytest.mark.parametrize("mode", MODES)


def evaluate(function, x, dtype, mode="eager", upstream=None):
    """y and dx, as float64 arrays, of a function of a tensor of this dtype in this mode."""

    def forward_and_backward(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x, output_gradients=upstream)

    if mode != "eager":
        forward_and_backward = tf.function(
            forward_and_backward, jit_compile=mode == "xla", autograph=False
        )
    x = tf.cast(tf.constant(x, tf.float64), dtype)
    upstream = tf.ones_like(x) if upstream is None else tf.cast(upstream, dtype)
    y, dx = forward_and_backward(x, upstream)
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (dtype, dtype, x.shape, x.shape)
    return float64(y), float64(dx)


def float64(tensor):
    return tensor.numpy().astype(np.float64)


def rounded(values, dtype):
    """The float64 numbers that these become in a dtype."""
    return np.asarray(values).astype(dtype.as_numpy_dtype).astype(np.float64)


# ---------------------------------------------------------------------------------------------
# The proxies of sign, from the papers: functions, where qat.ste holds derivatives.


def logistic(z):
    return 1.0 / (1.0 + np.exp(-z))


PROXIES = {
    "identity": lambda x: x,
    "clipped": lambda x: np.clip(x, -1.0, 1.0),
    "bireal": lambda x: (
        np.where(np.abs(x) < 1, np.where(x < 0, 2 * x + x**2, 2 * x - x**2), 1.0)
        * np.where(np.abs(x) < 1, 1.0, np.sign(x))
    ),
    "swish": lambda x, beta=5.0: 2 * logistic(beta * x) * (1 + beta * x * logistic(-beta * x)) - 1,
    "sigmoid": lambda x, steepness=10.0: 2 * logistic(steepness * x) - 1,
    "tanh": lambda x, steepness=5.0: np.tanh(steepness * x),
    "relaxed": lambda x, temperature=0.1: 2 * logistic(x / temperature) - 1,
}
KINKS = {"clipped": [-1.0, 1.0], "bireal": [-1.0, 0.0, 1.0]}
CASES = [(name, {}) for name in PROXIES] + [
    ("swish", {"beta": 2.0}),
    ("sigmoid", {"steepness": 1.5}),
    ("tanh", {"steepness": 20.0}),
    ("relaxed", {"temperature": 0.7}),
]
by_case = pytest.mark.parametrize("surrogate, options", CASES, ids=str)
by_surrogate = pytest.mark.parametrize("surrogate", PROXIES)


def peak_slope(surrogate, options):
    """The proxy's largest slope, at zero: what its errors are to be compared with."""
    h = 1e-7
    return float(PROXIES[surrogate](np.float64(h), **options) / h)


def derivative(function, x, h):
    return (function(x + h) - function(x - h)) / (2 * h)


def test_the_registry_holds_the_documented_surrogates():
    assert list(ste.SURROGATES) == list(PROXIES)


@by_mode
@by_dtype
@by_case
@pytest.mark.parametrize("kind", ["sign", "step"])
def test_forward_is_hard_and_backward_is_the_derivative_of_the_proxy(
    kind, surrogate, options, dtype, mode
):
    rng = np.random.default_rng(0)
    threshold = rounded(0.3, dtype) if kind == "step" else 0.0
    peak = peak_slope(surrogate, options)
    h = 1e-5 / peak
    x = rounded(np.concatenate([rng.uniform(-3, 3, 200), np.linspace(-0.5, 0.9, 57)]), dtype)
    for kink in KINKS.get(surrogate, []):
        x = x[np.abs(x - threshold - kink) > 2 * h]
    upstream = rounded(rng.normal(size=x.shape), dtype)

    if kind == "sign":
        sign = functools.partial(ste.sign_ste, surrogate=surrogate, **options)
        y, dx = evaluate(sign, x, dtype, mode, upstream)
        below, gain = -1.0, 1.0
    else:
        step = functools.partial(ste.step_ste, threshold=0.3, surrogate=surrogate, **options)
        y, dx = evaluate(step, x, dtype, mode, upstream)
        below, gain = 0.0, 1.0 if surrogate == "identity" else 0.5

    np.testing.assert_array_equal(y, np.where(x >= threshold, 1.0, below))
    slope = derivative(lambda u: PROXIES[surrogate](u, **options), x - threshold, h)
    expected = upstream * gain * slope
    # float32: exp is good to 2 ulp and its argument z = kx to half of one, which e^-z turns into
    # |z|·e^-z <= 0.4; four more operations. 16 half-ulps of the peak cover the sum; the swish
    # adds its second factor, |2 - z·tanh(z/2)|·e^-|z| <= 2. Central differences err by h²/6·f'''
    # and 2^-52/h, both below 1e-10·peak. Then one rounding to the dtype.
    bound = np.abs(upstream) * (32 * 2**-24 + 1e-9) * peak + np.abs(expected) * HALF_ULP[dtype]
    bound += F16_SUBNORMAL if dtype == tf.float16 else 0.0
    assert np.all(np.abs(dx - expected) <= bound)


@by_surrogate
@pytest.mark.parametrize("kind", ["sign", "step"])
def test_float64_is_computed_in_float64(kind, surrogate):
    x = np.array([-1.7, -0.4, -0.03, 0.2, 0.61, 2.5])
    function = ste.sign_ste if kind == "sign" else ste.step_ste
    _, dx = evaluate(lambda x: function(x, surrogate=surrogate), x, tf.float64)
    gain = 0.5 if kind == "step" and surrogate != "identity" else 1.0
    slope = gain * derivative(PROXIES[surrogate], x, 1e-6)
    # Central differences: 2^-52/1e-6 = 2e-10, and h²/6·f''' <= 1e-12/6·2·5³ = 4e-11.
    np.testing.assert_allclose(dx, slope, rtol=0, atol=1e-9)


def extremes(dtype):
    """Inputs at the edges, and the sign that TensorFlow gives them: its float32 and bfloat16
    arithmetic reads subnormals as zero, that of float16 does not."""
    largest = float(dtype.max)
    subnormal = 6e-8 if dtype == tf.float16 else 1e-39
    sign_below_zero = -1.0 if dtype == tf.float16 else 1.0
    table = [
        (1e4, 1.0),
        (-1e4, -1.0),
        (largest, 1.0),
        (-largest, -1.0),
        (np.inf, 1.0),
        (-np.inf, -1.0),
        (0.0, 1.0),
        (-0.0, 1.0),
        (subnormal, 1.0),
        (-subnormal, sign_below_zero),
        (-7e-5, -1.0),
        (np.nan, np.nan),
    ]
    x, sign = np.array(table).T
    return x, sign


@by_mode
@by_dtype
def test_forward_at_the_extremes_is_the_same_for_every_surrogate(dtype, mode):
    x, sign = extremes(dtype)

    def all_forwards(x):
        signs = [ste.sign_ste(x, surrogate=name) for name in ste.SURROGATES]
        steps = [ste.step_ste(x, surrogate=name) for name in ste.SURROGATES]
        return tf.stack(signs), tf.stack(steps)

    if mode != "eager":
        all_forwards = tf.function(all_forwards, jit_compile=mode == "xla", autograph=False)
    signs, steps = all_forwards(tf.cast(tf.constant(x, tf.float64), dtype))
    np.testing.assert_array_equal(float64(signs), np.tile(sign, (len(PROXIES), 1)))
    np.testing.assert_array_equal(float64(steps), np.tile((sign + 1) / 2, (len(PROXIES), 1)))


@pytest.mark.parametrize("mode", ["eager", "xla"])
@by_dtype
@by_surrogate
def test_gradient_at_the_extremes_is_finite_and_saturated(surrogate, dtype, mode):
    x, _ = extremes(dtype)
    x = x[~np.isnan(x)]
    _, dx = evaluate(lambda x: ste.sign_ste(x, surrogate=surrogate), x, dtype, mode)
    far = 1.0 if surrogate == "identity" else 0.0
    near = {"swish": 5.0, "sigmoid": 5.0, "tanh": 5.0, "relaxed": 5.0, "bireal": 2.0}
    is_far = np.abs(x) > 1
    np.testing.assert_array_equal(dx[is_far], far)
    # The slopes change by no more than 2·abs(x) = 1.4e-4 between zero and the largest of the rest.
    np.testing.assert_allclose(dx[~is_far], near.get(surrogate, 1.0), rtol=HALF_ULP[dtype] + 7e-5)


@by_surrogate
@pytest.mark.parametrize("option", [1.1e-30, 1e-8, 1e8, 9e29])
def test_extreme_options_give_finite_slopes(surrogate, option):
    names = list(inspect.signature(ste.SURROGATES[surrogate]).parameters)[1:]
    options = dict.fromkeys(names, option)
    x = [0.0, 1e-37, -1e-20, 1.0, -1e4, 3.4e38]
    _, dx = evaluate(lambda x: ste.sign_ste(x, surrogate=surrogate, **options), x, tf.float32)
    assert np.all(np.isfinite(dx))


@by_mode
def test_tails_keep_their_relative_accuracy(mode):
    x = np.array([2.0, 4.0, 6.0, -6.0])
    _, dx = evaluate(lambda x: ste.sign_ste(x, surrogate="tanh"), x, tf.float32, mode)
    z = 2 * 5.0 * np.abs(x)
    # 1 - tanh² would be 0 here. The rounding of z, by z/2 ulp, is the relative error of e^-z.
    np.testing.assert_allclose(dx, 4 * 5.0 * np.exp(-z), rtol=(60 + 16) * 2**-24)


@by_mode
@by_dtype
@pytest.mark.parametrize(
    "surrogate, at_kinks", [("clipped", [1.0, 1.0, 1.0]), ("bireal", [0.0, 2.0, 0.0])]
)
def test_kinks_follow_the_documented_convention(surrogate, at_kinks, dtype, mode):
    _, dx = evaluate(lambda x: ste.sign_ste(x, surrogate=surrogate), [-1.0, 0.0, 1.0], dtype, mode)
    np.testing.assert_array_equal(dx, at_kinks)
    ulp = 2 * HALF_ULP[dtype]
    _, beyond = evaluate(
        lambda x: ste.sign_ste(x, surrogate=surrogate), [-1 - ulp, 1 + ulp], dtype, mode
    )
    np.testing.assert_array_equal(beyond, [0.0, 0.0])


def test_step_compares_in_the_dtype_of_x():
    """In bfloat16, 0.3 is 0.30078: an x of 0.3 reaches a threshold of 0.3."""
    y, _ = evaluate(lambda x: ste.step_ste(x, threshold=0.3), [0.299, 0.3, 0.3008], tf.bfloat16)
    np.testing.assert_array_equal(y, [0.0, 1.0, 1.0])


# ---------------------------------------------------------------------------------------------
# Rounding.


def soft_staircase(x, alpha):
    """Equations 4 to 6 of the DSQ paper, for a unit step."""
    k = np.log(2 / alpha - 1)
    middle = np.floor(x) + 0.5
    return middle + 0.5 * np.tanh(k * (x - middle)) / np.tanh(0.5 * k)


@by_mode
@by_dtype
def test_round_forward_is_half_to_even_for_both_surrogates(dtype, mode):
    x = np.array([-2.5, -1.5, -0.5, -0.0, 0.25, 0.5, 0.75, 1.5, 2.5, 1e4, np.inf, -np.inf, np.nan])
    for surrogate in ste.ROUND_SURROGATES:
        y, _ = evaluate(lambda x, s=surrogate: ste.round_ste(x, surrogate=s), x, dtype, mode)
        np.testing.assert_array_equal(y, np.round(rounded(x, dtype)))


@by_mode
@by_dtype
def test_round_identity_passes_the_gradient_on_bit_for_bit(dtype, mode):
    upstream = rounded([1e-3, -7.0, np.pi, 0.0, 3e4], dtype)
    _, dx = evaluate(ste.round_ste, [-1e4, -0.5, 0.0, 1.5, np.inf], dtype, mode, upstream)
    np.testing.assert_array_equal(dx, upstream)


@by_mode
@by_dtype
@pytest.mark.parametrize("alpha", [None, 0.05, 0.45])
def test_dsq_gradient_is_the_derivative_of_the_soft_staircase(alpha, dtype, mode):
    rng = np.random.default_rng(1)
    x = rounded(np.concatenate([rng.uniform(-4, 4, 300), np.arange(-3, 3.5, 0.5)]), dtype)
    upstream = rounded(rng.normal(size=x.shape), dtype)
    _, dx = evaluate(
        lambda x: ste.round_ste(x, surrogate="dsq", alpha=alpha), x, dtype, mode, upstream
    )
    alpha = 0.4 if alpha is None else alpha
    h = 1e-6
    expected = upstream * derivative(lambda x: soft_staircase(x, alpha), x, h)
    k = np.log(2 / alpha - 1)
    peak = k / (1 - alpha) / 2
    # As for the proxies of sign; central differences at the integers, where the second derivative
    # jumps by twice 2k·peak, add h/2 times k·peak.
    float32_and_differences = 32 * 2**-24 + 1e-9 + 2 * h * k
    bound = np.abs(upstream) * float32_and_differences * peak + np.abs(expected) * HALF_ULP[dtype]
    bound += F16_SUBNORMAL if dtype == tf.float16 else 0.0
    assert np.all(np.abs(dx - expected) <= bound)


def test_dsq_slope_peaks_at_half_integers_and_averages_one():
    x = np.arange(-2048, 2048) / 1024
    _, dx = evaluate(lambda x: ste.round_ste(x, surrogate="dsq"), x, tf.float32)
    k, a = np.log(4.0), 1 / 0.6
    at_halves, at_integers = dx[512::1024], dx[::1024]
    np.testing.assert_allclose(at_halves, a * k / 2, rtol=1e-6)
    np.testing.assert_allclose(at_integers, a * k / 2 * (1 - 0.6**2), rtol=1e-6)
    assert (dx.max(), dx.min()) == (at_halves[0], at_integers[0])
    # The staircase climbs 1 in a step. Trapezoids err by (1/1024)²/12·2k²·peak = 4e-7, float32 by
    # 32·2^-24 at most.
    assert abs(dx.mean() - 1.0) < 4e-7 + 32 * 2**-24


@by_dtype
def test_dsq_gradient_is_finite_for_every_finite_x(dtype):
    x = np.array([1e4, -1e4, float(dtype.max), -float(dtype.max), -1e-7, 1e-39, 0.0])
    for alpha in (1.1e-30, 0.4, 0.499):
        _, dx = evaluate(lambda x, a=alpha: ste.round_ste(x, surrogate="dsq", alpha=a), x, dtype)
        assert np.all(np.isfinite(dx)) and np.all(dx >= 0)


# ---------------------------------------------------------------------------------------------
# Three estimators often copied from a widely read answer, which gets them wrong, and ours.


def published_binary(x, threshold=0.5):
    return tf.sigmoid(x * 100)


def published_levels(x, num_levels=2):
    low, span = tf.reduce_min(x), tf.reduce_max(x) - tf.reduce_min(x)
    soft = tf.math.softmax((x - low) / span * (num_levels - 1))
    return tf.math.round(soft) * span / (num_levels - 1) + low


def published_relaxed(x, temperature=0.1):
    return tf.nn.relu(x) / temperature


@by_mode
@by_dtype
def test_binary_activation_honours_threshold_and_steepness(dtype, mode):
    x = rounded([1.2, -0.8, 0.1], dtype)
    assert published_binary(tf.constant(0.1)) > 0.99  # below its threshold, and on

    y, dx = evaluate(ste.binary_activation, x, dtype, mode)
    np.testing.assert_array_equal(y, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(
        evaluate(lambda x: ste.binary_activation(x, threshold=0.05), x, dtype, mode)[0],
        [1.0, 0.0, 1.0],
    )
    _, gentle = evaluate(lambda x: ste.binary_activation(x, steepness=2.0), x, dtype, mode)
    for steepness, actual in ((10.0, dx), (2.0, gentle)):
        slope = derivative(lambda x, k=steepness: logistic(k * (x - 0.5)), x, 1e-6)
        # float32 as above, relative to the peak steepness/4; float64 differences 2^-52/1e-6.
        atol = steepness * 32 * 2**-24 + 1e-9 + (F16_SUBNORMAL if dtype == tf.float16 else 0)
        np.testing.assert_allclose(actual, slope, rtol=HALF_ULP[dtype], atol=atol)


@by_mode
@by_dtype
def test_relaxed_step_is_a_step_whose_slope_follows_the_temperature(dtype, mode):
    x = rounded([-1.0, 0.0, 1.0, 2.0], dtype)
    np.testing.assert_array_equal(published_relaxed(tf.constant(x), 0.5), [0, 0, 2, 4])  # no step

    for temperature in (0.5, 2.0):
        y, dx = evaluate(
            lambda x, t=temperature: ste.relaxed_step(x, temperature=t), x, dtype, mode
        )
        np.testing.assert_array_equal(y, [0.0, 1.0, 1.0, 1.0])
        slope = derivative(lambda x, t=temperature: logistic(x / t), x, 1e-6)
        np.testing.assert_allclose(dx, slope, rtol=HALF_ULP[dtype], atol=32 * 2**-24 + 1e-9)


@by_mode
@by_dtype
def test_levels_of_the_published_example(dtype, mode):
    x = rounded([1.2, -0.8, 0.1, 2.5, -1.5], dtype)
    levels = np.linspace(-1.5, 2.5, 4)
    wrong = published_levels(tf.constant(x), 4).numpy()
    assert set(wrong) == {-1.5, -1.5 + 4 / 3}  # softmax shares 1 out: no x can be a high level

    y, dx = evaluate(lambda x: ste.quantize_to_levels(x, num_levels=4), x, dtype, mode)
    np.testing.assert_array_equal(y, rounded(levels[[2, 1, 1, 3, 0]], dtype))
    np.testing.assert_array_equal(dx, np.ones(5))


@by_mode
@by_dtype
@pytest.mark.parametrize("num_levels", [2, 5])
def test_constant_tensor_is_returned_with_its_gradient(num_levels, dtype, mode):
    x = rounded([0.3, 0.3, 0.3], dtype)
    assert np.all(np.isnan(published_levels(tf.constant(x), num_levels)))

    def quantize(x):
        return ste.quantize_to_levels(x, num_levels=num_levels)

    y, dx = evaluate(quantize, x, dtype, mode, upstream=[1.0, -2.0, 0.5])
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(dx, [1.0, -2.0, 0.5])


@by_mode
@by_dtype
def test_outliers_saturate_without_gradient(dtype, mode):
    x = rounded([-0.1, 0.2, 0.4, 0.75, 1.0, 1e4, np.inf, -np.inf, np.nan], dtype)

    def quantize(x):
        return ste.quantize_to_levels(x, num_levels=3, minimum=0.0, maximum=1.0)

    y, dx = evaluate(quantize, x, dtype, mode)
    np.testing.assert_array_equal(y, [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, np.nan])
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 1, 0, 0, 0, 0])


@by_mode
@by_dtype
def test_percentile_measures_the_range_without_its_outliers(dtype, mode):
    x = rounded(np.concatenate([np.linspace(-1, 1, 99), [1e4, -1e4]]), dtype)
    x = np.random.default_rng(2).permutation(x)

    def quantize(x):
        return ste.quantize_to_levels(x, num_levels=5, percentile=94.6)

    y, dx = evaluate(quantize, x, dtype, mode)
    low, high = np.sort(x)[[5, 95]]  # of 101 numbers: ranks 5.4 and 94.6
    np.testing.assert_array_equal(np.unique(y), rounded(np.linspace(low, high, 5), dtype))
    np.testing.assert_array_equal(dx, (x >= low) & (x <= high))


@by_mode
def test_halves_between_two_levels_go_up(mode):
    # The range is 7 steps, the inputs are k + 1/2 steps: exact numbers, but steps·(1/step) is not,
    # which is how a compiled graph divides by a constant.
    steps = np.arange(1.0, 60.0, 4.0)
    k = np.arange(7) + 0.5

    def quantize(x):
        rows = [
            ste.quantize_to_levels(row, num_levels=8, minimum=0.0, maximum=7 * step)
            for row, step in zip(tf.unstack(x), steps, strict=True)
        ]
        return tf.stack(rows)

    y, _ = evaluate(quantize, steps[:, None] * k, tf.float32, mode)
    np.testing.assert_array_equal(y, steps[:, None] * np.ceil(k))


@by_mode
def test_the_last_number_below_a_half_goes_down(mode):
    steps = np.arange(1.0, 60.0, 4.0)
    x = np.nextafter(0.75 * 2 * steps, 0.0)  # between the levels step and 2·step

    def quantize(x):
        values = [
            ste.quantize_to_levels(value, num_levels=3, minimum=0.0, maximum=2 * step)
            for value, step in zip(tf.unstack(x), steps, strict=True)
        ]
        return tf.stack(values)

    y, _ = evaluate(quantize, x, tf.float64, mode)
    np.testing.assert_array_equal(y, steps)


@by_mode
@by_dtype
def test_two_levels_about_zero_are_the_sign(dtype, mode):
    x = rounded([-1e4, -1.0, -1e-4, -0.0, 0.0, 1e-4, 0.7, 1e4], dtype)
    two_levels = functools.partial(ste.quantize_to_levels, minimum=-1.0, maximum=1.0)
    for mine, sign in zip(
        evaluate(two_levels, x, dtype, mode), evaluate(ste.sign_ste, x, dtype), strict=True
    ):
        np.testing.assert_array_equal(mine, sign)


@by_mode
@pytest.mark.parametrize(
    "ends, levels",
    [
        ({"minimum": 0.0}, [0.0, 0.0, 2.0]),
        ({"maximum": 0.0}, [-2.0, 0.0, 0.0]),
        ({"minimum": 5.0}, [5.0, 5.0, 5.0]),  # beyond every x: all saturate
        ({"maximum": -5.0}, [-5.0, -5.0, -5.0]),
    ],
)
def test_one_end_may_be_given(ends, levels, mode):
    quantize = functools.partial(ste.quantize_to_levels, **ends)
    y, dx = evaluate(quantize, [-2.0, -0.1, 2.0], tf.float32, mode)
    np.testing.assert_array_equal(y, levels)
    inside = [float(ends.get("minimum", -9) <= x <= ends.get("maximum", 9)) for x in (-2, -0.1, 2)]
    np.testing.assert_array_equal(dx, inside)


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=100)
@given(x=st.lists(finite, min_size=1, max_size=8), num_levels=st.integers(2, 257))
def test_levels_are_the_nearest_and_stay_where_they_are(x, num_levels):
    x = np.array(x)
    y, dx = evaluate(lambda x: ste.quantize_to_levels(x, num_levels=num_levels), x, tf.float32)
    levels = np.linspace(x.min(), x.max(), num_levels)
    scale = np.abs(x).max()
    # One rounding to float32, where subnormals become zero, and a few to float64.
    rounding = HALF_ULP[tf.float32] * np.abs(y) + 8 * 2**-53 * scale + 2**-126
    assert np.all(np.abs(y[:, None] - levels).min(axis=1) <= rounding)
    assert np.all(np.abs(y - x) <= np.abs(x[:, None] - levels).min(axis=1) + 2 * rounding)
    assert (y.min(), y.max()) == (x.min(), x.max())
    np.testing.assert_array_equal(dx, np.ones(len(x)))
    again, _ = evaluate(lambda x: ste.quantize_to_levels(x, num_levels=num_levels), y, tf.float32)
    np.testing.assert_array_equal(again, y)


# ---------------------------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: ste.sign_ste(x, surrogate="htanh"), "'htanh'.*identity, clipped.*relaxed"),
        (lambda x: ste.step_ste(x, surrogate="dsq"), "'dsq'.*identity, clipped.*relaxed"),
        (lambda x: ste.round_ste(x, surrogate="clipped"), "'clipped'.*identity, dsq"),
        (lambda x: ste.sign_ste(x, steepness=2.0), "'clipped' takes no option, not steepness"),
        (lambda x: ste.sign_ste(x, surrogate="tanh", beta=2.0), r"takes \['steepness'\], not beta"),
        (lambda x: ste.round_ste(x, alpha=0.4), "'identity' takes no option, not alpha"),
        (lambda x: ste.sign_ste(x, surrogate="sigmoid", steepness=0.0), "steepness.*got 0.0"),
        (lambda x: ste.sign_ste(x, surrogate="swish", beta=-5.0), "beta.*got -5.0"),
        (lambda x: ste.relaxed_step(x, temperature=0), "temperature.*got 0"),
        (lambda x: ste.relaxed_step(x, temperature=np.nan), "temperature.*got nan"),
        (lambda x: ste.relaxed_step(x, temperature="low"), "temperature.*got 'low'"),
        (lambda x: ste.binary_activation(x, steepness=np.inf), "steepness.*got inf"),
        (lambda x: ste.binary_activation(x, threshold=np.nan), "threshold.*float32, got nan"),
        (lambda x: ste.step_ste(tf.cast(x, tf.float16), threshold=1e5), "threshold.*float16"),
        (lambda x: ste.step_ste(x, threshold=tf.constant(1.0)), "threshold must be a finite"),
        (lambda x: ste.round_ste(x, surrogate="dsq", alpha=0.0), r"alpha.*0.5\), got 0.0"),
        (lambda x: ste.round_ste(x, surrogate="dsq", alpha=0.5), r"alpha.*0.5\), got 0.5"),
        (lambda x: ste.quantize_to_levels(x, num_levels=1), "num_levels.*at least 2, got 1"),
        (lambda x: ste.quantize_to_levels(x, num_levels=2.5), "num_levels.*got 2.5"),
        (lambda x: ste.quantize_to_levels(x, minimum=1, maximum=1), "below maximum, got 1 and 1"),
        (lambda x: ste.quantize_to_levels(x, minimum=-np.inf), "minimum.*finite.*got -inf"),
        (lambda x: ste.quantize_to_levels(x, maximum=np.nan), "maximum.*finite.*got nan"),
        (lambda x: ste.quantize_to_levels(x, percentile=50), r"\(50, 100\], got 50"),
        (lambda x: ste.quantize_to_levels(x, percentile=100.1), r"\(50, 100\], got 100.1"),
        (
            lambda x: ste.quantize_to_levels(x, percentile=99, minimum=0, maximum=1),
            "leave out minimum, maximum or both",
        ),
    ],
)
def test_errors_name_what_was_got_and_what_is_legal(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tf.constant([0.5, 1.5]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        ste.round_ste,
        ste.sign_ste,
        ste.step_ste,
        ste.binary_activation,
        ste.relaxed_step,
        ste.quantize_to_levels,
    ],
)
@pytest.mark.parametrize("x", [[1, 2], [True, False], [1j]], ids=["int", "bool", "complex"])
def test_other_than_float_tensors_are_refused(function, x):
    with pytest.raises(ValueError, match="takes a float tensor, got (int32|bool|complex128)"):
        function(x)


# ---------------------------------------------------------------------------------------------
# In use.

FUNCTIONS = [
    ste.round_ste,
    ste.sign_ste,
    ste.step_ste,
    ste.binary_activation,
    ste.relaxed_step,
    functools.partial(ste.quantize_to_levels, num_levels=3),
]
by_function = pytest.mark.parametrize(
    "function", FUNCTIONS, ids=lambda function: getattr(function, "func", function).__name__
)


@by_function
def test_shapes_may_be_unknown_or_empty(function):
    x = np.random.default_rng(3).normal(size=(2, 3, 4)).astype(np.float32)
    unknown = tf.function(function, input_signature=[tf.TensorSpec(None)], autograph=False)
    np.testing.assert_array_equal(unknown(x), function(x))
    assert unknown(tf.zeros([0, 3])).shape == [0, 3]
    assert tf.function(function, autograph=False).get_concrete_function(x).output_shapes == x.shape


@by_function
def test_variables_and_persistent_tapes(function):
    w = tf.Variable([-0.7, 0.2, 0.9])
    with tf.GradientTape(persistent=True) as tape:
        y = function(w)
        once, twice = tf.reduce_sum(y), tf.reduce_sum(2.0 * y)
    np.testing.assert_array_equal(2.0 * tape.gradient(once, w), tape.gradient(twice, w))
    assert np.all(tape.gradient(once, w) >= 0) and np.any(tape.gradient(once, w) > 0)


def test_sparse_upstream_gradients():
    w = tf.Variable([[0.2, -0.4], [0.5, 3.0], [-0.1, 0.1]])
    with tf.GradientTape() as tape:
        y = tf.gather(ste.sign_ste(w, surrogate="bireal"), [1, 1])
    np.testing.assert_array_equal(tape.gradient(y, w), [[0, 0], [2, 0], [0, 0]])


@by_mode
def test_the_chain_rule_goes_on_through_the_estimator(mode):
    # L = (sign(2x) - 3)²: dL/dx = 2·(±1 - 3)·1[abs(2x) <= 1]·2, exact in binary.
    def loss(x):
        return tf.square(ste.sign_ste(2.0 * x) - 3.0)

    _, dx = evaluate(loss, [-0.75, -0.25, 0.25, 0.75], tf.float32, mode)
    np.testing.assert_array_equal(dx, [0.0, -16.0, -8.0, 0.0])


@by_surrogate
def test_a_single_binary_weight_learns_its_sign(surrogate):
    """y = sign(w)·x is to become y = x: only the surrogate's gradient can turn w from -0.2 up."""

    class BinaryScale(tf_keras.layers.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(
                "w", shape=(), initializer=tf_keras.initializers.Constant(-0.2)
            )

        def call(self, x):
            return x * ste.sign_ste(self.w, surrogate=surrogate)

    x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    model = tf_keras.Sequential([BinaryScale()])
    model.compile(tf_keras.optimizers.SGD(0.05), "mse", jit_compile=True)
    history = model.fit(x, x, batch_size=32, epochs=10, verbose=0).history["loss"]
    # The mean of (2x)², and nothing once the sign is right.
    assert history[0] == pytest.approx(4 * np.mean(x**2), rel=1e-6)
    assert history[-1] == 0.0 and model.layers[0].w >= 0


def test_functions_serve_as_keras_activations():
    inputs = tf_keras.Input([3])
    model = tf_keras.Model(inputs, tf_keras.layers.Activation(ste.binary_activation)(inputs))
    np.testing.assert_array_equal(model(np.array([[0.4, 0.5, 0.6]], np.float32)), [[0, 1, 1]])
