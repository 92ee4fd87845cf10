"""Fake quantization: values against a NumPy twin, gradients against the equations in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qat.grid import Grid, affine_grid
from qat.quantizers import Backward, LearnedGrid, fake_quantize
from qat.quantizers.rounding import in_float32

F32 = np.float32
by_mode = pytest.mark.parametrize("mode", ["eager", "graph", "xla"])


@dataclasses.dataclass(frozen=True)
class Called:
    y: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray | None
    doffset: np.ndarray | None


def call(x, scale, zero_point, codes, *, upstream=None, mode="eager", **options) -> Called:
    """Forward and all gradients; fields of LearnedGrid among the options make one."""
    x, scale = tf.convert_to_tensor(x), tf.constant(scale, tf.float32)
    upstream = tf.ones_like(x) if upstream is None else tf.cast(upstream, x.dtype)
    own = {key: options.pop(key) for key in list(options) if key in vars(LearnedGrid())}
    offset = tf.constant(own.pop("offset", 0.0))

    def run(x, scale, offset, upstream):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            grid = Grid(scale=scale, zero_point=F32(zero_point), qmin=codes[0], qmax=codes[1])
            how = LearnedGrid(offset=offset, **own) if own else None
            y = fake_quantize(x, grid, learned=how, **options)
        return y, tape.gradient(y, [x, scale, offset], upstream)

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    y, gradients = run(x, scale, offset, upstream)
    assert (y.dtype, y.shape, gradients[0].dtype) == (x.dtype, x.shape, x.dtype)
    return Called(y.numpy(), *(None if g is None else g.numpy() for g in gradients))


def twin(x, scale, zero_point, codes):
    """One float32 rounding for each operation."""
    found = np.rint(x.astype(F32) / F32(scale)) + F32(zero_point)
    return (np.clip(found, F32(codes[0]), F32(codes[1])) - F32(zero_point)) * F32(scale)


def ends(scale, zero_point, codes):
    """The reals of the lowest and the highest code."""
    return [((F32(code) - F32(zero_point)) * F32(scale)).astype(F32) for code in codes]


def slope(rule, strength, upstream, v, levels):
    """dx inside, over the upstream gradient, in float64."""
    if rule == "ewgs":  # 2104.00903, equation 4, on x_n = (x - l) / (u - l)
        return 1 + strength * np.sign(upstream) * (v / levels - np.rint(v) / levels)
    if rule == "dsq":  # 1908.05033: φ' of the stair that v lies on
        k = np.log(2 / strength - 1)
        a = 1 / np.tanh(0.5 * k)  # so that stairs meet: equation 5, s = 1/tanh(k/2)
        return 0.5 * a * k / np.cosh(k * (v - np.floor(v) - 0.5)) ** 2
    return np.ones_like(v)


# (scale, zero point, codes): weights, activations after a ReLU, signed activations, one bit, and
# scales per channel of every rank that broadcasts.
GRIDS = {
    "weights": (0.07, 0, (-7, 7)),
    "wide weights": (0.4, 0, (-2, 1)),
    "relu": (0.11, 112, (112, 127)),
    "signed": (0.13, 118, (112, 127)),
    "one bit": (0.9, 126, (126, 127)),
    "eight bits": (0.01, -20, (-128, 127)),
    "channels": ([[[0.05, 0.2, 0.4, 0.11]]], 0, (-7, 7)),
    "pairs": (np.reshape([0.05, 0.2, 0.1, 0.3, 0.07, 0.6, 0.9, 0.4], (1, 2, 4)), 0, (-3, 3)),
    "last axis": ([0.05, 0.2, 0.4, 0.11], 3, (-8, 7)),
    "zero points": ([[[0.05, 0.2, 0.4, 0.1]]], [[[112, 120, 127, 115]]], (112, 127)),
}
every_grid = pytest.mark.parametrize("name", GRIDS)


def data(shape=(60, 2, 4)):
    """Some of it inside of every grid, some of it outside, all of it off the borders."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 0.3, shape), rng.normal(0, 3, shape)])
    return x.astype(F32), rng.normal(size=x.shape).astype(F32)


# ---------------------------------------------------------------------------------------------
# Values.


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "eager") for name in GRIDS),
        *((name, mode) for name in ("weights", "signed", "pairs") for mode in ("graph", "xla")),
    ],
)
def test_values_equal_the_twin(name, mode):
    scale, zero_point, codes = GRIDS[name]
    x, _ = data()
    y = call(x, scale, zero_point, codes, mode=mode).y
    expected = twin(x, scale, zero_point, codes)
    low, high = ends(scale, zero_point, codes)
    assert (y >= low).all() and (y <= high).all()
    if mode != "xla":
        np.testing.assert_array_equal(y, expected)
        return
    # XLA may divide by multiplying with the reciprocal: another level at ties alone.
    fraction = np.abs(x / F32(scale) - np.floor(x / F32(scale)) - 0.5)
    off = np.abs(y - expected) > 4 * np.spacing(np.abs(expected))
    assert not off[fraction > 1e-4].any()


# TensorFlow reads subnormal numbers as zero.
VALUES = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=80)
@given(
    x=hnp.arrays(F32, st.integers(1, 20), elements=VALUES),
    scale=st.floats(2.0**-20, 100.0, width=32),
    bits=st.integers(1, 8),
    share=st.floats(0, 1),
)
def test_any_value_goes_to_the_nearest_code(x, scale, bits, share):
    codes = (128 - 2**bits, 127)
    zero_point = codes[0] + round(share * (codes[1] - codes[0]))
    called = call(x, scale, zero_point, codes)
    np.testing.assert_array_equal(called.y, twin(x, scale, zero_point, codes))
    assert (called.y[x == 0] == 0).all()
    low, high = (float(end) for end in ends(scale, zero_point, codes))
    clipped = np.clip(x.astype(float), low, high)
    # x / scale is rounded to float32, the product once more.
    slack = (np.abs(clipped) + scale) * 2.0**-22
    assert (np.abs(called.y - clipped) <= scale / 2 + slack).all()
    np.testing.assert_array_equal(called.dx, (x >= F32(low)) & (x <= F32(high)))


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
def test_arithmetic_is_float32_whatever_comes_in(dtype):
    scale, zero_point, codes = GRIDS["signed"]
    x, upstream = data()
    x, upstream = tf.cast(x, dtype), tf.cast(upstream, dtype)
    made = {"gradient_scale": 0.1, "keeps_lowest": True, "backward": Backward(rule="dsq")}
    found = call(x, scale, zero_point, codes, upstream=upstream, **made)
    wide = call(
        tf.cast(x, tf.float32),
        scale,
        zero_point,
        codes,
        upstream=tf.cast(upstream, "float32"),
        **made,
    )
    np.testing.assert_array_equal(found.y, tf.cast(wide.y, dtype))
    np.testing.assert_array_equal(found.dx, tf.cast(wide.dx, dtype))
    assert found.dscale.dtype == F32
    assert (found.dscale, found.doffset) == (wide.dscale, wide.doffset)


def test_a_16_bit_policy_does_not_round_the_variable():
    """Keras hands a layer its float32 kernel, cast; the quantizer wants all of its bits."""
    layer = tf_keras.layers.Dense(1, use_bias=False, dtype="mixed_bfloat16")
    layer.build((None, 1))
    exact = F32(1 + 2.0**-20)
    layer.kernel.assign([[exact]])
    seen = []

    class Reader(tf_keras.layers.Layer):
        def call(self, inputs):
            seen.append((tf.convert_to_tensor(layer.kernel), in_float32(layer.kernel)))
            return inputs

    Reader(dtype="mixed_bfloat16")(tf.zeros([1]))
    ((cast, read),) = seen
    assert cast.dtype == tf.bfloat16 and float(cast[0, 0]) == 1.0
    assert read.dtype == tf.float32 and read.numpy()[0, 0] == exact


@by_mode
def test_nan_is_not_hidden(mode):
    called = call(
        np.array([np.nan, 1.0], F32), 0.1, 0, (-7, 7), mode=mode, gradient_scale=1.0, inside=True
    )
    assert np.isnan(called.y[0]) and not np.isnan(called.y[1])
    assert called.dx[1] == 0  # outside


# ---------------------------------------------------------------------------------------------
# Gradients.


STRENGTHS = [("ste", None), ("ewgs", 1e-3), ("ewgs", 0.7), ("ewgs", 0), ("dsq", 0.4), ("dsq", 0.1)]


def inside_of(x, scale, zero_point, codes):
    low, high = ends(scale, zero_point, codes)
    return (x >= low) & (x <= high)


@every_grid
@pytest.mark.parametrize(("rule", "strength"), STRENGTHS)
def test_gradient_of_x(name, rule, strength):
    scale, zero_point, codes = GRIDS[name]
    x, upstream = data()
    backward = Backward(rule=rule, strength=strength)
    dx = call(x, scale, zero_point, codes, upstream=upstream, backward=backward).dx
    v = x.astype(float) / F32(scale)
    expected = upstream * slope(rule, strength, upstream, v, codes[1] - codes[0])
    expected *= inside_of(x, scale, zero_point, codes)
    # v is known to half an ulp, 2^-24·|v|, which DSQ's slope magnifies by at most k² < 9.
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-6)
    assert np.count_nonzero(dx) > 20 and np.count_nonzero(dx) < dx.size


@by_mode
def test_the_ends_are_inside(mode):
    for name in ("weights", "relu", "one bit"):
        scale, zero_point, codes = GRIDS[name]
        low, high = ends(scale, zero_point, codes)
        below = np.nextafter(low, F32(-9)) if low else -np.finfo(F32).tiny
        x = np.array([low, high, below, np.nextafter(high, F32(9))], F32)
        dx = call(x, scale, zero_point, codes, mode=mode).dx
        assert (dx[:2] > 0).all() and (dx[2:] == 0).all()


def test_the_sign_of_ewgs():
    """x above its level: a gradient step down (g > 0) goes towards the level, and is enlarged."""
    backward = Backward(rule="ewgs", strength=0.5)
    x = np.array([0.3, 0.3, -0.3, -0.3], F32)  # above level 0, below level 0
    dx = call(x, 1.0, 0, (-2, 2), upstream=F32([1, -1, 1, -1]), backward=backward).dx
    np.testing.assert_allclose(
        dx, [1 + 0.0375, -(1 - 0.0375), 1 - 0.0375, -(1 + 0.0375)], rtol=1e-6
    )


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.4, 0.49])
def test_dsq_climbs_one_level_a_stair(alpha):
    """The slope's integral over one step is 1: the soft stairs join up."""
    v = (np.arange(20000) + 0.5) / 20000 + 3
    slopes = Backward(rule="dsq", strength=alpha)(tf.ones([20000]), tf.constant(v, tf.float32), 15)
    assert np.mean(slopes) == pytest.approx(1.0, rel=1e-3)
    # Steepest where the hard stairs jump.
    assert np.argmax(slopes) in range(9900, 10100)


def pulls(x, scale, zero_point, codes, *, inside=True, keeps_lowest=False):
    """dy/dscale and dy/doffset of each element, in float64: the derivative of what it is there.

    Inside, y = x + s·(round(v) - v) with the rounding error held: round(v) - v for LSQ, which lets
    it learn, and 0 for PACT. Outside, y is the real of an end of the grid: a multiple of s, counted
    from real 0 or, if the real of qmin is a parameter of its own, from there.
    """
    v = x.astype(float) / F32(scale)
    low, high = ends(scale, zero_point, codes)
    fixed = codes[0] if keeps_lowest else np.float64(zero_point)
    lowest, highest = (code - fixed for code in codes)
    error = np.rint(v) - v if inside else 0 * v
    by_scale = np.where(x < low, lowest, np.where(x > high, highest, error))
    return by_scale, 1.0 * ((x < low) | (x > high))


def summed(terms, like):
    """Over the elements that share an entry of `like`: the transpose of broadcasting."""
    like = np.asarray(like)
    total = terms.sum(tuple(range(terms.ndim - like.ndim)))
    ones = tuple(axis for axis, size in enumerate(like.shape) if size == 1)
    return total.sum(ones, keepdims=True)


@every_grid
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("keeps_lowest", [True, False])
def test_gradients_of_scale_and_offset(name, inside, keeps_lowest):
    scale, zero_point, codes = GRIDS[name]
    x, upstream = data()
    called = call(
        x,
        scale,
        zero_point,
        codes,
        upstream=upstream,
        gradient_scale=0.25,
        inside=inside,
        keeps_lowest=keeps_lowest,
    )
    by_scale, by_offset = pulls(
        x, scale, zero_point, codes, inside=inside, keeps_lowest=keeps_lowest
    )
    expected = summed(0.25 * upstream * by_scale, scale)
    assert called.dscale.shape == np.shape(scale) == expected.shape
    # A float32 sum of terms that cancel: each is known to 2^-23 of its size, v to 2^-24·|v|.
    size = summed(np.abs(0.25 * upstream * by_scale) + np.abs(x / F32(scale)), scale)
    assert (np.abs(called.dscale - expected) <= 1e-6 * size).all()
    assert called.doffset == pytest.approx((0.25 * upstream * by_offset).sum(), rel=1e-5)
    # The x gradient is that of a fixed grid.
    np.testing.assert_array_equal(
        called.dx, call(x, scale, zero_point, codes, upstream=upstream).dx
    )


@pytest.mark.parametrize(
    ("name", "rule", "mode"),
    [
        ("signed", "ste", "xla"),
        ("channels", "ewgs", "xla"),
        ("relu", "dsq", "xla"),
        ("zero points", "dsq", "graph"),
    ],
)
def test_gradients_are_the_same_in_every_mode(name, rule, mode):
    scale, zero_point, codes = GRIDS[name]
    x, upstream = data()
    options = {"keeps_lowest": True, "backward": Backward(rule=rule), "upstream": upstream}
    expected = call(x, scale, zero_point, codes, **options)
    found = call(x, scale, zero_point, codes, mode=mode, **options)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        # Sums of 480 terms of size 1 to 15, in orders of their own.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_outside_the_gradient_is_the_true_derivative():
    """Central differences of the forward pass itself: no estimator is needed there."""
    x = np.array([-5.0, -2.0, 3.0, 40.0], F32)
    zero_point, codes, step = 118, (112, 127), 2.0**-9
    up, down = (call(x, 0.125 + h, zero_point, codes).y for h in (step, -step))
    slopes = (up.astype(float) - down) / (2 * step)
    for index, expected in enumerate(slopes):
        upstream = F32(np.arange(4) == index)
        found = call(x, 0.125, zero_point, codes, upstream=upstream, inside=True)
        assert found.dscale == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(slopes, [-6, -6, 9, 9])


def test_a_grid_that_is_not_learned_gets_no_gradient():
    x, _ = data()
    called = call(x, 0.1, 0, (-7, 7))
    assert called.dscale is None and called.doffset is None


def test_nothing_is_outside_of_a_grid_made_from_x():
    """The largest x is 7·scale but for rounding, and must not lose its gradient to that."""
    largest = np.linspace(0.5, 1.5, 1000, dtype=F32)
    scale = (largest / F32(7)).reshape(-1)
    lost = [x for x, s in zip(largest, scale, strict=True) if x > F32(7) * s]
    assert lost  # there are such
    for x in lost[:5]:
        scale = x / F32(7)
        assert call(F32([x]), scale, 0, (-7, 7)).dx == 0
        called = call(F32([x, -x]), scale, 0, (-7, 7), clipped=False, inside=True)
        np.testing.assert_array_equal(called.dx, [1, 1])
        # What learns counts the rounding error alone.
        assert abs(called.dscale) < 1e-5 and called.doffset == 0


# ---------------------------------------------------------------------------------------------
# Options.


def test_defaults():
    assert Backward() == Backward(rule="ste") == Backward(rule="ste", strength=None)
    assert Backward(rule="ewgs").strength == 1e-3 and Backward(rule="dsq").strength == 0.4
    assert LearnedGrid() == LearnedGrid(
        gradient_scale=1.0, inside=True, keeps_lowest=False, offset=None
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "stairs"}, "unknown backward 'stairs'; choose from ste, ewgs, dsq"),
        ({"rule": None}, "unknown backward None"),
        ({"rule": "ste", "strength": 0.5}, "'ste' takes no strength 0.5"),
        ({"rule": "ewgs", "strength": -1e-3}, "'ewgs' takes no strength -0.001"),
        ({"rule": "ewgs", "strength": float("inf")}, "takes no strength inf"),
        ({"rule": "ewgs", "strength": float("nan")}, "takes no strength nan"),
        ({"rule": "dsq", "strength": 0.0}, r"takes no strength 0.0; .*dsq one in \(0, 0.5\)"),
        ({"rule": "dsq", "strength": 0.5}, "takes no strength 0.5"),
        ({"rule": "dsq", "strength": "0.4"}, "takes no strength '0.4'"),
    ],
)
def test_illegal_backwards(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Backward(**options)
    assert "\n" not in str(error.value)


def test_zeros_are_made_once_for_all_tensors_of_a_shape():
    """A graph keeps constants in memory for the whole step."""
    grid = affine_grid(tf.constant(-1.0), tf.constant(2.0), num_bits=4)

    @tf.function
    def gradients(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = sum(tf.reduce_sum(fake_quantize(x, grid)) for x in tensors)
        return tape.gradient(total, tensors)

    tensors = [tf.linspace(-2.0, 3.0, 6 * n)[tf.newaxis] for n in (1, 1, 2, 1)]
    for x, dx in zip(tensors, gradients(*tensors), strict=True):
        np.testing.assert_array_equal(dx, (x >= -1.0) & (x <= 2.0))
    operators = gradients.get_concrete_function(*tensors).graph.get_operations()
    selections = [operator for operator in operators if operator.type == "Select"]
    assert len(selections) == 4
    assert len({operator.inputs[2].ref() for operator in selections}) == 2
