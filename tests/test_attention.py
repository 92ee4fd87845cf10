"""Attention and other products of activations: the same function, integers in the file."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from small_models import layers

import qat
from qat.canonical import canonicalize
from qat.integers import integer_mismatches
from qat.operator_layers import MatMul
from qat.tflite_file import read_file

SEQUENCE, OTHER = (5, 6), (7, 6)


def heads(query, value, **options):
    attention = layers.MultiHeadAttention(2, 3, value_dim=4, name="it", **options)
    return attention(query, value)


# {name: (build, shapes of the inputs)}.
CASES = {
    "heads": (lambda x, y: heads(x, y, output_shape=8), (SEQUENCE, OTHER)),
    "heads_without_bias": (lambda x, y: heads(x, y, use_bias=False), (SEQUENCE, OTHER)),
    "self": (lambda x: heads(x, x, dropout=0.2), (SEQUENCE,)),
    "keys": (
        lambda x, y, z: layers.MultiHeadAttention(3, 2, name="it")(x, y, z),
        (SEQUENCE, OTHER, (7, 4)),
    ),
    "attention": (lambda x, y: layers.Attention(name="it")([x, y]), (SEQUENCE, OTHER)),
    "attention_keys": (
        lambda x, y, z: layers.Attention(name="it", dropout=0.1)([x, y, z]),
        (SEQUENCE, (7, 3), OTHER),
    ),
    "dot": (lambda x, y: layers.Dot(axes=-1, name="it")([x, y]), (SEQUENCE, OTHER)),
    "dot_columns": (lambda x, y: layers.Dot(axes=(1, 1), name="it")([x, y]), (SEQUENCE, (5, 4))),
    "dot_plain": (lambda x, y: layers.Dot(axes=(2, 1), name="it")([x, y]), (SEQUENCE, (6, 4))),
    "dot_vectors": (lambda x, y: layers.Dot(axes=1, name="it")([x, y]), ((6,), (6,))),
    "einsum": (
        lambda x: layers.EinsumDense("abc,cd->abd", (None, 4), "relu", "d", name="it")(x),
        (SEQUENCE,),
    ),
    "matmul": (lambda x, y: tf.matmul(x, y, transpose_b=True), (SEQUENCE, OTHER)),
    "matmul_turned": (
        lambda x, y: tf.matmul(x, y, transpose_a=True),
        ((2, 5, 3), (2, 5, 4)),
    ),
}
by_case = pytest.mark.parametrize("case", CASES)


def network(case: str) -> tf_keras.Model:
    build, shapes = CASES[case]
    return small_models.model_of(build, *shapes)


@by_case
def test_the_float_function_is_the_same(case):
    net = network(case)
    made, _ = canonicalize(net)
    kinds = {type(layer).__name__ for layer in made.layers}
    assert not kinds & {"MultiHeadAttention", "Attention", "Dot", "EinsumDense", "TFOpLambda"}
    data = small_models.data_for(net)
    for one, other in zip(
        small_models.run_model(net, data), small_models.run_model(made, data), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w8a16"])
@by_case
def test_the_file_is_the_model(case, recipe, tmp_path):
    """Integers throughout; the simulator's codes are the reference kernels', bit for bit."""
    net = network(case)
    data = small_models.data_for(net)
    model = small_models.quantized(net, small_models.everywhere(recipe), data)
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    file = read_file(path)
    assert file.float_operators() == [] and integer_mismatches(model, file) == []
    found = qat.verify_tflite(path, model, small_models.batches(data))
    assert found.layers.not_compared == {}
    for row in found.layers.rows:
        for pair in row.pairs:
            assert not row.beyond_rounding(pair), (row, pair)
    assert found.output_snr_db > 30


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_products_of_large_codes(dtype, tmp_path):
    """Sums of up to 25 and 41 bits."""
    depth = 1500
    rng = np.random.default_rng(0)
    one, other = layers.Input((3, depth)), layers.Input((4, depth))
    net = tf_keras.Model([one, other], MatMul(transpose_b=True)([one, other]))
    data = [rng.choice([-1.0, 1.0], (8, n, depth)).astype(np.float32) for n in (3, 4)]
    data[1][:, 0] = data[0][:, 0]
    recipe = small_models.recipe(8, 16 if dtype == "int16" else 8)
    model = small_models.quantized(net, recipe, data)
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    found = qat.verify_tflite(path, model, small_models.batches(data))
    (row,) = (row for row in found.layers.rows if row.operator == "BATCH_MATMUL")
    assert row.dtype == dtype and row.pairs["reference_simulator"].own.different == 0
    assert not any(row.beyond_rounding(pair) for pair in row.pairs)


def test_the_account_names_its_parts():
    rows = qat.quantization_report(small_models.quantized(network("heads")))
    kernels = {row.name: row.weight_bits for row in rows if row.type == "Dense"}
    assert kernels == dict.fromkeys(("it_query", "it_key", "it_value", "it_output"), 8)
    assert [row.name for row in rows if row.type == "MatMul"] == ["it_scores", "it_attended"]
    assert all(row.reason_if_float is None for row in rows)


@pytest.mark.parametrize("match", [{"layer": "it"}, {"type": "MultiHeadAttention"}])
def test_a_rule_for_it_holds_for_all_its_parts(match, tmp_path):
    net = small_models.model_of(
        lambda x, y: layers.Dense(3, name="behind")(heads(x, y)), SEQUENCE, OTHER
    )
    rule = qat.Rule(keep_float="sensitive", **match)
    model = small_models.quantized(net, small_models.recipe(8, 8, rule))
    reasons = {row.name: row.reason_if_float for row in qat.quantization_report(model)}
    assert reasons.pop("behind") is None and set(reasons.values()) == {"sensitive"}
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    assert read_file(path).float_operators().count("BATCH_MATMUL") == 2


OTHERS = {
    "causal mask": lambda x: layers.MultiHeadAttention(2, 3, name="it")(x, x, use_causal_mask=True),
    "axes": lambda x: layers.MultiHeadAttention(2, 3, attention_axes=2, name="it")(x, x),
    "constraint": lambda x: layers.MultiHeadAttention(
        2, 3, kernel_constraint="unit_norm", name="it"
    )(x, x),
    "scale": lambda x: layers.Attention(use_scale=True, name="it")([x, x]),
    "normalized": lambda x: layers.Dot(axes=-1, normalize=True, name="it")([x, x]),
    "kernel of two axes": lambda x: layers.EinsumDense("abc,bcd->abd", (5, 4), name="it")(x),
    "diagonal": lambda x: layers.EinsumDense("abc,cc->abc", (5, 4), name="it")(x),
    "first axis": lambda x: layers.EinsumDense("ab...,bc->ac...", (5, None), name="it")(x),
    "activity": lambda x: layers.MultiHeadAttention(2, 3, activity_regularizer="l2", name="it")(
        x, x
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_stay_in_float_with_a_reason(case):
    net = small_models.model_of(lambda x: OTHERS[case](layers.Dense(4)(x)), SEQUENCE)
    model = small_models.quantized(net)
    (row,) = (row for row in qat.quantization_report(model) if row.name == "it")
    assert row.reason_if_float


def kinds_of(model: tf_keras.Model) -> list[str]:
    return [type(layer).__name__ for layer in canonicalize(model)[0].layers]


@pytest.mark.parametrize(
    "attend", [lambda x: heads(x, x), lambda x: layers.Attention()([x, x])], ids=["heads", "plain"]
)
def test_a_mask_that_keras_hands_on_is_kept(attend):
    words = layers.Input((5,), dtype=tf.int32)
    net = tf_keras.Model(words, attend(layers.Embedding(6, 4, mask_zero=True)(words)))
    assert "MatMul" not in kinds_of(net)


def test_causal_by_option_is_refused():
    net = small_models.model_of(
        lambda x: layers.Attention(causal=True, name="it")([x, x]), SEQUENCE
    )
    with pytest.raises(qat.errors.ModelError, match="'it'.*use_causal_mask"):
        qat.quantize_model(net)


def test_a_layer_that_is_also_called_with_a_mask_stays_one_layer():
    def build(x):
        it = layers.MultiHeadAttention(2, 3, name="it")
        return [it(x, x), it(x, x, use_causal_mask=True)]

    net = small_models.model_of(build, SEQUENCE)
    assert kinds_of(net).count("MultiHeadAttention") == 1
    assert len(canonicalize(net)[0].trainable_weights) == len(net.trainable_weights) == 8


def test_called_twice_it_keeps_one_set_of_weights():
    def build(x, y):
        it = layers.MultiHeadAttention(2, 3, name="it")
        return [it(x, x), it(x, y)]

    net = small_models.model_of(build, SEQUENCE, OTHER)
    made = canonicalize(net)[0]
    assert "MultiHeadAttention" not in kinds_of(net) and len(made.trainable_weights) == 8
    data = small_models.data_for(net)
    for one, other in zip(
        small_models.run_model(net, data), small_models.run_model(made, data), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_a_regularizer_sees_the_kernels_it_is_for():
    net = small_models.model_of(lambda x: heads(x, x, kernel_regularizer="l2"), SEQUENCE)
    made = canonicalize(net)[0]
    assert "MatMul" in kinds_of(net)
    np.testing.assert_allclose(sum(made.losses), sum(net.losses), rtol=1e-6)


def test_options_of_the_layer_are_kept():
    """Frozen, it has no weight that trains; in inference mode it drops nothing."""
    x = layers.Input(SEQUENCE)
    it = layers.MultiHeadAttention(2, 3, dropout=0.5)
    net = tf_keras.Model(x, it(x, x, training=False))
    it.trainable = False
    made = canonicalize(net)[0]
    assert made.trainable_weights == [] and "Dropout" not in kinds_of(net)


def test_it_learns():
    """Every kernel of an attention gets a gradient through the integers, and the loss falls."""
    tf_keras.utils.set_random_seed(0)
    x = layers.Input((8, 8, 3))
    y = layers.Conv2D(12, 3, strides=2, padding="same", activation="relu")(x)
    y = layers.Reshape((16, 12))(y)
    y = layers.Add()([y, heads(y, y)])
    net = tf_keras.Model(x, layers.Dense(4)(layers.GlobalAveragePooling1D()(y)))
    model = qat.quantize_model(net, "w4a8-lsq")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 64)
    images = rng.normal(0, 0.3, (64, 8, 8, 3)) + labels[:, None, None, None]
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(1e-2), loss)
    losses = model.fit(images, labels, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    with tf.GradientTape() as tape:
        value = loss(labels, model(images, training=True))
    gradients = tape.gradient(value, model.trainable_variables)
    kernels = [
        gradient
        for gradient, variable in zip(gradients, model.trainable_variables, strict=True)
        if variable.name.endswith("kernel:0")
    ]
    assert len(kernels) == 6 and all(np.abs(kernel).max() > 0 for kernel in kernels)


def test_keras_3(tmp_path):
    x = keras.Input((8, 6))
    y = keras.layers.MultiHeadAttention(2, 4)(x, x)
    net = keras.Model(
        x, keras.layers.Dense(3)(keras.ops.matmul(y, keras.ops.transpose(x, (0, 2, 1))))
    )
    data = [np.random.default_rng(0).normal(size=(16, 8, 6)).astype(np.float32)]
    model = qat.calibrate(qat.quantize_model(net, "w8a8"), small_models.batches(data))
    path = qat.export_tflite(model, tmp_path / "m.tflite")
    assert read_file(path).float_operators() == []
    assert qat.verify_tflite(path, model, small_models.batches(data)).integers_match
