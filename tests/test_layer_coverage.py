"""Layers beyond the first ones: the file against the quantized model, in steps of its grids.

The cases of a group are branches of one model, each with an output of its own. Each model is
trained for two steps before it is exported.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from small_models import layers

import qat
from qat.errors import ModelError
from qat.integers import integer_mismatches
from qat.roles import UnsupportedLayerError, require_a_place
from qat.tflite_file import FileModel, read_file
from qat.verify.integer import Simulator

IMAGE, SEQUENCE, VECTOR, VOLUME = (9, 8, 4), (11, 4), (12,), (4, 6, 6, 3)


@tf_keras.utils.register_keras_serializable("tests")
def hard_swish(x):
    return x * tf.nn.relu6(x + 3) / 6


def curve(name):
    return lambda x: layers.Activation(name)(x)


def relu(*args, **options):
    return lambda x: layers.ReLU(*args, **options)(x)


def conv(**options):
    return layers.Conv2D(5, 3, **options)


# (shapes of the inputs, {case: layers, share of codes that may be one step off}). What a table
# holds and what moves codes is exact; curves with operators of their own are fixed-point numbers,
# or tables computed by another library; pools and resizings round averages.
CASES = {
    "tables": (
        [IMAGE],
        {
            **{
                name: (curve(name), 0.0)
                for name in ("selu", "softplus", "softsign", "mish", "hard_sigmoid")
            },
            "elu_of_another_slope": (lambda x: layers.ELU(0.5)(x), 0.0),
            "thresholded": (lambda x: layers.ThresholdedReLU(0.3)(x), 0.0),
            "relu_of_three": (relu(2.0, negative_slope=0.2, threshold=0.1), 0.0),
            "relu_cut": (relu(1.0), 0.01),
        },
    ),
    "curves": (
        [IMAGE],
        {
            "gelu": (curve("gelu"), 0.002),
            "exponential": (curve("exponential"), 0.002),
            "hard_swish": (curve(hard_swish), 0.02),
            "swish": (curve("swish"), 0.02),
            "leaky": (lambda x: layers.LeakyReLU(0.1)(x), 0.05),
            "relu_with_slope": (relu(negative_slope=0.2), 0.05),
            "prelu": (lambda x: layers.PReLU()(x), 0.02),
            "prelu_shared": (lambda x: layers.PReLU(shared_axes=[1, 2])(x), 0.02),
        },
    ),
    "elu": ([IMAGE], {"elu": (curve("elu"), 0.002)}),
    "sequence": (
        [SEQUENCE],
        {
            "transposed": (lambda x: layers.Conv1DTranspose(5, 3, strides=2)(x), 0.04),
            "transposed_same": (
                lambda x: layers.Conv1DTranspose(5, 3, strides=2, padding="same")(x),
                0.04,
            ),
            "depthwise": (lambda x: layers.DepthwiseConv1D(3, depth_multiplier=2)(x), 0.04),
            "depthwise_norm": (
                lambda x: layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv1D(3)(x))),
                0.04,
            ),
            "causal": (
                lambda x: layers.Conv1D(5, 3, padding="causal", dilation_rate=2, activation="relu")(
                    x
                ),
                0.04,
            ),
            "over_time": (
                lambda x: layers.TimeDistributed(layers.Dense(5, activation="relu"))(x),
                0.04,
            ),
        },
    ),
    "image": (
        [IMAGE],
        {
            "transposed_longer": (
                lambda x: layers.Conv2DTranspose(5, 3, strides=2, output_padding=1)(x),
                0.04,
            ),
            "cut": (lambda x: layers.ReLU(1.0)(conv()(x)), 0.05),
        },
    ),
    "images": (
        [(3, 8, 8, 2)],
        {
            "over_time": (
                lambda x: layers.TimeDistributed(layers.Conv2D(4, 3, activation="relu"))(x),
                0.05,
            )
        },
    ),
    "moves": (
        [IMAGE],
        {
            "crop": (lambda x: layers.Cropping2D(((1, 2), (0, 3)))(x), 0.0),
            "permute": (lambda x: layers.Permute((3, 1, 2))(x), 0.0),
            "larger": (lambda x: layers.UpSampling2D((2, 3))(x), 0.0),
            "larger_bilinear": (
                lambda x: layers.UpSampling2D(2, interpolation="bilinear")(x),
                0.1,
            ),
            "resize": (lambda x: layers.Resizing(13, 5)(x), 0.08),
            "resize_nearest": (lambda x: layers.Resizing(13, 5, interpolation="nearest")(x), 0.0),
            "nothing": (
                lambda x: layers.AlphaDropout(0.1)(
                    layers.ActivityRegularization(0.1)(layers.Identity()(x))
                ),
                0.0,
            ),
            "norm": (lambda x: layers.BatchNormalization()(x), 0.04),
        },
    ),
    "moves_of_sequences": (
        [SEQUENCE, VECTOR],
        {
            "crop": (lambda x, y: layers.Cropping1D((1, 2))(x), 0.0),
            "larger": (lambda x, y: layers.UpSampling1D(3)(x), 0.0),
            "repeat": (lambda x, y: layers.RepeatVector(4)(y), 0.0),
            "norm": (lambda x, y: layers.BatchNormalization()(x), 0.04),
            "norm_of_vector": (lambda x, y: layers.BatchNormalization()(y), 0.04),
        },
    ),
    "volume": (
        [VOLUME],
        {
            "max": (lambda x: layers.MaxPooling3D()(x), 0.0),
            "max_same": (lambda x: layers.MaxPooling3D(3, 2, padding="same")(x), 0.0),
            # Averages of averages are rounded twice.
            "average": (lambda x: layers.AveragePooling3D()(x), 0.35),
            "global_max": (lambda x: layers.GlobalMaxPooling3D()(x), 0.0),
            "global_average": (lambda x: layers.GlobalAveragePooling3D()(x), 0.2),
            "padding": (lambda x: layers.ZeroPadding3D(1)(x), 0.0),
            "crop": (lambda x: layers.Cropping3D(1)(x), 0.0),
            "larger": (lambda x: layers.UpSampling3D((2, 1, 3))(x), 0.0),
            "norm": (lambda x: layers.BatchNormalization()(x), 0.04),
        },
    ),
    "merges": (
        [IMAGE, IMAGE, IMAGE],
        {
            "average": (lambda x, y, z: layers.Average()([x, y]), 0.02),
            "average_into_kernel": (lambda x, y, z: conv()(layers.Average()([x, y, z])), 0.05),
            "maximum": (lambda x, y, z: layers.Maximum()([conv()(v) for v in (x, y, z)]), 0.03),
            "minimum": (lambda x, y, z: layers.Minimum()([x, y]), 0.02),
        },
    ),
}
RECIPES = {
    "w8a8": tuple(CASES),
    "w4a8": ("sequence", "image", "images"),
    "w8a16": ("sequence", "image"),
}
# One of each kind is quick; the others take a minute.
QUICK = [("w8a8", group) for group in ("tables", "elu")]
GROUPS = [
    pytest.param(recipe, group, marks=[] if (recipe, group) in QUICK else pytest.mark.slow)
    for recipe, groups in RECIPES.items()
    for group in groups
]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A group's trained model and its file."""

    model: tf_keras.Model
    data: list[np.ndarray]
    path: pathlib.Path
    file: FileModel


def trained(model: tf_keras.Model, data: list[np.ndarray]) -> tf_keras.Model:
    """Two steps towards smaller outputs."""
    optimizer = tf_keras.optimizers.SGD(1e-3)
    x = data[0] if len(data) == 1 else data
    for _ in range(2):
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(x, training=True))
            loss = tf.add_n([tf.reduce_mean(tf.square(y)) for y in outputs])
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        found = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if found:
            optimizer.apply_gradients(found)
    return model


@functools.cache
def exported(recipe: str, group: str) -> Exported:
    shapes, cases = CASES[group]
    net = small_models.model_of(lambda *x: [build(*x) for build, _ in cases.values()], *shapes)
    data = small_models.data_for(net, 12)
    bits = (int(part) for part in recipe[1:].split("a"))
    model = small_models.quantized(net, small_models.recipe(*bits), data)
    trained(model, data)
    path = pathlib.Path(FOLDER.name, f"{recipe}_{group}.tflite")
    return Exported(model, data, qat.export_tflite(model, path), read_file(path))


FOLDER = tempfile.TemporaryDirectory()


def steps_apart(found: Exported, expected, actual, index: int) -> np.ndarray:
    """How many steps of its grid the file's output is from the model's."""
    output = found.file.outputs[index]
    scale = next(op.inputs[0].scale[0] for op in found.file.operators if op.outputs[0] is output)
    assert np.ptp(expected) > 3 * scale, "the model's output is constant: nothing is compared"
    return np.abs(np.rint(actual / scale) - np.rint(expected / scale))


@pytest.mark.parametrize(("recipe", "group"), GROUPS)
def test_integers_match_and_nothing_computes_in_float(recipe, group):
    found = exported(recipe, group)
    assert integer_mismatches(found.model, found.file) == []
    assert found.file.float_operators() == []


@pytest.mark.parametrize(("recipe", "group"), GROUPS)
def test_outputs_are_the_models(recipe, group):
    found, cases = exported(recipe, group), CASES[group][1]
    expected = small_models.run_model(found.model, found.data)
    actual = small_models.run_file(found.path, found.data)
    for index, (case, (_, share)) in enumerate(cases.items()):
        steps = steps_apart(found, expected[index], actual[index], index)
        if recipe == "w8a16":  # a ReLU cut below its range needs the same bound in codes
            share = 0.12
        assert steps.max() <= 1, case
        assert (steps > 0).mean() <= share + 2 / steps.size, case


@pytest.mark.parametrize(("recipe", "group"), GROUPS)
def test_simulated_codes_are_the_reference_kernels(recipe, group):
    """BUILTIN_REF has no ELU; the optimized kernels have."""
    found = exported(recipe, group)
    kernels = "optimized" if group == "elu" else "reference"
    data = [x[:2] for x in found.data]
    actual = small_models.run_file(found.path, data, kernels)
    simulator = Simulator(found.path.read_bytes())
    rows = [simulator.run(*[x[i : i + 1] for x in data]) for i in range(2)]
    for index, output in enumerate(actual):
        simulated = np.concatenate([row[index] for row in rows])
        assert steps_apart(found, simulated, output, index).max() == 0


# ---------------------------------------------------------------------------------------------
# Rows of a table.


def rows_of(dtype):
    numbers = layers.Input((7,), dtype=dtype, name="numbers")
    x = layers.Embedding(20, 4, name="rows")(numbers)
    model = tf_keras.Model(numbers, layers.Conv1D(3, 3, name="conv")(x))
    return small_models.randomize(model)


@pytest.mark.parametrize("dtype", ["int32", pytest.param("float32", marks=pytest.mark.slow)])
def test_an_embedding_is_a_table_of_codes(dtype, tmp_path):
    data = [np.random.default_rng(0).integers(0, 20, (16, 7)).astype(dtype)]
    model = small_models.quantized(rows_of(dtype), "w8a8", data)
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    file, (row, *_) = read_file(path), qat.quantization_report(model)
    gather = next(op for op in file.operators if op.name == "GATHER")
    assert gather.inputs[0].dtype == "int8" and gather.inputs[0].shape == (20, 4)
    assert gather.inputs[0] in file.weights() and (row.name, row.weight_bits) == ("rows", 8)
    assert file.float_operators() == (["CAST"] if dtype == "float32" else [])
    (output,) = small_models.run_file(path, data)
    (expected,) = small_models.run_model(model, data)
    scale = file.operators[-1].inputs[0].scale[0]
    assert np.abs(np.rint(output / scale) - np.rint(expected / scale)).max() <= 1
    (codes,) = Simulator(path.read_bytes()).run(data[0][:1])
    np.testing.assert_array_equal(codes, small_models.run_file(path, data, "reference")[0][:1])


def binned():
    """Numbers put into bins, each with a row of a table."""
    numbers = layers.Input((7, 3), name="numbers")
    bins = layers.Discretization([-1.0, 0.0, 0.5, 1.25], name="bins")(numbers)
    x = layers.Reshape((7, 12))(layers.Embedding(5, 4, name="rows")(bins))
    return small_models.randomize(tf_keras.Model(numbers, layers.Conv1D(3, 3, name="conv")(x)))


def test_bins_are_codes_that_number_rows(tmp_path):
    net = binned()
    data = [np.random.default_rng(0).normal(0, 1, (16, 7, 3)).astype(np.float32)]
    model = small_models.quantized(net, "w8a8", data)
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    file = read_file(path)
    assert file.float_operators() == [] and integer_mismatches(model, file) == []
    (output,), (expected,) = small_models.run_file(path, data), small_models.run_model(model, data)
    scale = file.operators[-1].inputs[0].scale[0]
    np.testing.assert_array_equal(np.rint(output / scale), np.rint(expected / scale))
    (codes,) = Simulator(path.read_bytes()).run(data[0][:1])
    np.testing.assert_array_equal(codes, small_models.run_file(path, data, "reference")[0][:1])
    # The bins' table: code -128 + k where the input's code stands for a number of bin k.
    table, _ = next(op for op in file.operators if op.name == "GATHER").inputs
    source = file.operators[0].outputs[0]
    reals = (np.arange(-128, 128) - int(source.zero_point[0])) * source.scale[0]
    bins = table.data.astype(int) + 128
    np.testing.assert_array_equal(bins, np.digitize(reals, [-1.0, 0.0, 0.5, 1.25]))
    table.data[100] += 1
    assert any("table: 1 codes differ" in line for line in integer_mismatches(model, file))


def test_bins_of_16_bits_are_refused():
    with pytest.raises(UnsupportedLayerError, match="'bins' .* no operator for 16-bit"):
        qat.quantize_model(binned(), "w8a16")


def test_a_damaged_table_is_seen(tmp_path):
    net = small_models.model_of(curve("selu"), VECTOR)
    path = qat.export_tflite(small_models.quantized(net), tmp_path / "m.tflite")
    model, file = small_models.quantized(net), read_file(path)
    table = next(op.inputs[0] for op in file.operators if op.name == "GATHER")
    table.data[100] += 1
    assert any("table: 1 codes differ" in line for line in integer_mismatches(model, file))


@pytest.mark.slow
def test_exact_models_know_tables_slopes_and_rows():
    numbers = layers.Input((8,), dtype="int32", name="numbers")
    x = layers.Embedding(20, 4)(numbers)
    x = layers.PReLU()(layers.Conv1D(4, 3, activation="selu")(x))
    x = layers.Maximum()([layers.LeakyReLU(0.1)(x), layers.Dense(4, activation="swish")(x)])
    net = small_models.randomize(tf_keras.Model(numbers, layers.Dense(3)(x)))
    data = [np.random.default_rng(0).integers(0, 20, (8, 8)).astype(np.int32)]
    model = small_models.quantized(net, "w8a8", data)
    with tempfile.TemporaryDirectory() as folder:
        path = qat.export_tflite(model, pathlib.Path(folder, "m.tflite"))
        (expected,) = small_models.run_file(path, data, "reference")
    np.testing.assert_allclose(qat.ExactModel(model)(data[0]), expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------
# Layers that stay in float32, and those that cannot be in a file.


def between(layer):
    def build(x):
        x = layers.Conv2D(4, 3, name="before")(x)
        return layers.Conv2D(3, 1, name="behind")(layer(name="it")(x))

    return build


def scaled_attention(name):
    return lambda x: layers.Attention(use_scale=True, name=name)([x, x])


FLOATS = {
    "LayerNormalization": (IMAGE, between(layers.LayerNormalization), "RSQRT"),
    "layer_norm_of_pixels": (
        IMAGE,
        between(lambda name: layers.LayerNormalization(axis=[1, 2], scale=False, name=name)),
        "RSQRT",
    ),
    "UnitNormalization": (IMAGE, between(layers.UnitNormalization), "L2_NORMALIZATION"),
    "GroupNormalization": (
        IMAGE,
        between(lambda name: layers.GroupNormalization(2, name=name)),
        "RSQRT",
    ),
    "Conv3D": (
        VOLUME,
        lambda x: layers.Dense(3, name="behind")(
            layers.Conv3D(4, 3, activation="relu", name="it")(x)
        ),
        "CONV_3D",
    ),
    "Attention": (
        SEQUENCE,
        lambda x: layers.Dense(3, name="behind")(
            scaled_attention("it")(layers.Dense(4, name="before")(x))
        ),
        "BATCH_MATMUL",
    ),
    "MultiHeadAttention": (
        SEQUENCE,
        lambda x: layers.Dense(3, name="behind")(
            (lambda y: layers.MultiHeadAttention(2, 4, name="it")(y, y, use_causal_mask=True))(
                layers.Dense(4, name="before")(x)
            )
        ),
        "BATCH_MATMUL",
    ),
}
QUICK_FLOATS = ("LayerNormalization", "UnitNormalization")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK_FLOATS else pytest.mark.slow) for c in FLOATS]
)
def test_layers_without_integer_kernels_are_float_with_a_reason(case, tmp_path):
    shape, build, operator = FLOATS[case]
    net = small_models.model_of(build, shape)
    data = small_models.data_for(net, 8)
    model = trained(small_models.quantized(net, "w8a8", data), data)
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    file = read_file(path)
    rows = {row.name: row for row in qat.quantization_report(model)}
    assert rows["it"].reason_if_float and rows["it"].weight_bits is None
    assert rows["behind"].weight_bits == 8 and rows["behind"].reason_if_float is None
    assert operator in file.float_operators()
    kernels = ("CONV_2D", "FULLY_CONNECTED")
    own = [op for op in file.operators if op.name in kernels and op.inputs[1].name[:2] == "be"]
    assert {op.inputs[1].dtype for op in own} == {"int8"}
    (expected,), (actual,) = small_models.run_model(model, data), small_models.run_file(path, data)
    scale = file.operators[-1].inputs[0].scale[0]
    steps = np.abs(np.rint(actual / scale) - np.rint(expected / scale))
    # A code of "before" that rounds otherwise is a step there and may be some behind the island.
    assert steps.max() <= 4 and (steps > 0).mean() <= 0.03


REFUSED = {
    "LSTM": lambda: layers.LSTM(3, name="it"),
    "GRU": lambda: layers.GRU(3, name="it"),
    "RNN": lambda: layers.RNN(layers.LSTMCell(3), name="it"),
    "Bidirectional": lambda: layers.Bidirectional(layers.GRU(3), name="it"),
    "StringLookup": lambda: layers.StringLookup(name="it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_file_can_hold_is_named(kind):
    with pytest.raises(UnsupportedLayerError, match=f"'it' \\({kind}\\).*cannot help") as error:
        require_a_place(REFUSED[kind]())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep_float", [False, True])
def test_what_no_file_can_hold_is_refused_before_training(keep_float):
    net = small_models.model_of(lambda x: layers.Masking(name="it")(x), SEQUENCE)
    rules = [qat.Rule(layer="it", keep_float="please")] * keep_float
    with pytest.raises(UnsupportedLayerError, match="'it' \\(Masking\\).*cannot help"):
        qat.quantize_model(net, small_models.recipe(8, 8, *rules))


def test_16_bit_activations_have_no_tables():
    net = small_models.model_of(lambda x: layers.Activation("selu", name="it")(x), VECTOR)
    with pytest.raises(UnsupportedLayerError, match="'it'.*16-bit.*keep_float"):
        qat.quantize_model(net, "w8a16")


def test_a_layer_of_steps_that_has_no_kernel_is_named():
    net = small_models.model_of(
        lambda x: layers.TimeDistributed(layers.MaxPooling2D(), name="it")(x), (3, 8, 8, 2)
    )
    with pytest.raises(ModelError, match="'it' \\(TimeDistributed\\) repeats a MaxPooling2D"):
        qat.quantize_model(net)
