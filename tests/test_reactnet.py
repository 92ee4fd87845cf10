"""ReActNet's RSign and RPReLU: their equations, where they go, and that files hold them exactly."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from single_operator import reference
from small_models import KERNELS, data_for, layers, model_of, quantized, run_file

import qat
from qat.canonical import calls, rebuild
from qat.errors import QatError
from qat.integers import integer_mismatches
from qat.layers import FakeQuantize, ReplacedBySign
from qat.reactnet import LearnedShift, LearnedSlope, RSignQuantizer
from qat.tflite_file import read_file
from qat.verify.integer import Simulator

RECIPE = "w1a1-reactnet"
PARAMETERS = ("output_bias", "slope", "shift")


def conv_norm(x, filters: int, name: str):
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
    return layers.BatchNormalization(name=f"{name}_norm")(x)


def network(x):
    """RPReLUs read by: a pooling, a shortcut, signs alone behind a sum, signs of a vector."""
    x = layers.ReLU(name="pooled")(conv_norm(x, 6, "first"))
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.ReLU(name="shared")(conv_norm(x, 6, "second"))
    x = layers.Add(name="sum")([x, conv_norm(x, 6, "third")])
    y = layers.ReLU(name="beside")(x)  # as in models/birealnet: the sum has a shortcut too
    x = layers.Add(name="next_sum")([x, conv_norm(y, 6, "fourth")])
    x = layers.Flatten(name="flat")(layers.ReLU(name="behind")(x))
    x = layers.ReLU(name="last")(layers.Dense(6, name="dense")(x))
    return layers.Dense(4, name="logits")(x)


RPRELUS = ("pooled", "shared", "beside", "behind")
SIGNS = ("second", "third", "fourth", "dense")


def parameter(layer) -> list[tf.Variable]:
    """The RSign bias, RPReLU slope or shift of a layer, as a list of one or none."""
    return [w for w in layer.weights if w.name.split(":")[0].split("/")[-1] in PARAMETERS]


@pytest.fixture(scope="module")
def model():
    """After a few steps on random labels, its parameters spread farther than those would."""
    model = quantized(model_of(network, (8, 8, 3)), RECIPE)
    (x,) = data_for(model, 16)
    rng = np.random.default_rng(0)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    y = rng.integers(0, 4, 16)
    optimizer = tf_keras.optimizers.Adam(0.01)
    start = {w.name: w.numpy() for layer in model.layers for w in parameter(layer)}
    for _ in range(3):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(value, variables), variables, strict=True))
    for layer in model.layers:
        for weight in parameter(layer):
            assert not np.array_equal(weight.numpy(), start[weight.name]), "it did not train"
            weight.assign_add(rng.normal(0, 0.3, weight.shape))
    return qat.settle_biases(model)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """Of the model's file."""
    return qat.export_tflite(model, tmp_path_factory.mktemp("reactnet") / "model.tflite")


# The equations.

MODES = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_rsign_equals_its_equation(mode):
    """Forward ±1 with ties at +1; backward g·(2 - 2·|x + b|)+, summed per channel for b."""
    rng = np.random.default_rng(0)
    step = np.float32(0.037)
    x = (rng.integers(-60, 60, (4, 5, 5, 7)) * step).astype(np.float32)
    bias = rng.normal(0, 0.5, 7).astype(np.float32)
    bias[:3] = -x[0, 0, 0, :3]  # a tie
    layer = FakeQuantize(RSignQuantizer(), name="sign")
    layer(x)
    layer.weights[0].assign(bias)
    g = rng.normal(size=x.shape).astype(np.float32)

    def run(x, g):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, *tape.gradient(y, [x, layer.weights[0]], g)

    y, dx, db = MODES[mode](run)(tf.constant(x), tf.constant(g))
    np.testing.assert_array_equal(y, np.where(x >= -bias, 1, -1))
    np.testing.assert_array_equal(y[0, 0, 0, :3], [1, 1, 1])
    slope = g.astype(float) * np.maximum(2 - 2 * np.abs(x.astype(float) + bias), 0)
    np.testing.assert_allclose(dx, slope, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(db, slope.sum((0, 1, 2)), rtol=1e-5, atol=1e-4)
    codes = layer.quantizer.codes(tf.constant(x), layer.quantizer_weights)
    np.testing.assert_array_equal(codes, 127 * np.where(x >= -bias, 1, -1))


def test_slope_equals_its_equation():
    """PReLU with `round(a / s)·s`, s = max|a| / 127; gradients straight through the rounding."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (3, 4, 4, 5)).astype(np.float32)
    layer = LearnedSlope("ReLU")
    layer(x)
    np.testing.assert_array_equal(layer.slope, np.full(5, 0.25, np.float32))
    a = np.float32([0.25, -0.1, 0.031, 1.3, 0.0])
    layer.slope.assign(a)
    scale = np.float32(1.3) / np.float32(127)
    on_grid = np.rint(a / scale) * scale
    g = rng.normal(size=x.shape).astype(np.float32)
    with tf.GradientTape() as tape:
        t = tf.constant(x)
        tape.watch(t)
        y = layer(t)
    dx, da = tape.gradient(y, [t, layer.slope], tf.constant(g))
    np.testing.assert_allclose(y, np.where(x >= 0, x, on_grid * x), rtol=1e-6)
    np.testing.assert_allclose(dx, np.where(x >= 0, g, on_grid * g), rtol=1e-6)
    expected = np.where(x < 0, g.astype(float) * x, 0).sum((0, 1, 2))
    np.testing.assert_allclose(da, expected, rtol=1e-5, atol=1e-5)


def test_shift_starts_at_zero_and_adds():
    x = np.random.default_rng(2).normal(size=(2, 3, 4)).astype(np.float32)
    layer = LearnedShift()
    np.testing.assert_array_equal(layer(x), x)
    layer.shift.assign([1.0, -2.0, 0.0, 0.5])
    np.testing.assert_array_equal(layer(x), x + np.float32([1, -2, 0, 0.5]))


def test_quantizer_serializes():
    quantizer = RSignQuantizer(surrogate="swish", beta=4.0)
    config = tf_keras.utils.legacy.serialize_keras_object(quantizer)
    assert tf_keras.utils.legacy.deserialize_keras_object(config) == quantizer != RSignQuantizer()


# Where they go.


def inserted(model, kind) -> set[str]:
    return {layer.name for layer in model.layers if isinstance(layer, kind)}


def test_rprelu_takes_the_place_of_the_relus_in_front_of_signs(model):
    """The last ReLU feeds 8-bit logits and stays."""
    assert inserted(model, LearnedSlope) == set(RPRELUS)
    assert inserted(model, layers.ReLU) == {"last"} and not inserted(model, ReplacedBySign)
    signs = [
        la for la in model.layers if isinstance(getattr(la, "quantizer", None), RSignQuantizer)
    ]
    assert len(signs) == len(SIGNS)


def test_a_shift_is_made_where_no_neighbour_is_one(model):
    """b2 where a shortcut reads the RPReLU; b1 behind a sum that is read beside it too."""
    assert inserted(model, LearnedShift) == {"shared_shift_out", "beside_shift_in"}


def test_without_a_bias_in_front_there_is_a_shift():
    def no_bias(x):
        x = layers.Conv2D(4, 3, use_bias=False, name="first")(x)
        x = layers.Conv2D(4, 3, name="second")(layers.ReLU(name="relu")(x))
        return layers.Dense(2, name="logits")(layers.Flatten()(x))

    model = qat.quantize_model(model_of(no_bias, (8, 8, 3)), RECIPE)
    assert inserted(model, LearnedShift) == {"relu_shift_in"}


def test_other_binary_methods_have_none_of_it():
    model = qat.quantize_model(model_of(network, (8, 8, 3)), "w1a1")
    assert inserted(model, ReplacedBySign) == set(RPRELUS)
    assert not inserted(model, (LearnedShift, LearnedSlope))
    assert not [w for layer in model.layers for w in parameter(layer)]


def test_the_account_names_the_method(model):
    rows = {row.name: row for row in qat.quantization_report(model)}
    users = model_of(network, (8, 8, 3)).layers[1:]
    assert sorted(rows) == sorted(layer.name for layer in users)
    for name in RPRELUS:
        row = rows[name]
        assert (row.type, row.method, row.activation_bits) == ("ReLU", "reactnet", 8)
    for name in SIGNS:
        row = rows[name]
        assert (row.method, row.weight_bits, row.activation_bits) == ("reactnet", 1, 1)
    assert {rows[name].method for name in ("first", "logits", "sum")} == {"minmax"}


# What the file holds.


def test_the_file_is_integer_and_the_model_s(model, path):
    file = read_file(path)
    assert file.float_operators() == [] and integer_mismatches(model, file) == []
    counts = file.operator_counts()
    assert counts["PRELU"] == len(RPRELUS)
    assert counts["GREATER_EQUAL"] == counts["SELECT_V2"] == len(SIGNS)
    assert counts["DEPTHWISE_CONV_2D"] == 2  # the shifts


def test_the_simulator_equals_the_reference_kernels(model, path):
    simulator = Simulator(path)
    for example in data_for(model, 3)[0]:
        theirs = reference(path.read_bytes(), example[None], every_tensor=True)
        for name, codes in simulator.tensors(example[None]).items():
            np.testing.assert_array_equal(codes, theirs[name], err_msg=name)


def test_each_operator_of_the_file_is_the_model_s_to_one_step(model, path):
    """Every quantizer's input computed by Keras from the file's own values; signs are equal."""
    (x,) = data_for(model, 8)
    exact = qat.ExactModel(model)
    values = exact._exact_values([x])
    known = {id(c.output): tf_keras.Input(c.output.shape[1:]) for c in exact._quantizes}
    simulated = []

    def visit(call, args, kwargs):
        output = call.layer(*args, **kwargs)
        if id(call.output) in known:
            simulated.append(output)
            return known[id(call.output)]
        return output

    twin = rebuild(model, visit, more_inputs=list(known.values()))
    probe = tf_keras.Model(twin.inputs, simulated)
    slopes = {id(each.output) for each in calls(model) if isinstance(each.layer, LearnedSlope)}
    sloped = {each.layer.name for each in calls(model) if id(each.inputs[0]) in slopes}
    assert len(sloped) == len(RPRELUS)
    for call, ours, theirs in zip(
        exact._quantizes, probe([x, *values], training=False), values, strict=True
    ):
        layer = call.layer
        scale = layer.quantizer.grid(layer.quantizer_weights).numpy().scale
        steps = np.abs(ours.numpy() - theirs) / scale
        # Settled slopes make up for PRELU's second rounding.
        once = 0.5001 if layer.name in sloped else 1.5
        assert steps.max() < (0.5 if layer.quantizer.num_bits == 1 else once), layer.name


def test_settled_shifts_are_whole_steps_of_their_operator(model):
    """b = n · s / 127, s = the step of the tensor that is shifted."""
    producers = {id(each.output): each.layer for each in calls(model)}
    shifts = [each for each in calls(model) if isinstance(each.layer, LearnedShift)]
    assert shifts
    for call in shifts:
        source = producers[id(call.inputs[0])]
        scale = float(source.quantizer.grid(source.quantizer_weights).numpy().scale)
        steps = call.layer.shift.numpy().astype(float) / (scale / 127)
        assert np.abs(steps).max() > 10
        np.testing.assert_allclose(steps, np.rint(steps), rtol=0, atol=1e-3)


def test_kernels_give_the_same_classes(model, path):
    """Fixed-point kernels differ by a step here and there, the signs behind it by more."""
    data = data_for(model, 16)
    outputs = {kernels: run_file(path, data, kernels)[0] for kernels in KERNELS}
    outputs["model"] = model(data[0], training=False).numpy()
    spread = np.ptp(outputs["reference"])
    for name, output in outputs.items():
        differences = np.abs(output - outputs["reference"]).max(axis=1)
        assert np.median(differences) <= 0.1 * spread, name


def test_a_change_of_any_constant_is_noticed(model, path):
    file, changed = read_file(path), set()
    for layer in model.layers:
        for weight in parameter(layer):
            before = weight.numpy()
            weight.assign(before + np.eye(len(before), dtype=np.float32)[1])
            (mismatch,) = integer_mismatches(model, file)
            weight.assign(before)
            changed.add(weight.name.split(":")[0].split("/")[-1])
            assert mismatch.startswith(layer.name.removesuffix("_fake_quantize"))
    assert changed == set(PARAMETERS)
    assert integer_mismatches(model, file) == []


def test_saved_and_loaded_it_is_the_same(model, path, tmp_path):
    recipe = qat.Recipe.from_name(RECIPE)
    qat.save_model(model, tmp_path / "model.keras", recipe=recipe)
    loaded = qat.load_quantized_model(tmp_path / "model.keras")
    (x,) = data_for(model, 4)
    np.testing.assert_array_equal(loaded(x, training=False), model(x, training=False))
    again = qat.export_tflite(loaded, tmp_path / "again.tflite")
    assert again.read_bytes() == path.read_bytes()


# Thresholds.


CHANNELS = 10


@pytest.fixture(scope="module", params=["reactnet", "binary"])
def one_sign(request):
    """(method, model): an input on a fixed grid, a sign, and a kernel that copies each channel."""
    method = request.param

    def build(x):
        kernel = layers.DepthwiseConv2D(1, use_bias=False, name="copy")
        return kernel(x)

    everything = qat.Rule(
        weights=qat.TensorSpec(bits=8), activations=qat.TensorSpec(bits=1, method=method)
    )
    model = model_of(build, (16, 16, CHANNELS))
    model.get_layer("copy").set_weights([np.ones((1, 1, CHANNELS, 1), np.float32)])
    recipe = qat.Recipe(name="one", rules=(everything,))
    return method, quantized(model, recipe, input_range=(-1, 1))


@pytest.mark.parametrize("step", [3.0, 1.0, 0.05, 1 / 300, 1 / 2000])
def test_every_code_gets_its_sign(one_sign, step, tmp_path):
    """Ties, thresholds beyond both ends, and steps on which LiteRT's comparison alone fails."""
    method, model = one_sign
    bias = step * np.float32([0, 0.4, -0.6, 7, -9, 1e4, -1e4, 107.9, -147, -147.1])
    source, sign = [call.layer for call in calls(model) if isinstance(call.layer, FakeQuantize)][:2]
    source.quantizer_weights["minimum"].assign(step * -108)
    source.quantizer_weights["maximum"].assign(step * 147)
    for weight in sign.weights:
        weight.assign(bias)
    path = qat.export_tflite(model, tmp_path / "sign.tflite", io="int8")
    codes = np.arange(-128, 128).reshape(1, 16, 16, 1)
    codes = np.broadcast_to(codes, (1, 16, 16, CHANNELS)).astype(np.int8)
    grid = source.quantizer.grid(source.quantizer_weights).numpy()
    assert grid.zero_point == -20
    reals = (codes - grid.zero_point) * grid.scale
    expected = np.where(reals >= -(bias if method == "reactnet" else 0 * bias), 1, -1)
    np.testing.assert_array_equal(np.sign(model(reals, training=False)), expected)
    for kernels in KERNELS:
        (output,) = run_file(path, [codes], kernels)
        np.testing.assert_array_equal(np.sign(output), expected, err_msg=kernels)


def test_a_threshold_that_is_no_number_is_refused(model, path, tmp_path):
    bias = next(w for layer in model.layers for w in parameter(layer) if "bias" in w.name)
    before = bias.numpy()
    bias.assign(np.full(before.shape, np.nan, np.float32))
    try:
        with pytest.raises(QatError, match="NaN or infinite output_bias"):
            qat.export_tflite(model, tmp_path / "nan.tflite")
    finally:
        bias.assign(before)
