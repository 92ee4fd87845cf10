"""Quantizers: serialization, values and gradients, against NumPy twins of the equations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qat import quantizers
from qat.grid import SMALLEST_SCALE
from qat.quantizers import (
    BinaryActivationQuantizer,
    BinaryWeightQuantizer,
    FixedRangeQuantizer,
    LastValueQuantizer,
    MovingAverageQuantizer,
)

MODES = ["eager", "graph", "xla"]
HALF_ULP = 2.0**-24
F32 = np.float32

by_mode = pytest.mark.parametrize("mode", MODES)
eager_or_xla = pytest.mark.parametrize("mode", ["eager", "xla"])

# Name -> (constructor without arguments, channel axes). The variety that recipes can ask for.
UNIFORM = {
    "weights8": lambda: LastValueQuantizer(num_bits=8, symmetric=True, channel_axes=(-1,)),
    "weights4": lambda: LastValueQuantizer(num_bits=4, symmetric=True),
    "weights2wide": lambda: LastValueQuantizer(
        num_bits=2, symmetric=True, narrow_range=False, channel_axes=(-1,)
    ),
    "last8": lambda: LastValueQuantizer(),
    "average8": lambda: MovingAverageQuantizer(decay=0.9),
    "average3": lambda: MovingAverageQuantizer(num_bits=3),
    "average1": lambda: MovingAverageQuantizer(num_bits=1),
    "average16": lambda: MovingAverageQuantizer(num_bits=16, symmetric=True),
    "averagechannels": lambda: MovingAverageQuantizer(num_bits=5, channel_axes=(-1,)),
    "fixed8": lambda: FixedRangeQuantizer(minimum=-1.3, maximum=2.1),
    "fixed4": lambda: FixedRangeQuantizer(minimum=0, maximum=6, num_bits=4),
    "fixed16": lambda: FixedRangeQuantizer(minimum=-3, maximum=3, num_bits=16, symmetric=True),
}
BINARY = {
    "scaled": lambda: BinaryWeightQuantizer(),
    "scaledtensor": lambda: BinaryWeightQuantizer(channel_axes=None),
    "scaleddepthwise": lambda: BinaryWeightQuantizer(channel_axes=(-2, -1)),
    "unscaled": lambda: BinaryWeightQuantizer(scaled=False, surrogate="swish", beta=3.0),
    "sign": lambda: BinaryActivationQuantizer(),
    "signsigmoid": lambda: BinaryActivationQuantizer(surrogate="sigmoid", steepness=4.0),
}
EVERY = {**UNIFORM, **BINARY}
every_uniform = pytest.mark.parametrize("make", UNIFORM.values(), ids=UNIFORM)
every_binary = pytest.mark.parametrize("make", BINARY.values(), ids=BINARY)
every_quantizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def build(quantizer, shape):
    return quantizer.build(tf.TensorShape(shape), "output", tf_keras.layers.Layer())


def in_mode(function, mode):
    if mode == "eager":
        return function
    return tf.function(function, jit_compile=mode == "xla", autograph=False)


def run(quantizer, x, weights, *, mode="eager", training=False, upstream=None):
    """(y, dx, scale, zero_point) as NumPy arrays; scale and zero point as that mode has them."""
    x = tf.convert_to_tensor(x)
    upstream = tf.ones_like(x) if upstream is None else tf.cast(upstream, x.dtype)

    def forward_and_backward(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = quantizer(x, training, weights)
        grid = quantizer.grid(weights, x)
        dx = tape.gradient(y, x, output_gradients=upstream)
        return y, dx, tf.convert_to_tensor(grid.scale), tf.convert_to_tensor(grid.zero_point)

    y, dx, scale, zero_point = in_mode(forward_and_backward, mode)(x, upstream)
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (x.dtype, x.dtype, x.shape, x.shape)
    return y.numpy(), dx.numpy(), scale.numpy(), zero_point.numpy()


def code_range(quantizer):
    """(qmin, qmax) from the containers' definition."""
    bits = quantizer.num_bits
    if quantizer.symmetric:
        top = 2 ** (bits - 1) - 1
        return (-top if quantizer.narrow_range else -top - 1), top
    return 127 - (2**bits - 1), 127


def twin(x, scale, zero_point, qmin, qmax):
    """Fake quantization in NumPy float32, one rounding for each operation."""
    codes = np.rint(x.astype(F32) / scale) + zero_point
    codes = np.minimum(np.maximum(codes, F32(qmin)), F32(qmax))
    return (codes - zero_point) * scale


def sample(shape=(40, 25, 4), spread=1.0):
    # Columns of different size, so that a range per channel differs from one per tensor.
    x = np.random.default_rng(0).normal(0, spread, shape) * np.linspace(0.3, 2.0, shape[-1])
    return x.astype(F32)


# ---------------------------------------------------------------------------------------------
# Serialization.


@every_quantizer
def test_config_makes_an_equal_quantizer(make):
    quantizer = make()
    config = json.loads(json.dumps(quantizer.get_config()))
    twin_quantizer = type(quantizer).from_config(config)
    assert twin_quantizer == quantizer
    assert twin_quantizer.get_config() == quantizer.get_config()
    x = sample()
    expected, *_ = run(quantizer, x, build(quantizer, x.shape), training=True)
    y, *_ = run(twin_quantizer, x, build(twin_quantizer, x.shape), training=True)
    np.testing.assert_array_equal(y, expected)


@every_quantizer
def test_keras_serialization_needs_no_scope(make):
    quantizer = make()
    serialized = tf_keras.utils.legacy.serialize_keras_object(quantizer)
    serialized = json.loads(json.dumps(serialized))
    restored = tf_keras.utils.legacy.deserialize_keras_object(serialized)
    assert type(restored) is type(quantizer) and restored == quantizer


@pytest.mark.parametrize("name", EVERY)
def test_equal_only_to_the_same_options(name):
    quantizer = EVERY[name]()
    assert quantizer == EVERY[name]()
    assert [other for other in EVERY if EVERY[other]() == quantizer] == [name]
    assert quantizer != "quantizer" and quantizer != quantizer.get_config()


def test_configs_name_every_option():
    assert LastValueQuantizer(num_bits=5, symmetric=True, channel_axes=[-2, -1]).get_config() == {
        "num_bits": 5,
        "symmetric": True,
        "narrow_range": True,
        "channel_axes": (-2, -1),
        "backward": "ste",
        "strength": None,
    }
    rule = LastValueQuantizer(backward="dsq").get_config()
    assert (rule["backward"], rule["strength"]) == ("dsq", 0.4)
    assert MovingAverageQuantizer(decay=0.5).get_config()["decay"] == 0.5
    fixed = FixedRangeQuantizer(minimum=0, maximum=255).get_config()
    assert (fixed["minimum"], fixed["maximum"]) == (0.0, 255.0)
    assert BinaryActivationQuantizer(surrogate="swish", beta=2.0).get_config() == {
        "surrogate": "swish",
        "beta": 2.0,
    }


# ---------------------------------------------------------------------------------------------
# Values.


@by_mode
@every_uniform
def test_values_equal_the_twin(make, mode):
    quantizer, x = make(), sample((400, 50, 4))
    y, _, scale, zero_point = run(quantizer, x, build(quantizer, x.shape), mode=mode, training=True)
    np.testing.assert_array_equal(y, twin(x, scale, zero_point, *code_range(quantizer)))


def expected_grid(x, quantizer, axes):
    """(scale, zero_point) from a tensor's range, in NumPy float32."""
    low, high = x.min(axes, keepdims=axes is not None), x.max(axes, keepdims=axes is not None)
    qmin, qmax = code_range(quantizer)
    if quantizer.symmetric:
        return np.maximum(-low, high) / F32(qmax), F32(0)
    low, high = np.minimum(low, F32(0)), np.maximum(high, F32(0))
    scale = (high - low) / F32(qmax - qmin)
    return scale, np.rint(F32(qmin) - low / scale)


@pytest.mark.parametrize(
    ("bits", "axes"),
    [(2, None), (3, (-1,)), (4, None), (6, (-1,)), (8, (-1,)), (16, None)],
)
@by_mode
def test_last_value_range_is_the_tensors(bits, axes, mode):
    quantizer = LastValueQuantizer(num_bits=bits, symmetric=True, channel_axes=axes)
    x = sample()
    _, _, scale, _ = run(quantizer, x, {}, mode=mode)
    expected, _ = expected_grid(x, quantizer, None if axes is None else (0, 1))
    # Compilers may divide by a constant by multiplying with its reciprocal: one ulp at most.
    np.testing.assert_allclose(scale, expected, rtol=0 if mode == "eager" else 4 * HALF_ULP)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_affine_range_is_the_tensors(bits):
    quantizer = LastValueQuantizer(num_bits=bits)
    for x in (sample(), np.abs(sample()), -np.abs(sample())):
        _, _, scale, zero_point = run(quantizer, x, {})
        expected = expected_grid(x, quantizer, None)
        assert (scale, zero_point) == expected


@every_uniform
def test_graph_and_eager_make_the_same_integers(make):
    """Training runs in a tf.function, the freeze table is made eagerly: one truth for both.

    Even halfway between two codes, where a scale that differs by an ulp would show.
    """
    quantizer, x = make(), sample((2000, 4))
    weights = build(quantizer, x.shape)
    quantizer(tf.constant(x), True, weights)
    grid = quantizer.grid(weights, tf.constant(x)).numpy()
    qmin, qmax = code_range(quantizer)
    between = (np.linspace(qmin, qmax, 200).astype(int) + 0.5 - grid.zero_point.max())[:, None]
    x = tf.concat([x, np.clip(between * grid.scale, x.min(0), x.max(0)).astype(F32) + 0 * x[:1]], 0)
    codes = quantizer.codes(x, weights)
    traced = tf.function(lambda x: quantizer.codes(x, weights), autograph=False)(x)
    assert np.count_nonzero(traced.numpy() != codes.numpy()) == 0


@every_uniform
def test_codes_are_those_of_the_values(make):
    quantizer, x = make(), sample()
    weights = build(quantizer, x.shape)
    y = quantizer(tf.constant(x), True, weights)
    codes = quantizer.codes(tf.constant(x), weights)
    grid = quantizer.grid(weights, tf.constant(x))
    qmin, qmax = code_range(quantizer)
    assert (grid.qmin, grid.qmax) == (qmin, qmax)
    assert codes.numpy().min() >= qmin and codes.numpy().max() <= qmax
    np.testing.assert_array_equal(codes, np.rint(codes))
    np.testing.assert_array_equal(y, (codes - grid.zero_point) * grid.scale)


@every_quantizer
def test_bfloat16_in_bfloat16_out(make):
    quantizer = make()
    x = tf.cast(tf.constant(sample()), tf.bfloat16)
    wide = tf.cast(x, tf.float32)
    y, dx, scale, zero_point = run(quantizer, x, build(quantizer, x.shape), training=True)
    # All arithmetic is float32, on the bfloat16 numbers; the result is rounded once.
    expected, wide_dx, wide_scale, wide_zero = run(
        quantizer, wide, build(quantizer, x.shape), training=True
    )
    np.testing.assert_array_equal(y, tf.cast(expected, tf.bfloat16))
    np.testing.assert_array_equal(scale, wide_scale)
    np.testing.assert_array_equal(zero_point, wide_zero)
    np.testing.assert_array_equal(dx, tf.cast(wide_dx, tf.bfloat16))


LEVELS = [  # symmetric, narrow range, bits, number of levels
    *((False, True, bits, 2**bits) for bits in range(1, 9)),
    *((True, True, bits, 2**bits - 1) for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
    *((True, False, bits, 2**bits) for bits in (2, 3, 4, 8, 16)),
]


@pytest.mark.parametrize(("symmetric", "narrow", "bits", "levels"), LEVELS)
@pytest.mark.parametrize("kind", ["last", "average", "fixed"])
def test_num_bits_is_the_number_of_levels(kind, symmetric, narrow, bits, levels):
    """TFMOT's FixedQuantizer drops num_bits: a dense sweep meets each level, and no more."""
    options = {"num_bits": bits, "symmetric": symmetric, "narrow_range": narrow}
    low, high = (-1.5, 1.5) if symmetric else (-0.5, 1.5)
    sweep = tf.linspace(3 * low, 3 * high, 3 * 2 ** (bits + 3) + 1)
    weights = {}
    if kind == "last":
        quantizer = LastValueQuantizer(**options)
        sweep = sweep / 3.0  # nothing lies beyond the range, so not on the lowest code -2^(b-1)
        levels -= symmetric and not narrow
    elif kind == "average":
        quantizer = MovingAverageQuantizer(**options)
        weights = build(quantizer, [None])
        quantizer(tf.constant([low, high]), True, weights)
    else:
        quantizer = FixedRangeQuantizer(minimum=low, maximum=high, **options)
    y = quantizer(sweep, False, weights).numpy()
    assert len(np.unique(y)) == levels
    # One step out, the range's ends are saturated: the top is where it was asked to be.
    assert abs(y.max() - high) <= 0.51 * (high - low) / (levels - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bits": 0}, "num_bits must be one of"),
        ({"num_bits": 9}, "num_bits must be one of"),
        ({"num_bits": 12, "symmetric": True}, "num_bits must be one of"),
        ({"num_bits": 32, "symmetric": True}, "num_bits must be one of"),
        ({"num_bits": 1, "symmetric": True}, "at least 2 bits"),
        ({"num_bits": 16}, "symmetric=True"),
    ],
)
def test_illegal_options(options, message):
    for kind in (LastValueQuantizer, MovingAverageQuantizer):
        with pytest.raises(ValueError, match=message) as error:
            kind(**options)
        assert "\n" not in str(error.value)


def test_sixteen_bits_are_symmetric():
    """TFMOT's 16-bit activations come out asymmetric, and convolutions refuse them."""
    quantizer = MovingAverageQuantizer(num_bits=16, symmetric=True)
    weights = build(quantizer, [None])
    x = tf.constant(np.abs(sample()))  # after a ReLU, say
    quantizer(x, True, weights)
    grid = quantizer.grid(weights)
    assert float(grid.zero_point) == 0.0
    assert (grid.qmin, grid.qmax) == (-32767, 32767)
    assert float(grid.scale) == pytest.approx(np.abs(sample()).max() / 32767, rel=1e-6)


RANKS = [(7,), (5, 3), (4, 5, 3), (3, 3, 4, 2), (2, 3, 3, 4, 2)]


@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize("kind", [LastValueQuantizer, MovingAverageQuantizer])
@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_are_quantized_as_if_alone(kind, symmetric, shape):
    """TFMOT takes ranks 2 and 4 only, and its moving average crashes per channel."""
    options = {"num_bits": 4, "symmetric": symmetric}
    quantizer, alone = kind(channel_axes=(-1,), **options), LastValueQuantizer(**options)
    x = sample(shape)
    weights = build(quantizer, shape)
    y = quantizer(tf.constant(x), True, weights).numpy()
    assert quantizer.grid(weights, tf.constant(x)).scale.shape == (1,) * (len(shape) - 1) + (
        shape[-1],
    )
    for channel in range(shape[-1]):
        expected = alone(tf.constant(x[..., channel]), False, {})
        # A debiased average of one batch is the batch's range but for its own rounding.
        tolerance = 0 if kind is LastValueQuantizer else 1e-5 * np.abs(x).max()
        np.testing.assert_allclose(y[..., channel], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_kernels_have_a_scale_for_each_output_channel(multiplier):
    """TFMOT gives the C·M channels of a [k, k, C, M] kernel M ranges."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 5, multiplier)) * rng.uniform(0.1, 10, (1, 1, 5, multiplier))
    kernel = kernel.astype(F32)
    quantizer = LastValueQuantizer(num_bits=4, symmetric=True, channel_axes=(-2, -1))
    grid = quantizer.grid({}, tf.constant(kernel))
    assert grid.scale.shape == (1, 1, 5, multiplier)
    assert len(np.unique(grid.scale)) == 5 * multiplier
    np.testing.assert_array_equal(np.ravel(grid.scale), np.abs(kernel).max((0, 1)).ravel() / F32(7))


@every_uniform
def test_zeros_stay_zero(make):
    quantizer, x = make(), np.zeros((3, 4), F32)
    y, dx, scale, _ = run(quantizer, x, build(quantizer, x.shape), training=True)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(dx, np.ones_like(x))
    assert np.isfinite(scale).all() and (scale >= SMALLEST_SCALE).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_sets_the_range(bits, symmetric):
    x = np.append(sample((1000,)), F32(1e6))
    quantizer = LastValueQuantizer(num_bits=bits, symmetric=symmetric)
    y, _, scale, _ = run(quantizer, x, {})
    assert np.abs(y - x).max() <= 0.5001 * scale
    # All the rest falls onto zero: what min-max costs.
    np.testing.assert_array_equal(y[:-1], 0)


@settings(max_examples=80)
@given(
    x=hnp.arrays(F32, st.integers(1, 30), elements=st.floats(-1e4, 1e4, width=32)),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
)
@example(x=np.full(5, -3.0, F32), bits=8, symmetric=False)
@example(x=np.full(5, -3.0, F32), bits=8, symmetric=True)
@example(x=np.full(5, 1e-30, F32), bits=8, symmetric=True)
def test_error_is_at_most_half_a_step(x, bits, symmetric):
    quantizer = LastValueQuantizer(num_bits=bits, symmetric=symmetric)
    y, _, scale, _ = run(quantizer, x, {})
    # Beyond half a step: x / scale is off by half an ulp of at most 255.
    assert np.abs(y.astype(float) - x).max() <= (0.5 + 256 * HALF_ULP) * scale
    assert (y[x == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_negative_tensors(bits):
    x = -np.abs(sample()) - F32(1.0)
    quantizer = LastValueQuantizer(num_bits=bits)
    y, _, scale, zero_point = run(quantizer, x, {})
    assert zero_point == 127 and y.max() <= 0
    assert np.abs(y - x).max() <= 0.5001 * scale


@eager_or_xla
@every_quantizer
def test_nan_is_not_hidden(make, mode):
    quantizer, x = make(), sample((6, 4))
    x[2, 1] = np.nan
    y, *_ = run(quantizer, x, build(quantizer, x.shape), mode=mode, training=True)
    assert np.isnan(y[2, 1])


# ---------------------------------------------------------------------------------------------
# Gradients.


TINY = np.finfo(F32).tiny  # TensorFlow reads anything smaller as zero


@by_mode
@pytest.mark.parametrize(
    "name", [name for name in UNIFORM if name.startswith(("average", "fixed"))]
)
def test_gradient_passes_where_the_grid_reaches(name, mode):
    quantizer = UNIFORM[name]()
    data = sample((50, 4))
    weights = build(quantizer, (None, 4))
    quantizer(tf.constant(data), True, weights)
    _, _, scale, zero_point = run(quantizer, data, weights, mode=mode)
    # The reals of the lowest and highest code: exact in float64, then rounded to float32.
    reals = [(q - zero_point.astype(float)) * scale.astype(float) for q in code_range(quantizer)]
    low, high = (np.broadcast_to(np.ravel(real.astype(F32)), 4) for real in reals)
    below, above = np.nextafter(low, F32(-np.inf)), np.nextafter(high, F32(np.inf))
    below, above = np.where(low == 0, -TINY, below), np.where(high == 0, TINY, above)
    inside = [low, high, (low + high) / 2, np.nextafter(high, low), np.clip(0 * low, low, high)]
    outside = [below, above, 2 * low - high, 2 * high - low]
    x = np.stack(inside + outside).astype(F32)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(F32)
    y, dx, *_ = run(quantizer, x, weights, mode=mode, upstream=upstream)
    np.testing.assert_array_equal(dx, upstream * ((x >= low) & (x <= high)))
    assert (dx[: len(inside)] != 0).all() and (dx[len(inside) :] == 0).all()
    np.testing.assert_array_equal(y[:2], [low, high])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@by_mode
def test_every_weight_keeps_its_gradient(bits, mode):
    """Min-max reaches from the least to the greatest weight: none of them is clipped."""
    quantizer = LastValueQuantizer(num_bits=bits, symmetric=True, channel_axes=(-1,))
    x = np.random.default_rng(0).normal(size=(3, 3, 4, 300)).astype(F32)
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(F32)
    _, dx, *_ = run(quantizer, x, {}, mode=mode, upstream=upstream)
    assert np.count_nonzero(dx != upstream) == 0


def test_the_range_gets_no_gradient():
    for make in UNIFORM.values():
        quantizer = make()
        weights = build(quantizer, (None, 4))
        with tf.GradientTape() as tape:
            y = quantizer(tf.constant(sample((9, 4))), True, weights)
        assert tape.gradient(y, list(weights.values())) == [None] * len(weights)
        assert not any(variable.trainable for variable in weights.values())


# ---------------------------------------------------------------------------------------------
# Running ranges.


@by_mode
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_average_is_debiased(decay, mode):
    quantizer = MovingAverageQuantizer(decay=decay)
    weights = build(quantizer, [None])
    rng = np.random.default_rng(0)
    step = in_mode(lambda x: quantizer(x, True, weights), mode)
    averages, total = np.zeros(2), 0.0
    for count in range(1, 31):
        x = rng.normal(0, 1 + count, 50).astype(F32)
        step(tf.constant(x))
        averages = decay * averages + (1 - decay) * np.array([x.min(), x.max()], float)
        total = decay * total + (1 - decay)
        assert total == pytest.approx(1 - decay**count)  # Adam's debiasing
        low, high = quantizer.range(weights, None)
        # At most five roundings a step in the average and five in its weight, then a division.
        tolerance = (10 * count + 1) * HALF_ULP * 4
        assert float(low) == pytest.approx(averages[0] / total, rel=tolerance)
        assert float(high) == pytest.approx(averages[1] / total, rel=tolerance)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_one_batch_is_enough(decay):
    """TFMOT starts at ±6 or at 0; here the first batch decides."""
    x = sample()
    for scale in (1e-3, 1.0, 1e3):
        quantizer = MovingAverageQuantizer(decay=decay)
        weights = build(quantizer, [None])
        quantizer(tf.constant(x * F32(scale)), True, weights)
        low, high = quantizer.range(weights, None)
        np.testing.assert_allclose([low, high], [x.min() * scale, x.max() * scale], rtol=1e-6)


def test_range_shrinks_again():
    """TFMOT's input range only ever grows."""
    quantizer = MovingAverageQuantizer(decay=0.9)
    weights = build(quantizer, [None])
    quantizer(tf.constant([-100.0, 100.0]), True, weights)
    for _ in range(100):
        quantizer(tf.constant([-1.0, 1.0]), True, weights)
    low, high = quantizer.range(weights, None)
    # 99·decay^100 is left of the excess, and debiasing moves it by less than its own share.
    assert abs(float(high) - 1.0) < 0.01 and abs(float(low) + 1.0) < 0.01
    assert float(high) > 1.0


@by_mode
def test_inference_leaves_the_range_alone(mode):
    quantizer = MovingAverageQuantizer()
    weights = build(quantizer, [None])
    quantizer(tf.constant([-1.0, 3.0]), True, weights)
    before = {key: value.numpy() for key, value in weights.items()}
    y, *_ = run(quantizer, np.array([-50.0, 0.5, 50.0], F32), weights, mode=mode)
    assert {key: value.numpy() for key, value in weights.items()} == before
    low, high = y[0], y[2]
    assert -1.01 < low < -0.99 and 2.99 < high < 3.01


@eager_or_xla
@pytest.mark.parametrize("axes", [None, (-1,)])
def test_unobserved_takes_the_batchs_own_range(axes, mode):
    """An untrained model of TFMOT's gives zeros."""
    quantizer = MovingAverageQuantizer(channel_axes=axes)
    x = sample((20, 4))
    weights = build(quantizer, (None, 4))
    y, *_ = run(quantizer, x, weights, mode=mode)
    expected, *_ = run(LastValueQuantizer(channel_axes=axes), x, {}, mode=mode)
    np.testing.assert_array_equal(y, expected)
    assert not any(value.numpy().any() for value in weights.values())


def test_unobserved_has_no_grid_to_export():
    quantizer = MovingAverageQuantizer()
    weights = build(quantizer, [None])
    with pytest.raises(ValueError, match="no range was observed.*calibrate") as error:
        quantizer.grid(weights)
    assert "\n" not in str(error.value)
    quantizer(tf.constant([0.0, 1.0]), True, weights)
    assert float(quantizer.grid(weights).scale) == pytest.approx(1 / 255, rel=1e-6)


def test_a_nan_batch_shows_in_the_range():
    quantizer = MovingAverageQuantizer()
    weights = build(quantizer, [None])
    quantizer(tf.constant([0.0, 1.0]), True, weights)
    quantizer(tf.constant([0.0, np.nan]), True, weights)
    assert np.isnan(quantizer.grid(weights).scale)


@pytest.mark.parametrize("channel_axes", [None, (-1,)])
def test_batches_of_zeros_leave_the_range(channel_axes):
    """Units that no example activates any more: their range would fade until nothing fits it."""
    quantizer = MovingAverageQuantizer(channel_axes=channel_axes)
    weights = build(quantizer, [None, 2])
    zeros, ones = tf.zeros([3, 2]), tf.ones([3, 2])
    quantizer(zeros, True, weights)
    assert np.all(quantizer.grid(weights).scale.numpy() == F32(1 / 255))  # of [0, 1]
    quantizer(ones, True, weights)
    # The first numbers count as if nothing had been before.
    np.testing.assert_allclose(quantizer.grid(weights).scale, F32(1 / 255), rtol=1e-6)
    before = {key: variable.numpy() for key, variable in weights.items()}
    for _ in range(3):
        quantizer(zeros, True, weights)
    for key, variable in weights.items():
        np.testing.assert_array_equal(variable.numpy(), before[key])
    quantizer(tf.constant([[0.0, 0.0], [0.0, 1.0]]), True, weights)
    assert weights["observed"].numpy() > before["observed"]


def test_a_range_calibrated_on_zeros_is_no_past():
    """A branch behind a gamma of 0, calibrated, then trained."""
    quantizer = MovingAverageQuantizer()
    weights = build(quantizer, [None])
    quantizer.set_range(weights, 0.0, 0.0)
    y = quantizer(tf.constant([0.0, 5.0]), True, weights)
    np.testing.assert_allclose(y, [0.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_illegal_decay(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        MovingAverageQuantizer(decay=decay)


# ---------------------------------------------------------------------------------------------
# Fixed and own ranges.


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "zero_point"),
    [
        (0, 255, 8, 1.0, -128),  # image bytes are their own codes
        (0.0, 255 / 256, 8, 1 / 256, -128),  # TFLite's softmax and logistic
        (-1.0, 127 / 128, 8, 1 / 128, 0),  # TFLite's tanh
        (0, 6, 4, 0.4, 112),
        (2.0, 3.0, 8, 3 / 255, -128),  # widened to zero
        (-3.0, -2.0, 8, 3 / 255, 127),
    ],
)
def test_fixed_ranges(low, high, bits, scale, zero_point):
    quantizer = FixedRangeQuantizer(minimum=low, maximum=high, num_bits=bits)
    grid = quantizer.grid({})  # known without any data
    assert grid.scale.numpy() == F32(scale)
    assert float(grid.zero_point) == zero_point
    quantizer(tf.constant([-1e3, 1e3]), True, {})
    assert quantizer.grid({}).scale.numpy() == F32(scale)


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1), (2, 1), (float("nan"), 1), (0, float("nan")), (0, float("inf"))]
)
def test_illegal_fixed_ranges(low, high):
    with pytest.raises(ValueError, match="finite minimum < maximum") as error:
        FixedRangeQuantizer(minimum=low, maximum=high)
    assert "\n" not in str(error.value)


def test_last_value_needs_the_tensor():
    with pytest.raises(ValueError, match=r"grid\(weights, inputs\)"):
        LastValueQuantizer().grid({})
    with pytest.raises(ValueError, match=r"grid\(weights, inputs\)"):
        BinaryWeightQuantizer().grid({})


# ---------------------------------------------------------------------------------------------
# One bit.


SIGNED = np.array([[-2.0, -0.0, 0.5], [-1.0, 0.0, -0.25], [1.0, 1e-3, 3.0]], F32)
SIGNS = np.array([[-1, 1, 1], [-1, 1, -1], [1, 1, 1]], F32)


def top_code(quantizer):
    """The codes of both signs are the ends of their containers: INT4 kernels, int8 activations."""
    return 127 if isinstance(quantizer, BinaryActivationQuantizer) else 7


@by_mode
@every_binary
def test_binary_values(make, mode):
    quantizer = make()
    assert quantizer.num_bits == 1
    x = np.stack([SIGNED, 2 * SIGNED])[None]  # rank 4, for pairs of channel axes
    signs = np.stack([SIGNS, SIGNS])[None]
    y, _, scale, zero_point = run(quantizer, x, {}, mode=mode)
    codes = quantizer.codes(tf.constant(x), {}).numpy()
    np.testing.assert_array_equal(codes, top_code(quantizer) * signs)
    np.testing.assert_array_equal(y, codes * scale)
    grid = quantizer.grid({}, tf.constant(x))
    assert (grid.qmin, grid.qmax) == (-top_code(quantizer), top_code(quantizer))
    assert zero_point == 0


@pytest.mark.parametrize(
    ("shape", "axes", "reduced"),
    [
        ((3, 3, 4, 5), (-1,), (0, 1, 2)),
        ((3, 3, 4, 2), (-2, -1), (0, 1)),
        ((3, 3, 4, 5), (-2,), (0, 1, 3)),
        ((6, 7), (-1,), (0,)),
        ((6, 7), None, (0, 1)),
    ],
)
def test_binary_scale_is_the_mean_magnitude(shape, axes, reduced):
    x = np.random.default_rng(0).normal(size=shape).astype(F32)
    quantizer = BinaryWeightQuantizer(channel_axes=axes)
    y = quantizer(tf.constant(x), True, {}).numpy()
    alpha = np.abs(x.astype(float)).mean(reduced, keepdims=True)
    # A float32 mean of n terms, divided into codes and multiplied by one.
    np.testing.assert_allclose(y, alpha * np.sign(x), rtol=(x.size + 4) * HALF_ULP)
    scale = quantizer.grid({}, tf.constant(x)).scale
    assert scale.shape == (alpha.shape if axes is not None else ())
    np.testing.assert_array_equal(np.abs(y), np.broadcast_to(7 * scale, shape))


def test_unscaled_and_activations_are_plus_minus_one():
    x = tf.constant(sample())
    for quantizer in (BinaryWeightQuantizer(scaled=False), BinaryActivationQuantizer()):
        np.testing.assert_array_equal(np.unique(quantizer(x, True, {})), [-1, 1])
        assert quantizer.grid({}).scale.numpy() == F32(1 / top_code(quantizer))


def test_a_zero_filter_is_harmless():
    y, dx, *_ = run(BinaryWeightQuantizer(), np.zeros((3, 3, 2, 2), F32), {})
    assert np.abs(y).max() <= 7 * SMALLEST_SCALE and np.isfinite(dx).all()


def logistic(z):
    return 1 / (1 + np.exp(-z))


# d/dx of each proxy of sign(x), written from the papers.
SLOPES = {
    "identity": lambda x: np.ones_like(x),
    "clipped": lambda x: (np.abs(x) <= 1) * 1.0,
    "bireal": lambda x: np.where(x < 0, 2 + 2 * x, 2 - 2 * x) * (np.abs(x) <= 1),
    "swish": lambda x, beta=5.0: (
        beta * (2 - beta * x * np.tanh(beta * x / 2)) / (1 + np.cosh(beta * x))
    ),
    "sigmoid": lambda x, steepness=10.0: (
        2 * steepness * logistic(steepness * x) * (1 - logistic(steepness * x))
    ),
    "tanh": lambda x, steepness=5.0: steepness * (1 - np.tanh(steepness * x) ** 2),
}
SURROGATES = [
    *((name, {}) for name in SLOPES),
    ("swish", {"beta": 2.0}),
    ("sigmoid", {"steepness": 3.0}),
    ("tanh", {"steepness": 1.5}),
]
BINARY_KINDS = {
    "scaled": lambda **options: BinaryWeightQuantizer(**options),
    "tensor": lambda **options: BinaryWeightQuantizer(channel_axes=None, **options),
    "unscaled": lambda **options: BinaryWeightQuantizer(scaled=False, **options),
    "activation": lambda **options: BinaryActivationQuantizer(**options),
}


@pytest.mark.parametrize(("surrogate", "options"), SURROGATES)
@pytest.mark.parametrize("kind", BINARY_KINDS)
def test_binary_gradient_is_the_surrogates(kind, surrogate, options):
    """Also exactly at ±1; α neither scales it nor adds to it."""
    x = np.array([-3, -1 - 2**-20, -1, -0.5, -1e-3, 0, 0.3, 1, 1 + 2**-20, 3, 0.9, -0.7])
    x = np.stack([x, 0.5 * x], 1)  # two channels of different α
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(F32)
    quantizer = BINARY_KINDS[kind](surrogate=surrogate, **options)
    _, dx, *_ = run(quantizer, x.astype(F32), {}, upstream=upstream)
    expected = SLOPES[surrogate](x.astype(F32).astype(float), **options) * upstream
    # The slopes are float32 expressions of a dozen operations, the largest of them 2·steepness/4.
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)


@by_mode
@every_binary
def test_binary_gradient_is_the_same_in_every_mode(make, mode):
    x = sample((30, 5, 4))
    _, expected, *_ = run(make(), x, {})
    _, dx, *_ = run(make(), x, {}, mode=mode)
    # exp and tanh differ by ulps between compilers.
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(expected) > 0


def test_default_surrogates():
    x = np.array([0.25, 0.5, 1.0, 1.5], F32)
    _, dx, *_ = run(BinaryWeightQuantizer(channel_axes=None), x, {})
    np.testing.assert_array_equal(dx, [1, 1, 1, 0])
    _, dx, *_ = run(BinaryActivationQuantizer(), x, {})
    np.testing.assert_array_equal(dx, [1.5, 1, 0, 0])


@pytest.mark.parametrize("kind", [BinaryWeightQuantizer, BinaryActivationQuantizer])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "step"}, "unknown surrogate 'step'"),
        ({"surrogate": "swish", "steepness": 3.0}, "takes .*beta.*, not steepness"),
        ({"surrogate": "sigmoid", "steepness": -1.0}, "steepness must be a number"),
    ],
)
def test_illegal_surrogates_fail_when_made(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(**options)
    assert "\n" not in str(error.value)


def test_the_public_names_are_quantizers():
    for name in quantizers.__all__:
        assert getattr(quantizers, name).__module__.startswith("qat.quantizers")


@pytest.mark.parametrize("training", [True, False])
def test_a_range_that_stands_costs_no_reduction(training):
    """The graph has passes for minimum and maximum only where the range follows the batches; else
    they lie in a branch that runs before anything was observed."""
    quantizer = MovingAverageQuantizer()
    weights = build(quantizer, [None])
    traced = tf.function(lambda x: quantizer(x, training, weights)).get_concrete_function(
        tf.TensorSpec([64], tf.float32)
    )
    kinds = {operator.type for operator in traced.graph.get_operations()}
    assert ({"Min", "Max"} <= kinds) == training and bool({"Min", "Max"} & kinds) == training
    assert ({"If", "StatelessIf"} & kinds != set()) != training
