"""LSQ, LSQ+ and PACT: serialization, values, and gradients against the equations in float64."""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from quantizer_calls import F32, assert_serializable, build, call, sample, shared_axes
from small_models import layers

import qat
from qat.configs import LayerQuantizeConfig
from qat.grid import SMALLEST_SCALE
from qat.layers import FakeQuantize
from qat.quantizers import LsqPlusQuantizer, LsqQuantizer, PactQuantizer
from qat.recipe import TensorSpec
from qat.wrapper import KernelWrapper

KERNEL, BATCH = (3, 3, 4, 6), (16, 5, 6)


@dataclasses.dataclass(frozen=True)
class Case:
    """A quantizer; the equations' constants are written out here, for the oracles."""

    make: type
    options: dict
    shape: tuple[int, ...]  # of the tensor
    codes: tuple[int, int]
    levels: int  # Qp: the highest code of weights, the number of steps of activations
    shared: int  # N: elements of one example that share the step

    def __call__(self):
        return self.make(**self.options)

    @property
    def axes(self):
        return self.options.get("channel_axes")

    @property
    def symmetric(self):
        return self.options.get("symmetric", False)


def weights(bits, axes, shared, codes, shape=KERNEL, **options):
    options = {"num_bits": bits, "symmetric": True, "channel_axes": axes, **options}
    return Case(LsqQuantizer, options, shape, codes, codes[1], shared)


def activations(make, bits, shared, **options):
    codes = 128 - 2**bits, 127
    return Case(make, {"num_bits": bits, **options}, BATCH, codes, 2**bits - 1, shared)


PAIRS = (3, 3, 4, 2)  # a depthwise kernel with multiplier 2
CASES = {
    "weights": weights(4, (-1,), 36, (-7, 7)),
    "wide": weights(2, (-1,), 36, (-2, 1), narrow_range=False),
    "ternary": weights(2, (-1,), 36, (-1, 1)),
    "depthwise": weights(3, (-2, -1), 9, (-4, 3), PAIRS, narrow_range=False),
    "transposed": weights(4, (-2,), 54, (-7, 7)),
    "tensor": weights(8, None, 216, (-127, 127)),
    "ewgs": weights(4, (-1,), 36, (-7, 7), backward="ewgs", strength=0.3),
    "dsq": weights(3, (-1,), 36, (-4, 3), backward="dsq", narrow_range=False),
    "affine": activations(LsqQuantizer, 4, 30),
    "channels": activations(LsqQuantizer, 3, 5, channel_axes=(-1,)),
    "affine dsq": activations(LsqQuantizer, 4, 30, backward="dsq", strength=0.2),
    "lsqplus": activations(LsqPlusQuantizer, 4, 30),
    "lsqplus2": activations(LsqPlusQuantizer, 2, 30),
    "lsqplus ewgs": activations(LsqPlusQuantizer, 3, 30, backward="ewgs", strength=0.2),
    "pact": activations(PactQuantizer, 4, 30),
    "pact dsq": activations(PactQuantizer, 2, 30, backward="dsq", l2=0.01),
}
every_case = pytest.mark.parametrize("name", CASES)
# Compiling takes seconds.
COMPILED = ("depthwise", "ewgs", "dsq", "channels", "lsqplus", "pact")
every_way = pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "eager") for name in CASES),
        *((name, "xla") for name in COMPILED),
        *((name, "graph") for name in ("weights", "affine")),
    ],
)
AFFINE = [name for name, case in CASES.items() if not case.symmetric]
PLUS = [name for name, case in CASES.items() if case.make is LsqPlusQuantizer]


def range_of(x, axes, share=1.0):
    """(minimum, maximum) of the middle `share` of x, shaped as the quantizer's range."""
    shared = None if axes is None else shared_axes(x.ndim, axes)
    low, high = x.min(shared, keepdims=axes is not None), x.max(shared, keepdims=axes is not None)
    return F32(low * share), F32(high * share)


def moved(case, *, share=0.5):
    """(quantizer, variables, x): calibrated on half the range, then trained away from there."""
    x = sample(case.shape, spread=1.0)
    quantizer = case()
    made = build(quantizer, (None, *case.shape[1:]) if not case.symmetric else case.shape)
    assert quantizer.set_range(made, *range_of(x, case.axes, share))
    rng = np.random.default_rng(2)
    made["gain"].assign(rng.uniform(0.8, 1.3, made["gain"].shape))
    if "shift" in made:
        made["shift"].assign(-0.07)
    return quantizer, made, x


@functools.cache
def moved_and_called(name, mode):
    """(variables, x, upstream gradient, what the call gave), in training."""
    quantizer, made, x = moved(CASES[name])
    upstream = np.random.default_rng(1).normal(size=x.shape).astype(F32)
    return made, x, upstream, call(quantizer, x, made, mode=mode, upstream=upstream, training=True)


def step_of(made):
    """s, in float32 as training has it."""
    return made["unit"].numpy() * made["gain"].numpy()


def zero_point_of(case, made):
    if case.symmetric:
        return F32(0)
    start = made["zero_point"].numpy()
    if "shift" not in made:
        return start
    # β in float64, snapped to a code.
    qmin, qmax = case.codes
    unit, gain, shift = (made[key].numpy().astype(float) for key in ("unit", "gain", "shift"))
    beta = unit * (qmin - start + case.levels * shift)
    return F32(np.clip(np.rint(qmin - beta / (unit * gain)), qmin, qmax))


def twin(x, step, zero_point, codes):
    """One float32 rounding for each operation."""
    found = np.rint(x.astype(F32) / step) + zero_point
    return (np.clip(found, F32(codes[0]), F32(codes[1])) - zero_point) * step


def ends(step, zero_point, codes):
    return [(F32(code) - zero_point) * step for code in codes]


# ---------------------------------------------------------------------------------------------
# Serialization.


def test_configs_make_equal_quantizers():
    assert_serializable(CASES)


def test_configs_name_every_option():
    assert PactQuantizer(num_bits=3, l2=0.25, backward="ewgs").get_config() == {
        "num_bits": 3,
        "symmetric": False,
        "narrow_range": True,
        "channel_axes": None,
        "backward": "ewgs",
        "strength": 1e-3,
        "l2": 0.25,
    }
    assert "l2" not in LsqPlusQuantizer().get_config()


def test_methods_are_those_of_recipes():
    assert LsqQuantizer().method == LsqQuantizer(symmetric=True).method == "lsq"
    assert LsqQuantizer(backward="ewgs").method == "ewgs"
    assert LsqQuantizer(backward="dsq").method == "dsq"
    for backward in ("ste", "ewgs", "dsq"):
        assert LsqPlusQuantizer(backward=backward).method == "lsqplus"
        assert PactQuantizer(backward=backward).method == "pact"


def network(x):
    x = layers.Conv2D(3, 3, activation="relu", name="first")(x)
    x = layers.DepthwiseConv2D(3, activation="relu", name="middle")(x)
    return layers.Dense(2, name="logits")(layers.Flatten()(x))


IMAGE = (6, 6, 2)


def named(model):
    """[(name without the counters of Keras, value)]"""
    return [(v.name.split("/")[-1], v.numpy().tolist()) for v in model.weights]


def assert_same_model(model, restored):
    (x,) = small_models.data_for(model)
    assert named(model) == named(restored)
    np.testing.assert_array_equal(restored(x), model(x))
    kinds = [[v.name.split("/")[-1] for v in each.trainable_weights] for each in (model, restored)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ["w4a4-lsqplus", "w3a3-pact"])
def test_models_are_saved_bit_for_bit(name, tmp_path):
    eight_too = small_models.everywhere(name)
    model = small_models.quantized(small_models.model_of(network, IMAGE), eight_too)
    for index, variable in enumerate(model.trainable_variables):
        variable.assign(variable * (1 + 0.01 * index) + 0.001)  # no gain is 1, no shift 0
    names = " ".join(variable.name for variable in model.trainable_variables)
    assert names.count("kernel_gain") == 3 and "output_gain" in names
    assert ("output_shift" in names) == ("lsqplus" in name)
    qat.save_model(model, tmp_path / "model.keras", recipe=eight_too)
    assert_same_model(model, qat.load_quantized_model(tmp_path / "model.keras"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls the format legacy
        model.save(str(tmp_path / "model.h5"))
    with tfmot.quantization.keras.quantize_scope():
        restored = tf_keras.models.load_model(str(tmp_path / "model.h5"))
    assert_same_model(model, restored)


@pytest.mark.parametrize("freeze", ["never", "before", "after"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_weights_of_one_shape_are_not_mixed_up(freeze, use_bias, tmp_path):
    """Kernel [1, 1], its gain [1, 1]: files know them by their order alone, frozen or not."""
    inputs = tf_keras.Input((1,))
    layer = layers.Dense(1, use_bias=use_bias, trainable=freeze != "before", name="it")
    layer.build((None, 1))  # as quantize_apply does
    config = LayerQuantizeConfig(weights=TensorSpec(bits=4, method="lsq"))
    wrapper = KernelWrapper(layer, config)
    model = tf_keras.Model(inputs, wrapper(inputs))
    values = {"kernel:0": 3.0, "bias:0": 0.25, "kernel_gain:0": 0.5, "kernel_unit:0": 0.75}
    for variable in wrapper.weights:
        name = variable.name.split("/")[-1]
        if name in values:
            variable.assign(tf.fill(variable.shape, values[name]))
    wrapper.trainable = freeze == "never"
    recipe = qat.Recipe.from_name("w4a8")
    qat.save_model(model, tmp_path / "model.keras", recipe=recipe)
    restored = qat.load_quantized_model(tmp_path / "model.keras")
    assert_same_model(model, restored)
    assert [v.shape for v in restored.trainable_weights] == [
        v.shape for v in model.trainable_weights
    ]
    found = {v.name.split("/")[-1]: float(np.ravel(v)[0]) for v in restored.weights}
    assert {name: found[name] for name in values if name in found} == {
        name: value for name, value in values.items() if use_bias or name != "bias:0"
    }


# ---------------------------------------------------------------------------------------------
# Values.


@every_way
def test_values_equal_the_twin(name, mode):
    case = CASES[name]
    made, x, _, called = moved_and_called(name, mode)
    step, zero_point = step_of(made), zero_point_of(case, made)
    expected = twin(x, step, zero_point, case.codes)
    if mode == "xla":  # may divide by way of the reciprocal: other levels at ties alone
        fraction = np.abs(x / step - np.floor(x / step) - 0.5)
        off = np.abs(called.y - expected) > 4 * np.spacing(np.abs(expected))
        assert not off[fraction > 1e-4].any()
    else:
        np.testing.assert_array_equal(called.scale, step)
        np.testing.assert_array_equal(called.y, expected)
        np.testing.assert_array_equal(called.y, (called.codes - zero_point) * step)
    qmin, qmax = case.codes
    assert called.codes.min() == qmin and called.codes.max() == qmax
    assert len(np.unique(called.codes)) <= qmax - qmin + 1


@every_case
def test_the_grid_is_that_of_the_codes(name):
    case = CASES[name]
    quantizer, made, _ = moved(case)
    grid = quantizer.grid(made)  # what the exporter asks, without the tensor
    assert (grid.qmin, grid.qmax) == case.codes == quantizer.codes_range
    np.testing.assert_array_equal(grid.scale, step_of(made))
    np.testing.assert_array_equal(grid.zero_point, zero_point_of(case, made))
    low, high = quantizer.range(made, None)
    expected = ends(step_of(made), zero_point_of(case, made), case.codes)
    np.testing.assert_array_equal(low, expected[0])
    np.testing.assert_array_equal(high, expected[1])


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@pytest.mark.parametrize("name", ["weights", "affine", "lsqplus", "pact dsq"])
def test_mixed_precision_keeps_its_grid_in_float32(name, dtype):
    quantizer, made, x = moved(CASES[name])
    upstream = tf.cast(np.random.default_rng(1).normal(size=x.shape), dtype)
    x = tf.cast(x, dtype)
    called = call(quantizer, x, made, upstream=upstream)
    wide = call(quantizer, tf.cast(x, tf.float32), made, upstream=tf.cast(upstream, tf.float32))
    assert called.scale.dtype == F32 and called.codes.dtype == F32
    np.testing.assert_array_equal(called.scale, wide.scale)
    np.testing.assert_array_equal(called.codes, wide.codes)
    np.testing.assert_array_equal(called.y, tf.cast(wide.y, dtype))
    np.testing.assert_array_equal(called.dx, tf.cast(wide.dx, dtype))
    for key, gradient in called.gradients.items():
        assert gradient.dtype == F32
        np.testing.assert_array_equal(gradient, wide.gradients[key])


def test_under_a_16_bit_policy():
    layer = FakeQuantize(
        LsqPlusQuantizer(), dtype=tf_keras.mixed_precision.Policy("mixed_bfloat16")
    )
    x = sample((8, 6))
    y = layer(x, training=True)
    assert y.dtype == tf.bfloat16
    assert {v.dtype for v in layer.weights} == {tf.float32}
    expected = FakeQuantize(LsqPlusQuantizer())(tf.cast(tf.cast(x, tf.bfloat16), tf.float32), True)
    np.testing.assert_array_equal(y, tf.cast(expected, tf.bfloat16))


# ---------------------------------------------------------------------------------------------
# Gradients.


def slope(case, upstream, v):
    """What is inside of the grid gets of its upstream gradient, in float64."""
    rule = case.options.get("backward", "ste")
    strength = case.options.get("strength", 0.4)
    if rule == "ewgs":
        steps = case.codes[1] - case.codes[0]
        return 1 + strength * np.sign(upstream) * (v - np.rint(v)) / steps
    if rule == "dsq":
        k = np.log(2 / strength - 1)
        return 0.5 * k / (1 - strength) / np.cosh(k * (v - np.floor(v) - 0.5)) ** 2
    return np.ones_like(v)


def by_step(case, v, below, above, zero_point):
    """dy/ds of every element, as each paper derives it."""
    qmin, qmax = case.codes
    if case.make is PactQuantizer:  # y = n·s above, where s = α/n; nothing else counts
        return np.where(above, case.levels, 0.0)
    inside = np.rint(v) - v
    if case.make is LsqPlusQuantizer:  # y = β below, β + n·s above
        return np.where(below, 0.0, np.where(above, case.levels, inside))
    return np.where(below, qmin - zero_point, np.where(above, qmax - zero_point, inside))


@every_way
def test_gradients_equal_the_equations(name, mode):
    case = CASES[name]
    made, x, upstream, called = moved_and_called(name, mode)
    step, zero_point = step_of(made), zero_point_of(case, made)
    low, high = ends(step, zero_point, case.codes)
    below, above = x < low, x > high
    g, v = upstream.astype(float), x.astype(float) / step
    # Both kinds occur, but for the lower end of what a ReLU gives.
    assert above.mean() > 0.05 and (~above & ~below).mean() > 0.2
    # v is known to half an ulp; DSQ's slope changes by up to k² < 9 times as much.
    expected = g * slope(case, g, v) * ~(below | above)
    np.testing.assert_allclose(called.dx, expected, rtol=2e-4, atol=1e-5)
    # κ of the chain rule's first link, and unit of its second: s = unit·gain.
    kappa = 1.0 if case.make is PactQuantizer else 1 / np.sqrt(case.shared * case.levels)
    chain = kappa * made["unit"].numpy().astype(float)
    axes = shared_axes(x.ndim, case.axes)
    terms = g * by_step(case, v, below, above, zero_point)
    keepdims = case.axes is not None
    expected = chain * terms.sum(axes, keepdims=keepdims)
    # A float32 sum; each term is known to 2^-24·|v|.
    size = chain * (np.abs(terms) + np.abs(g * v)).sum(axes, keepdims=keepdims)
    assert called.gradients["gain"].shape == made["gain"].shape == expected.shape
    assert (np.abs(called.gradients["gain"] - expected) <= 1e-6 * size).all()
    assert (np.abs(expected) > 1e-4 * size).any()  # something to be wrong about
    if case.make is LsqPlusQuantizer:  # β = unit·(… + n·shift)
        expected = chain * case.levels * (g * (below | above)).sum()
        assert called.gradients["shift"] == pytest.approx(expected, rel=1e-4)
    assert set(called.gradients) == {"gain", "shift"} & set(made)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_n_of_activations_is_that_of_one_example(batch):
    """The mean over a batch already shares the gradient out among its examples."""
    one = sample((1, 5, 6), spread=3.0)
    x = np.repeat(one, batch, 0)
    for make in (LsqQuantizer, LsqPlusQuantizer, PactQuantizer):
        gradients = []
        for given in (one, x):
            quantizer = make()
            made = build(quantizer, (None, 5, 6))
            quantizer.set_range(made, F32(-1), F32(1))
            upstream = np.full(given.shape, 1 / len(given), F32)
            gradients.append(call(quantizer, given, made, upstream=upstream).gradients)
        for key, gradient in gradients[0].items():
            assert gradients[1][key] == pytest.approx(gradient, rel=1e-5)
            assert gradient != 0 or make is not LsqQuantizer


@pytest.mark.parametrize("name", PLUS)
def test_the_offset_moves_both_ends(name):
    """Central differences: where x saturates, y is an end of the grid, and β moves it."""
    quantizer, made, _ = moved(CASES[name])
    ends_of = tf.constant([[[-1e3], [1e3]]])
    # One step of the grid: the offset snaps to whole codes, so a smaller one might change nothing.
    one_code = float(step_of(made) / made["unit"].numpy()) / CASES[name].levels
    before = quantizer(ends_of, False, made).numpy()
    made["shift"].assign_add(one_code)
    after = quantizer(ends_of, False, made).numpy()
    np.testing.assert_allclose(after - before, step_of(made), rtol=1e-5)
    # And the gradient says the same, without κ: dy/dshift = unit·n for each of both.
    called = call(quantizer, ends_of, made)
    kappa = 1 / np.sqrt(CASES[name].shared * CASES[name].levels)
    expected = 2 * kappa * made["unit"].numpy() * CASES[name].levels
    assert called.gradients["shift"] == pytest.approx(expected, rel=1e-5)


def test_steps_learn():
    """Gradient descent on the squared error finds the step that a search finds."""
    x = sample((3, 3, 16, 4), spread=1.0)
    quantizer = LsqQuantizer(num_bits=3, symmetric=True, channel_axes=(-1,))
    made = build(quantizer, x.shape)
    quantizer.set_range(made, *range_of(x, (-1,)))

    def errors(steps):
        y = twin(x, F32(steps), F32(0), (-3, 3))
        return np.square(y - x).mean((0, 1, 2))

    steps = step_of(made) * np.linspace(0.2, 1.2, 200)[:, None, None, None, None]
    best = np.min([errors(step) for step in steps], 0)
    optimizer = tf_keras.optimizers.Adam(0.01)

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(quantizer(x, True, made) - x))
        optimizer.minimize(loss, [made["gain"]], tape)

    before = errors(step_of(made))
    for _ in range(150):
        train()
    after = errors(step_of(made))
    assert (before > 1.3 * best).all()
    assert (after < 1.05 * best).all()


@pytest.mark.parametrize("name", ["weights", "affine", "lsqplus", "pact"])
@pytest.mark.parametrize("gain", [0.0, -3.0, 1e-6])
def test_a_gain_below_zero_finds_its_way_back(name, gain):
    """A large step of the optimizer must not kill the quantizer."""
    quantizer, made, x = moved(CASES[name])
    made["gain"].assign(tf.fill(made["gain"].shape, gain))
    called = call(quantizer, x, made, training=True, upstream=-np.sign(x))
    assert (called.scale > 0).all() and np.isfinite(called.y).all()
    # Larger outputs are asked for, so descent raises the gain.
    assert (called.gradients["gain"] < 0).all()


# ---------------------------------------------------------------------------------------------
# Before and after calibration.


def first_step(case, x):
    """s of the first batch, and its zero point."""
    if case.make is PactQuantizer:
        return F32(6 / case.levels), F32(case.codes[0])
    axes = shared_axes(x.ndim, case.axes)
    keepdims = case.axes is not None
    mean = np.abs(x.astype(float)).mean(axes, keepdims=keepdims)
    step = F32(2 * mean / np.sqrt(case.levels))
    if case.symmetric:
        return step, F32(0)
    below_zero = x.min(axes, keepdims=keepdims) < 0
    middle = case.codes[0] + (case.levels + 1) // 2
    return step, np.where(below_zero, F32(middle), F32(case.codes[0]))


def snapshot(made):
    return {key: variable.numpy().tolist() for key, variable in made.items()}


STARTS = [
    *((name, positive, "eager") for name in CASES for positive in (False, True)),
    ("weights", False, "graph"),
    ("lsqplus", False, "xla"),
]


@pytest.mark.parametrize(("name", "positive", "mode"), STARTS)
def test_the_step_follows_the_tensor_until_training_keeps_it(name, positive, mode):
    case = CASES[name]
    x = np.abs(sample(case.shape)) if positive else sample(case.shape)
    quantizer = case()
    made = build(quantizer, case.shape)
    fresh = snapshot(made)
    step, zero_point = first_step(case, x)
    tight = {"rtol": 1e-5, "atol": 0}
    # 1. In inference it follows, and nothing is kept.
    before = call(quantizer, x, made, mode=mode)
    np.testing.assert_allclose(before.scale, step, **tight)
    assert snapshot(made) == fresh
    np.testing.assert_allclose(
        call(quantizer, 2 * x, made).scale, first_step(case, 2 * x)[0], **tight
    )
    # 2. The first step of training gives the same, and keeps it.
    started = call(quantizer, x, made, mode=mode, training=True)
    np.testing.assert_allclose(started.y, before.y, **tight)
    np.testing.assert_array_equal(started.codes, before.codes)
    np.testing.assert_allclose(made["unit"], step, **tight)
    assert (made["gain"].numpy() == 1).all()
    if not case.symmetric:
        np.testing.assert_array_equal(made["zero_point"], zero_point)
    # 3. From then on other data change nothing, and the grid needs no data.
    kept = snapshot(made)
    call(quantizer, 5 * x - 1, made, mode=mode, training=True)
    assert snapshot(made) == kept
    grid = quantizer.grid(made)
    np.testing.assert_array_equal(grid.zero_point, zero_point)
    np.testing.assert_array_equal(grid.scale, step_of(made))


@every_case
def test_before_any_data_there_is_no_grid_to_export(name):
    quantizer = CASES[name]()
    made = build(quantizer, CASES[name].shape)
    with pytest.raises(ValueError, match="no step was set yet.*calibrate") as error:
        quantizer.grid(made)
    assert "\n" not in str(error.value)


@every_case
def test_a_range_that_is_set_is_covered(name):
    case = CASES[name]
    quantizer, made, x = moved(case)  # trained elsewhere before: that is forgotten
    low, high = range_of(x, case.axes, 0.9)
    assert quantizer.set_range(made, low, high) is True
    assert (made["gain"].numpy() == 1).all()
    qmin, qmax = case.codes
    if case.symmetric:
        step, zero_point = np.maximum(-low, high) / F32(qmax), 0
    elif case.make is PactQuantizer:
        step, zero_point = high / F32(case.levels), qmin
    else:
        step = (high - low) / F32(case.levels)
        zero_point = np.rint(qmin - low / step)
    grid = quantizer.grid(made)
    np.testing.assert_array_equal(grid.scale, step)
    np.testing.assert_array_equal(grid.zero_point, np.broadcast_to(zero_point, made["unit"].shape))
    # Training goes on from there and does not start anew.
    kept = snapshot(made)
    quantizer(tf.constant(9 * x), True, made)
    assert snapshot(made) == kept


def test_pact_ignores_what_is_below_zero():
    quantizer = PactQuantizer(num_bits=2)
    made = build(quantizer, (None, 3))
    quantizer.set_range(made, F32(-50.0), F32(3.0))
    grid = quantizer.grid(made)
    assert (float(grid.scale), float(grid.zero_point)) == (1.0, 124.0)
    y = quantizer(tf.constant([-5.0, 0.4, 1.6, 2.9, 9.0]), False, made)
    np.testing.assert_array_equal(y, [0, 0, 2, 3, 3])


def test_what_lies_at_alpha_counts_as_clipped():
    """Half of what a ReLU6 gives is 6, where calibration puts α: it could not move down."""
    quantizer = PactQuantizer(num_bits=4)
    made = build(quantizer, (None, 4))
    assert quantizer.set_range(made, F32(0.0), F32(6.0))
    x = np.array([[0.0, 3.0, 6.0, 6.0]], F32)
    upstream = np.array([[1.0, 2.0, 4.0, 8.0]], F32)
    called = call(quantizer, x, made, upstream=upstream, training=True)
    np.testing.assert_array_equal(called.dx, [[1, 2, 0, 0]])
    # dα = 12; α = 6·gain.
    assert float(called.gradients["gain"]) == pytest.approx(6 * 12)


@pytest.mark.parametrize("name", ["affine", "channels", "lsqplus", "lsqplus2", "pact"])
def test_what_was_zero_in_calibration_starts_later(name):
    case = CASES[name]
    quantizer, x = case(), 50 * sample(case.shape)
    made = build(quantizer, (None, *case.shape[1:]))
    assert quantizer.set_range(made, *range_of(0 * x, case.axes))
    for training in (False, True):  # zeros are no news, and the file has the grid of [0, 1]
        assert not np.any(quantizer(tf.constant(0 * x), training, made))
        grid = quantizer.grid(made)
        np.testing.assert_array_equal(grid.lowest, np.zeros(made["unit"].shape))
        highest = 6 if training and case.make is PactQuantizer else 1
        np.testing.assert_allclose(grid.highest, np.full(made["unit"].shape, highest), rtol=1e-6)
    quantizer(tf.constant(x), True, made)
    step, zero_point = first_step(case, x)
    np.testing.assert_allclose(made["unit"], np.reshape(step, made["unit"].shape), rtol=1e-5)
    np.testing.assert_array_equal(made["zero_point"], zero_point)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "eager") for name in ("weights", "depthwise", "tensor", "affine", "channels")),
        ("lsqplus", "graph"),
        ("weights", "xla"),
    ],
)
def test_what_was_zero_at_the_start_starts_later(name, mode):
    """A channel of zeros has no step; one that it kept of nothing could never grow."""
    case = CASES[name]
    x = sample(case.shape)
    zero = x.copy()
    zero[..., 1 if case.axes is not None else slice(None)] = 0
    quantizer = case()
    made = build(quantizer, case.shape)
    called = call(quantizer, zero, made, mode=mode, training=True)
    assert (called.y[zero == 0] == 0).all()
    assert np.isfinite(called.dx).all() and (called.dx[zero == 0] == 1).all()
    assert all(np.isfinite(gradient).all() for gradient in called.gradients.values())
    empty = made["unit"].numpy() <= SMALLEST_SCALE
    assert empty.any() and empty.all() == (case.axes is None)
    assert (quantizer.grid(made).scale.numpy() >= SMALLEST_SCALE).all()  # it can be exported
    others = made["unit"].numpy()[~empty]
    # Once the optimizer has moved the zeros, their step is found, and the others keep theirs.
    called = call(quantizer, 2 * x, made, mode=mode, training=True)
    step, zero_point = first_step(case, 2 * x)
    found = made["unit"].numpy()
    np.testing.assert_allclose(found[empty], np.broadcast_to(step, found.shape)[empty], rtol=1e-5)
    np.testing.assert_array_equal(found[~empty], others)
    if not case.symmetric:
        np.testing.assert_array_equal(made["zero_point"], zero_point)
    assert called.y[zero == 0].any()


@pytest.mark.parametrize("name", ["weights", "wide", "tensor", "channels", "lsqplus", "pact dsq"])
@pytest.mark.parametrize("value", [0.0, -0.3, 1e-20, 3e4])
def test_constant_tensors(name, value):
    case = CASES[name]
    x = np.full(case.shape, value, F32)
    quantizer = case()
    made = build(quantizer, case.shape)
    called = call(quantizer, x, made, training=True)
    assert np.isfinite(called.y).all() and np.isfinite(called.dx).all()
    assert (called.scale >= SMALLEST_SCALE).all() and len(np.unique(called.y)) == 1
    # The nearest level, if there is one on that side of zero.
    low, high = ends(called.scale, quantizer.grid(made).zero_point.numpy(), case.codes)
    error = np.abs(called.y - np.clip(x, low, high))
    assert (error <= 0.5001 * called.scale).all()


def test_a_nan_shows():
    quantizer = LsqQuantizer()
    made = build(quantizer, (None, 3))
    x = np.array([[1.0, np.nan, -2.0]], F32)
    assert np.isnan(call(quantizer, x, made, training=True).y).any()
    # The step is not found anew as if nothing had happened.
    call(quantizer, np.ones((1, 3), F32), made, training=True)
    assert np.isnan(quantizer.grid(made).scale)


# ---------------------------------------------------------------------------------------------
# LSQ+ and PACT.


@pytest.mark.parametrize("name", PLUS)
@pytest.mark.parametrize("shift", [-40.0, -1.3, -0.5, -0.123, 0.0, 0.04, 0.3, 7.0])
@pytest.mark.parametrize("gain", [0.3, 1.0, 2.5])
def test_zero_is_a_code_wherever_the_offset_goes(name, shift, gain):
    quantizer, made, _ = moved(CASES[name])
    made["shift"].assign(shift)
    made["gain"].assign(gain)
    grid = quantizer.grid(made)
    qmin, qmax = CASES[name].codes
    zero_point = float(grid.zero_point)
    assert qmin <= zero_point <= qmax and zero_point == round(zero_point)
    assert float(quantizer(tf.constant(0.0), False, made)) == 0.0
    # z = round(qmin - β/s), β as the class says.
    assert zero_point == zero_point_of(CASES[name], made)


def test_an_offset_that_left_the_grid_comes_back():
    """β above zero means z below qmin: clipped, and its gradient goes on."""
    quantizer, made, x = moved(CASES["lsqplus"])
    made["shift"].assign(5.0)
    called = call(quantizer, x, made, upstream=np.ones_like(x))
    assert called.gradients["shift"] > 0  # outputs above zero are too large: descent lowers β


def test_l2_reaches_the_models_losses():
    inputs = tf_keras.Input((4,))
    layer = FakeQuantize(PactQuantizer(num_bits=4, l2=0.3))
    model = tf_keras.Model(inputs, layer(inputs))
    made = layer.quantizer_weights
    assert float(tf.add_n(model.losses)) == 0.0  # no α yet
    layer.quantizer.set_range(made, F32(0.0), F32(5.0))
    made["gain"].assign(1.2)
    assert float(tf.add_n(model.losses)) == pytest.approx(0.3 * 6.0**2, rel=1e-6)  # α = 5·1.2
    with tf.GradientTape() as tape:
        loss = tf.add_n(model.losses)
    expected = 0.3 * 2 * 6.0 * 5.0
    assert float(tape.gradient(loss, made["gain"])) == pytest.approx(expected, rel=1e-6)
    # α at twice the width is the same, with its levels and its step.
    layer.quantizer.num_bits = 8
    made["unit"].assign(made["unit"] * 15 / 255)
    assert float(tf.add_n(model.losses)) == pytest.approx(0.3 * 6.0**2, rel=1e-6)
    layer.quantizer.num_bits = 4
    made["unit"].assign(made["unit"] * 255 / 15)
    # Fitted to data that are never clipped, l2 alone moves α.
    model.compile(tf_keras.optimizers.SGD(1e-3), "mse")
    model.fit(np.ones((8, 4), F32), np.ones((8, 4), F32), verbose=0)
    assert float(made["gain"]) == pytest.approx(1.2 - 1e-3 * expected, rel=1e-5)


def test_without_l2_there_is_no_loss():
    layer = FakeQuantize(PactQuantizer(num_bits=4))
    layer(tf.ones([1, 4]))
    assert layer.losses == []


# ---------------------------------------------------------------------------------------------
# In layers and models.


@pytest.mark.parametrize("freeze", ["before", "after"])
def test_frozen_layers_train_no_gain(freeze):
    layer = layers.Dense(3, trainable=freeze != "before", name="it")
    config = LayerQuantizeConfig(weights=TensorSpec(bits=4, method="lsq"))
    wrapper = KernelWrapper(layer, config)
    quantizer = FakeQuantize(LsqPlusQuantizer(), trainable=freeze != "before")
    inputs = tf_keras.Input((4,))
    model = tf_keras.Model(inputs, quantizer(wrapper(inputs)))
    if freeze == "after":
        names = [v.name.split("/")[-1] for v in model.trainable_variables]
        assert names == ["kernel:0", "bias:0", "kernel_gain:0", "output_gain:0", "output_shift:0"]
        wrapper.trainable = quantizer.trainable = False
    assert model.trainable_variables == []
    names = [v.name.split("/")[-1] for v in model.non_trainable_variables]
    assert names[:3] == ["kernel:0", "bias:0", "kernel_gain:0"]
    assert {"output_gain:0", "output_shift:0"} < set(names)


def chain(x):
    for name in ("first", "middle", "last"):
        x = layers.Dense(4, activation="relu", name=name)(x)
    return x


def fit_and_check(model, **options):
    """Every gain and shift moves in two steps of training; returns the units."""
    learned = [v for v in model.trainable_variables if "gain" in v.name or "shift" in v.name]
    assert len(learned) >= 2
    before = [v.numpy() for v in learned]
    (x,) = small_models.data_for(model)
    model.compile("adam", "mse", **options)
    model.fit(5 * x, np.ones((len(x), 4), F32), batch_size=len(x) // 2, verbose=0)
    still = [v.name for v, value in zip(learned, before, strict=True) if (v == value).numpy().all()]
    assert still == []
    assert np.isfinite(model(x)).all()
    return [v.numpy() for v in model.weights if v.name.endswith("_unit:0")]


@pytest.mark.slow
def test_every_learned_variable_trains_in_a_compiled_model():
    model = small_models.quantized(small_models.model_of(chain, (6,)), "w3a3-lsqplus")
    fit_and_check(model, jit_compile=True)


@pytest.mark.slow
def test_under_a_distribution_strategy():
    """Not calibrated: a replica starts the steps, and no replica can average in a condition."""
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = qat.quantize_model(small_models.model_of(chain, (6,)), "w3a3-lsq")
    units = fit_and_check(model)
    assert len(units) >= 2 and all((unit > 0).all() for unit in units)


TWO_REPLICAS = """
import numpy as np
import tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import tf_keras
from qat.layers import FakeQuantize
from qat.quantizers import LsqPlusQuantizer

x = np.concatenate([np.full((4, 1), -2.0), np.full((4, 1), 6.0)]).astype("float32")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    layer = FakeQuantize(LsqPlusQuantizer(num_bits=4))
    inputs = tf_keras.Input((1,))
    model = tf_keras.Model(inputs, layer(inputs))
    model.compile(tf_keras.optimizers.SGD(0.0), "mse")
for _ in range(3):
    model.fit(x, x, batch_size=8, verbose=0, shuffle=False)
    print({name: variable.numpy().tolist() for name, variable in layer.quantizer_weights.items()})
print(float(layer.quantizer.grid(layer.quantizer_weights).zero_point))
"""


@pytest.mark.slow
def test_replicas_agree_on_the_first_step():
    """One sees -2 alone (a zero point in the middle), one 6 alone; the averages stay a grid."""
    made = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS], capture_output=True, text=True, check=True
    )
    *steps, zero_point = made.stdout.splitlines()
    first = ast.literal_eval(steps[0])
    assert first["unit"] == pytest.approx((2 * 2 + 2 * 6) / 2 / np.sqrt(15), rel=1e-6)
    assert first["zero_point"] == (120 + 112) / 2 == 116 and float(zero_point) == 116
    assert steps == steps[:1] * 3


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *(
            (make, {"num_bits": bits}, f"{make.__name__} takes 2 to 8 bits, got {bits!r}")
            for make in (LsqQuantizer, LsqPlusQuantizer, PactQuantizer)
            for bits in (0, 1, 9, 16, "4", None)
        ),
        (LsqQuantizer, {"num_bits": 16, "symmetric": True}, "takes 2 to 8 bits, got 16"),
        (LsqQuantizer, {"backward": "stairs"}, "unknown backward 'stairs'"),
        (LsqQuantizer, {"backward": "dsq", "strength": 0.9}, "takes no strength 0.9"),
        (LsqPlusQuantizer, {"symmetric": True}, "has an offset: for activations, per tensor"),
        (LsqPlusQuantizer, {"channel_axes": (-1,)}, "for activations, per tensor"),
        (PactQuantizer, {"symmetric": True}, "clips at zero: for activations, per tensor"),
        (PactQuantizer, {"channel_axes": (-1,)}, "for activations, per tensor"),
        *((PactQuantizer, {"l2": l2}, "l2 must be") for l2 in (-1, float("nan"), float("inf"))),
    ],
)
def test_illegal_options(make, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)
