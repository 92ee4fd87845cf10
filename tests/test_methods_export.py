"""Every method's integers reach the file: a convolution, a depthwise one and a dense layer each."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from small_models import everywhere, layers

import qat
from qat import configs
from qat.recipe import METHODS, TERNARY, RecipeError
from qat.tflite_file import read_file

# Recipe -> the container of its kernels.
RECIPES = {
    "w1a8-xnor": "int2",
    "w1a8-bwn": "int2",
    "w1a8-dorefa": "int2",
    "wta8-twn": "int2",
    "wta8-ttq": "int4",
    "wta8-lsq": "int2",
    "w2a8-statsq": "int4",
    "w3a8-dorefa": "int4",
    "w4a8-dorefa": "int8",
    "w7a8-statsq": "int8",
}
NARROW = ["w4a4-lsq", "w4a4-lsqplus", "w4a4-pact", "w2a2-ewgs", "w2a2-dsq", "w3a3-dorefa"]


def network(x):
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", activation="relu", name="depthwise")(x)
    return layers.Dense(5, name="dense")(layers.Flatten()(x))


@pytest.fixture(scope="module")
def net():
    return small_models.model_of(network, (6, 6, 3))


def trained(net, name):
    """Calibrated, then two steps of Adam."""
    (x,) = small_models.data_for(net, 64)
    labels = np.random.default_rng(3).integers(0, 5, len(x))
    model = small_models.quantized(net, everywhere(name), [x])
    optimizer = tf_keras.optimizers.Adam(1e-3)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for _ in range(2):
        with tf.GradientTape() as tape:
            value = loss(labels, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            # A clipping level that no activation reaches learns nothing.
            assert np.count_nonzero(gradient) or "fake_quantize" in variable.name, variable.name
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return qat.settle_biases(model)


def levels(tensor):
    """The most distinct integers in one output channel of a kernel."""
    axis = -1 if tensor.shape[0] == 1 and len(tensor.shape) == 4 else 0
    channels = np.moveaxis(tensor.data, axis, 0).reshape(tensor.shape[axis], -1)
    return max(len(np.unique(channel)) for channel in channels)


def exported(net, name, folder, **options):
    """(kernels, {mode: outputs' differences in steps}); the export checks each integer."""
    model = trained(net, name)
    path = qat.export_tflite(model, folder / "model.tflite", **options)
    kernels = [tensor for tensor in read_file(path).tensors if tensor.name.endswith("/kernel")]
    assert len(kernels) == 3
    most = 3 if name[1] == TERNARY else 2 ** int(name[1])
    counts = [levels(kernel) for kernel in kernels]
    assert max(counts) <= most and max(counts) > min(most, 16) // 2

    data = small_models.data_for(net, 64)
    (expected,) = small_models.run_model(model, data)
    last = model.layers[-1]
    step = float(last.quantizer.grid(last.quantizer_weights).scale)
    off = {}
    for mode in ("default", "reference"):
        (outputs,) = small_models.run_file(path, data, mode)
        off[mode] = np.abs(outputs - expected) / step
    return kernels, off


@pytest.mark.parametrize("name", RECIPES)
def test_weights_reach_the_file(net, name, tmp_path):
    kernels, off = exported(net, name, tmp_path)
    assert [kernel.dtype for kernel in kernels] == [RECIPES[name]] * 3
    assert off["default"].max() < 0.5
    # The reference kernels round int8 convolutions twice too.
    assert off["reference"].max() < (1.5 if RECIPES[name] == "int8" else 0.5)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_activations_reach_the_file(net, name, tmp_path):
    """Codes from sums of few steps, so that each rounding of the kernels would show."""
    kernels, off = exported(net, name, tmp_path)
    packed = "int2" if name.startswith("w2") else "int4"
    assert {kernel.dtype for kernel in kernels} == {packed}
    assert max(difference.max() for difference in off.values()) < 0.5


def test_trained_levels_survive_saving(net, tmp_path):
    model = trained(net, "wta8-ttq")
    qat.save_model(model, tmp_path / "model.keras", recipe=everywhere("wta8-ttq"))
    restored = qat.load_quantized_model(tmp_path / "model.keras")
    data = small_models.data_for(net)
    np.testing.assert_array_equal(
        small_models.run_model(restored, data), small_models.run_model(model, data)
    )
    units = [v.numpy() for v in restored.weights if "unit" in v.name]
    assert len(units) == 3 and all(unit > 0 for unit in units)


@pytest.mark.parametrize("method", METHODS)
def test_every_width_of_a_method_makes_a_quantizer(method):
    for bits in METHODS[method].weights:
        quantizer = configs.weight_quantizer(qat.TensorSpec(bits=bits, method=method), (-1,))
        assert quantizer.num_bits == (2 if bits == TERNARY else bits)
        w = tf.constant(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
        codes = quantizer.codes(w, quantizer.build(w.shape, "kernel", layers.Layer()))
        assert np.abs(codes).max() < 2 ** (quantizer.container_bits - 1) + 1e-9
        assert len(np.unique(codes)) <= (3 if bits == TERNARY else 2**bits)
    for bits in METHODS[method].activations:
        quantizer = configs.activation_quantizer(qat.TensorSpec(bits=bits, method=method))
        assert quantizer.num_bits == bits


def test_eight_bit_odd_codes_are_refused():
    for method in ("dorefa", "statsq"):
        with pytest.raises(RecipeError, match=f"{method!r} makes no 8-bit weights") as error:
            qat.Recipe.from_name(f"w8a8-{method}")
        assert "\n" not in str(error.value)


def test_one_scale_for_a_layer_where_the_paper_has_one():
    whole = {"dorefa": 3, "ttq": TERNARY}
    for method, bits in {**whole, "statsq": 3, "twn": TERNARY}.items():
        spec = qat.TensorSpec(bits=bits, method=method)
        expected = None if method in whole else (-1,)
        assert configs.weight_quantizer(spec, (-1,)).channel_axes == expected
    spec = qat.TensorSpec(bits=TERNARY, method="ttq", options={"channel_axes": [-1]})
    assert configs.weight_quantizer(spec, (-1,)).channel_axes == (-1,)
