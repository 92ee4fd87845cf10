"""Mixed precision changes how training computes, and nothing of what a model is."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_models import data_for, model_of, quantized, residual
from stripes import STEPS, Recorder, Stripes, float_model, quantized_model

import qat
from qat import pipeline
from qat.layers import FakeQuantize
from qat.pipeline import Job
from qat.precision import in_precision
from qat.recipe import Recipe
from qat.train import TrainConfig, fit

SIXTEEN = ("bfloat16", "float16")


@pytest.fixture(scope="module", params=("w4a8",))
def model(request) -> tf_keras.Model:
    return quantized(model_of(residual, (8, 8, 3)), request.param)


def kernels_seen(model: tf_keras.Model) -> dict[str, tf.Tensor]:
    """What each wrapped layer computes with: TFMOT's wrapper leaves it in the layer."""
    model(data_for(model, 2)[0], training=False)
    wrapped = [layer for layer in model.layers if getattr(layer, "_weight_vars", ())]
    return {layer.name: layer.layer.kernel for layer in wrapped}


def test_float32_is_the_model_itself():
    model = float_model()
    assert in_precision(model, "float32") is model


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_of_mixed_precision_is_quantized_in_float32(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        net = tf_keras.Sequential([tf_keras.layers.Conv2D(3, 3), tf_keras.layers.Flatten()])
        net.add(tf_keras.layers.Dense(2, activation="softmax"))
        net.build((None, 6, 6, 2))
        quantized = qat.quantize_model(net, "w8a8")
        assert tf_keras.mixed_precision.global_policy().name == policy
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    assert {layer.compute_dtype for layer in quantized.layers} == {"float32"}
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype(np.float32)
    qat.calibrate(quantized, tf.data.Dataset.from_tensors(x))
    np.testing.assert_allclose(quantized(x), tf.cast(net(x), tf.float32), atol=0.03)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'int8'"):
        in_precision(float_model(), "int8")


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_kernels_compute_in_16_bits_and_all_variables_and_grids_are_float32(dtype, model):
    made = in_precision(model, dtype)
    inner = [la for la in made.layers if type(la).__name__ in ("KernelWrapper", "ReLU", "Add")]
    types = {layer.name: layer.compute_dtype for layer in inner}
    assert types.pop("quant_logits") == "float32" and set(types.values()) == {dtype}
    assert made.layers[-1].compute_dtype == "float32"
    assert made.output.dtype == tf.float32
    assert all(v.dtype in (tf.float32, tf.int32) for v in made.weights)
    assert len(made.weights) == len(model.weights)
    for old, new in zip(model.weights, made.weights, strict=True):
        assert old.name.split("/")[-1] == new.name.split("/")[-1]
        np.testing.assert_array_equal(old.numpy(), new.numpy())
    for old, new in zip(model.layers, made.layers, strict=True):
        if isinstance(new, FakeQuantize):
            assert new.compute_dtype == "float32" and new.quantizer == old.quantizer


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_what_kernels_compute_with_is_the_float32_grid_rounded_once(dtype, model):
    """Were the weights rounded to 16 bits before the grid, codes would move."""
    exact, rounded = kernels_seen(model), kernels_seen(in_precision(model, dtype))
    assert len(exact) == 4 and exact.keys() == rounded.keys()
    for name, value in exact.items():
        assert rounded[name].dtype == ("float32" if name == "quant_logits" else dtype)
        expected = tf.cast(tf.cast(value, rounded[name].dtype), tf.float32)
        np.testing.assert_array_equal(expected, tf.cast(rounded[name], tf.float32))


@pytest.mark.parametrize(
    ("build", "dtype"),
    (
        (quantized_model, "bfloat16"),
        pytest.param(quantized_model, "float16", marks=pytest.mark.slow),
        pytest.param(float_model, "bfloat16", marks=pytest.mark.slow),
        pytest.param(float_model, "float16", marks=pytest.mark.slow),
    ),
)
def test_training_learns_and_leaves_a_float32_model(build, dtype, tmp_path):
    model, recorder = build(), Recorder()
    before = model.get_weights()
    config = TrainConfig(epochs=6, learning_rate=0.02, mixed_precision=dtype)
    fit(model, Stripes(), config, callbacks=[recorder])
    losses = [logs["loss"] for _, logs in recorder.epochs]
    assert losses[-1] < 0.75 * losses[0]
    assert all(layer.compute_dtype == "float32" for layer in model.layers)
    changed = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert any(changed)
    if build is float_model:
        model.save(tmp_path / "model.keras")
        loaded = tf_keras.models.load_model(tmp_path / "model.keras")
        assert loaded.layers[-1].compute_dtype == "float32"
    else:
        qat.settle_biases(model)
        path = qat.export_tflite(model, tmp_path / "model.tflite")
        found = qat.verify_tflite(path, model, Stripes().validation)
        assert found.integers_match and found.agreement == 1.0


@pytest.mark.slow
def test_float16_goes_on_with_its_loss_scale(tmp_path):
    """It doubles after 2,000 steps and halves when a gradient overflows: part of the state."""
    config = TrainConfig(epochs=2, learning_rate=0.02, mixed_precision="float16")
    whole, again = float_model(), float_model(7)
    fit(whole, Stripes(), config)
    config = dataclasses.replace(config, checkpoint_dir=tmp_path, checkpoint_steps=1)
    with pytest.raises(KeyboardInterrupt):
        fit(float_model(), Stripes(), config, callbacks=[Recorder(STEPS + 1)])
    assert fit(again, Stripes(), dataclasses.replace(config, resume=True)) == STEPS + 1
    for left, right in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    names = [name for name, _ in tf.train.list_variables(str(tmp_path / "ckpt-8"))]
    assert any("loss_scale" in name for name in names), names


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", ("lenet", "cnn5"))
def test_a_run_in_mixed_precision_gives_a_verified_file(name, dtype, tmp_path):
    job = Job(
        dataset="digits",
        model=name,
        recipe=Recipe.from_name("w4a4"),
        output_dir=tmp_path,
        float_epochs=25,
        qat_epochs=10,
        mixed_precision=dtype,
    )
    report = pipeline.run(job)
    assert report["integers_match"] and report["agreement"] >= 0.99
    assert json.loads((tmp_path / "report.json").read_text())["devices"]["mixed_precision"] == dtype
    assert report["accuracy"]["float"] > 0.85 and report["accuracy"]["tflite"] > 0.85
    again = qat.export_tflite(
        qat.load_quantized_model(tmp_path / "qat_model.keras"), tmp_path / "again.tflite"
    )
    assert pathlib.Path(again).read_bytes() == (tmp_path / "model.tflite").read_bytes()
