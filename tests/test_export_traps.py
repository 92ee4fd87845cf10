"""What is silently wrong elsewhere: each trap of the format or of its kernels, by the outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small_models
from small_models import layers

import qat
from qat.integers import integer_mismatches
from qat.tflite_file import read_file

IMAGE = (6, 6, 3)


def steps_apart(model, path, data, kernels: str, index: int = 0) -> np.ndarray:
    """|file - model| of one output in steps of its grid."""
    file = read_file(path)
    source = next(op for op in file.operators if op.outputs[0] is file.outputs[index])
    expected = small_models.run_model(model, data)[index]
    actual = small_models.run_file(path, data, kernels)[index]
    assert np.ptp(expected) > 0
    return np.abs(actual - expected) / source.inputs[0].scale[0]


def assert_agree(model, path, data, *, limit: float = 1, share: float = 0.05):
    """A single operator with 8-bit kernels: 1 step, rarely."""
    assert integer_mismatches(model, read_file(path)) == []
    for kernels in small_models.KERNELS:
        steps = np.rint(steps_apart(model, path, data, kernels))
        assert steps.max() <= limit and (steps > 0).mean() <= share, kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traps")


def set_variable(model, layer: str, name: str, change):
    """Replaces a variable of a layer by `change(value)`."""
    for variable in model.get_layer(layer).weights:
        if variable.name.split(":")[0].split("/")[-1] == name:
            variable.assign(change(variable.numpy()))
            return
    raise AssertionError(f"{layer} has no {name}")


def first(values):
    """A change of channel 0 alone."""

    def change(array):
        array[..., 0] = values
        return array

    return change


def test_batch_norm_gamma_of_zero_tiny_and_negative(folder):
    """A channel that is its beta alone: no scale of zero, no overflow of the int32 bias."""
    gammas = [0.0, -0.0, 1e-12, -1e-12, 1e-30, 1e-38, -0.7, 1.0]

    def build(x):
        made = []
        for name, layer in (
            ("conv", layers.Conv2D(8, 3)),
            ("depthwise", layers.DepthwiseConv2D(3, depth_multiplier=2)),
            ("transposed", layers.Conv2DTranspose(8, 3)),
            ("dense", layers.Dense(8)),
        ):
            made.append(layers.BatchNormalization(name=f"{name}_norm")(layer(x)))
        return [*made, layers.BatchNormalization(name="norm")(layers.Concatenate()([x, x]))]

    net = small_models.model_of(build, (6, 6, 4))
    for name in ("conv_norm", "depthwise_norm", "transposed_norm", "dense_norm", "norm"):
        set_variable(net, name, "gamma", lambda _: np.asarray(gammas))
        set_variable(net, name, "beta", lambda _: np.linspace(-2, 2, 8))
    model = small_models.quantized(net)
    path, data = folder / "gamma.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    assert integer_mismatches(model, read_file(path)) == []
    for kernels in small_models.KERNELS:
        for index in range(5):
            steps = np.rint(steps_apart(model, path, data, kernels, index))
            assert steps.max() <= 1, (kernels, index, steps.max(axis=(0, 1, 2)))


@pytest.mark.parametrize("bias", [0.7, -3.0])
def test_biases_that_are_all_equal(folder, bias):
    """The converter folds such a bias into a scalar and takes channel 0's scale for all."""

    def build(x):
        return [layers.Conv2D(4, 3, name="conv")(x), layers.DepthwiseConv2D(3, name="depthwise")(x)]

    net = small_models.model_of(build, IMAGE)
    for name in ("conv", "depthwise"):
        set_variable(net, name, "bias", lambda value: np.full_like(value, bias))
        # Channels of very different scales, so that one scale for all would show.
        key = "kernel" if name == "conv" else "depthwise_kernel"
        set_variable(net, name, key, lambda value: first(value[..., 0] * 0.01)(value))
    model = small_models.quantized(net)
    path, data = folder / "bias.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    for tensor in read_file(path).tensors:
        if tensor.name.endswith("/bias"):
            real = tensor.data * tensor.scale.astype(float)
            np.testing.assert_allclose(real, bias, atol=tensor.scale.max())
    assert_agree(model, path, data)


@pytest.mark.parametrize("bound", [2.0, 1.0, 0.3])
def test_symmetric_input_ranges_are_rounding_ties(folder, bound):
    """[-a, a] puts the zero point at -0.5: file and model must break the tie alike."""
    net = small_models.model_of(lambda x: layers.Conv2D(4, 3)(x), IMAGE)
    # Strictly inside: ±a itself is halfway between two codes, where a float division decides.
    data = [np.random.default_rng(0).uniform(-bound, bound, (32, *IMAGE)).astype(np.float32)]
    model = small_models.quantized(net, data=data, input_range=(-bound, bound))
    path = folder / f"tie{bound}.tflite"
    qat.export_tflite(model, path)
    assert_agree(model, path, data)


def test_the_grid_behind_a_reshape_is_kept(folder):
    """8 bits → Flatten → 4 bits: the second grid is the one that the dense layer reads."""

    def build(x):
        x = layers.Conv2D(4, 3, name="conv", activation="relu")(x)
        return layers.Dense(3, name="dense")(layers.Flatten(name="flat")(x))

    net = small_models.model_of(build, IMAGE)
    eight = qat.TensorSpec(bits=8)
    rule = qat.Rule(layer="conv", weights=eight, activations=eight)
    recipe = small_models.recipe(8, 4, rule)
    path, data = folder / "reshape.tflite", small_models.data_for(net)
    model = small_models.quantized(net, recipe, data)
    qat.export_tflite(model, path)
    dense = next(op for op in read_file(path).operators if op.name == "FULLY_CONNECTED")
    outputs = inner_codes(path, dense.inputs[0].name, data)
    assert len(np.unique(outputs)) <= 16
    assert outputs.max() == 127 and outputs.min() >= 127 - 15
    # A step of the 4-bit tensor off by one moves the logits by several 8-bit steps.
    for kernels in small_models.KERNELS:
        assert (np.rint(steps_apart(model, path, data, kernels)) <= 1).mean() > 0.9


def inner_codes(path, name: str, data) -> np.ndarray:
    """The codes of an inner tensor over the data (reference kernels keep them all)."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(
        str(path),
        experimental_op_resolver_type=small_models.KERNELS["reference"],
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    index = next(d["index"] for d in interpreter.get_tensor_details() if d["name"] == name)
    found = []
    for x in data[0]:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(index).copy())
    return np.stack(found)


def test_softmax_needs_no_second_quantize(folder):
    net = small_models.model_of(lambda x: layers.Dense(5, activation="softmax")(x), (12,))
    model = small_models.quantized(net)
    path, data = folder / "softmax.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    file = read_file(path)
    names = [op.name for op in file.operators]
    assert names == ["QUANTIZE", "FULLY_CONNECTED", "SOFTMAX", "DEQUANTIZE"]
    softmax = file.operators[2].outputs[0]
    assert softmax.scale[0] == 1 / 256 and softmax.zero_point[0] == -128
    assert_agree(model, path, data, limit=2, share=0.1)


LOW_BITS = [  # width, method, lowest and highest code of a uniform grid
    (1, "binary", None),
    (2, "minmax", (-1, 1)),
    (3, "minmax", (-3, 3)),
    (4, "minmax", (-7, 7)),
    (5, "minmax", (-15, 15)),
    ("t", "lsq", (-1, 1)),
    (2, "lsq", (-2, 1)),
    (3, "lsq", (-4, 3)),
    (4, "lsq", (-7, 7)),
]


@pytest.mark.parametrize(("bits", "method", "codes"), LOW_BITS)
def test_low_bit_kernels(folder, bits, method, codes):
    """At most 2^W integers a channel, none outside the width, zero point 0, and their values."""

    def build(x):
        return [
            layers.Conv2D(4, 3, name="conv", use_bias=False)(x),
            layers.DepthwiseConv2D(3, name="depthwise", use_bias=False)(x),
            layers.Conv2DTranspose(4, 3, name="transposed", use_bias=False)(x),
            layers.Dense(5, name="dense", use_bias=False)(layers.Flatten()(x)),
        ]

    net = small_models.model_of(build, IMAGE)
    rule = qat.Rule(
        weights=qat.TensorSpec(bits=bits, method=method), activations=qat.TensorSpec(bits=8)
    )
    model = small_models.quantized(net, qat.Recipe(name="low", rules=(rule,)))
    path = folder / f"w{bits}-{method}.tflite"
    qat.export_tflite(model, path)
    kernels = {t.name: t for t in read_file(path).tensors if t.name.endswith("/kernel")}
    to_keras = {
        "conv": lambda k: k.transpose(1, 2, 3, 0),
        "depthwise": lambda k: k.transpose(1, 2, 3, 0),
        "transposed": lambda k: k.transpose(1, 2, 0, 3),
        "dense": lambda k: k.T,
    }
    for name, restore in to_keras.items():
        tensor = kernels[f"{name}/kernel"]
        assert tensor.dtype == {1: "int2", "t": "int2", 2: "int2", 5: "int8"}.get(bits, "int4")
        assert (tensor.zero_point == 0).all()
        axis = 3 if name == "depthwise" else 0
        channels = np.moveaxis(tensor.data, axis, 0).reshape(tensor.data.shape[axis], -1)
        assert len(tensor.scale) == len(channels)
        for channel in channels:
            if bits == 1:
                assert len(np.unique(np.abs(channel))) == 1 and channel.all()
                assert len(np.unique(channel)) <= 2
                continue
            assert channel.min() >= codes[0] and channel.max() <= codes[1]
            # The grid is used: up to its end by min-max, nearly so where the step was searched.
            reached = max(-channel.min() / -codes[0], channel.max() / codes[1])
            assert reached == 1 if method == "minmax" else reached >= 0.5
        # The reals that the file stands for are the float kernel's nearest grid values.
        shape = [1] * tensor.data.ndim
        shape[axis] = -1
        real = restore(tensor.data * tensor.scale.astype(float).reshape(shape))
        weight = net.get_layer(name).get_weights()[0].astype(float)
        if bits == 1:
            np.testing.assert_array_equal(np.sign(real), np.where(weight >= 0, 1, -1))
            mean = np.abs(restore_channels(name, weight)).mean(axis=1)
            magnitude = np.abs(restore_channels(name, real)).max(axis=1)
            np.testing.assert_allclose(magnitude, mean, rtol=1e-5)
        else:
            # Min-max reaches every weight; what a learned grid does not reach saturates.
            low, high = (code * tensor.scale.astype(float).reshape(shape) for code in codes)
            inside = np.clip(weight, *(restore(end) for end in (low, high)))
            error = np.abs(restore_channels(name, inside - real)).max(axis=1)
            assert (error <= 0.5 * tensor.scale * (1 + 1e-5)).all()
            clipped = np.abs(restore_channels(name, weight - inside)).max(axis=1)
            assert method != "minmax" or (clipped <= 1e-5 * tensor.scale).all()


def restore_channels(name: str, kernel: np.ndarray) -> np.ndarray:
    """A Keras kernel as (output channels, rest)."""
    if name == "depthwise":
        return kernel.reshape(-1, kernel.shape[2] * kernel.shape[3]).T
    if name == "transposed":
        return kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)
    return kernel.reshape(-1, kernel.shape[-1]).T


def test_four_bits_take_half_the_bytes_and_speed_storage_does_not(folder):
    """The same integers in another container, whose kernels round their sums otherwise."""

    def build(x):
        x = layers.Conv2D(4, 3, use_bias=False, name="conv")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.DepthwiseConv2D(3, use_bias=False, name="depthwise")(x)
        return layers.Dense(3, use_bias=False, name="dense")(layers.Flatten()(x))

    net = small_models.model_of(build, IMAGE)
    model, data = small_models.quantized(net, small_models.recipe(4, 8)), small_models.data_for(net)
    size = qat.export_tflite(model, folder / "size.tflite")
    speed = qat.export_tflite(model, folder / "speed.tflite", weight_storage="speed")
    packed, plain = (
        {t.name: t for t in read_file(path).tensors if t.name.endswith("/kernel")}
        for path in (size, speed)
    )
    assert set(packed) == set(plain) == {"conv/kernel", "depthwise/kernel", "dense/kernel"}
    for name, tensor in packed.items():
        quick = "int4" if name.startswith("dense") else "int8"
        assert (tensor.dtype, plain[name].dtype) == ("int4", quick)
        np.testing.assert_array_equal(tensor.data, plain[name].data)
        assert tensor.bytes == math.ceil(tensor.data.size / 2)
        assert plain[name].bytes == (tensor.bytes if quick == "int4" else tensor.data.size)
    assert read_file(size).weight_bytes() < read_file(speed).weight_bytes()
    for kernels in small_models.KERNELS:
        one, other = (small_models.run_file(path, data, kernels)[0] for path in (size, speed))
        step = read_file(size).operators[-1].inputs[0].scale[0]
        assert np.abs(one - other).max() <= 2.01 * step


def test_constant_zero_huge_and_tiny_kernel_channels(folder):
    def build(x):
        return [
            layers.Conv2D(4, 3, name="conv")(x),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x),
        ]

    net = small_models.model_of(build, IMAGE)
    for name, key in (("conv", "kernel"), ("depthwise", "depthwise_kernel")):

        def change(value):
            flat = value.reshape(*value.shape[:2], -1) if name == "depthwise" else value  # noqa: B023
            flat[..., 0] = 0
            flat[..., 1] *= 1e-20
            flat[..., 2] *= 1e4
            return flat.reshape(value.shape)

        set_variable(net, name, key, change)
    model = small_models.quantized(net)
    path, data = folder / "extremes.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    for kernels in small_models.KERNELS:
        for index in range(2):
            assert np.rint(steps_apart(model, path, data, kernels, index)).max() <= 1


def test_a_kernel_and_a_model_of_zeros(folder):
    """Every output is its bias; ranges of [0, 0] must not divide by zero."""

    def build(x):
        x = layers.Conv2D(4, 3, name="conv", use_bias=False, activation="relu")(x)
        return layers.Dense(3, name="dense")(layers.Flatten()(x))

    net = small_models.model_of(build, IMAGE)
    set_variable(net, "conv", "kernel", np.zeros_like)
    model = small_models.quantized(net)
    path, data = folder / "zeros.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    (expected,) = small_models.run_model(model, data)
    step = read_file(path).operators[-1].inputs[0].scale[0]
    for kernels in small_models.KERNELS:
        (actual,) = small_models.run_file(path, data, kernels)
        np.testing.assert_allclose(actual, expected, atol=1.01 * step)


@pytest.mark.parametrize("offset", [0.0, -1.0])
def test_padding_of_a_rescaled_input(folder, offset):
    """Keras pads the rescaled image with 0; with an offset that is not pixel 0."""

    def build(x):
        x = layers.Rescaling(1 / 127.5, offset=offset, name="rescale")(x)
        return layers.Conv2D(4, 3, padding="same", name="conv")(x)

    net = small_models.model_of(build, IMAGE)
    data = [np.random.default_rng(0).integers(0, 256, (16, *IMAGE)).astype(np.float32)]
    model = small_models.quantized(net, data=data, input_range=(0, 255))
    path = folder / f"rescaled{offset}.tflite"
    qat.export_tflite(model, path)
    names = [op.name for op in read_file(path).operators]
    # Without an offset the scale goes into the kernel and costs no operator.
    between = [] if offset == 0 else ["DEPTHWISE_CONV_2D"]
    assert names == ["QUANTIZE", *between, "CONV_2D", "DEQUANTIZE"]
    # With an offset two operators follow each other: a step of the first moves some sums by one.
    # The range [-1, 1] must not put every pixel halfway between two codes (x - 127.5 steps).
    limit, share = (1, 0.05) if offset == 0 else (2, 0.15)
    assert_agree(model, path, data, limit=limit, share=share)
    # And against arithmetic in NumPy: the corner sees zeros, not the zero point's pixel.
    kernel, bias = net.get_layer("conv").get_weights()
    padded = np.pad(data[0] / 127.5 + offset, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = np.einsum("nhwc,hwco->no", padded[:, :3, :3], kernel) + bias
    (actual,) = small_models.run_file(path, data)
    # 27 products, each with weights and inputs off by half a step of their own.
    assert np.abs(actual[:, 0, 0] - corner).max() < 0.05 * np.abs(corner).max()


def test_a_large_bias_does_not_overflow(folder):
    """A bias of 1e6 beside outputs of 1: its int32 must not wrap to the other sign."""
    net = small_models.model_of(lambda x: layers.Conv2D(4, 3, name="conv")(x), IMAGE)
    set_variable(net, "conv", "kernel", lambda value: first(value[..., 0] * 1e-9)(value))
    set_variable(net, "conv", "bias", first(1e3))
    model = small_models.quantized(net)
    path, data = folder / "overflow.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    for kernels in small_models.KERNELS:
        assert np.rint(steps_apart(model, path, data, kernels)).max() <= 1


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-lsq", "w8a16"])
def test_units_that_no_example_activates(folder, recipe):
    """Zeros on a tiny grid: XNNPACK refuses to requantize to it, and with it the whole file."""

    def build(x):
        dead = layers.Conv2D(3, 3, padding="same", activation="relu", name="dead")(x)
        squeezed = layers.Conv2D(3, 1, activation="relu", name="squeezed")(
            layers.GlobalAveragePooling2D(keepdims=True)(x)
        )
        gate = layers.Conv2D(3, 1, activation="sigmoid")(squeezed)
        return [layers.Add()([x, dead]), layers.Multiply()([x, gate]), layers.Conv2D(4, 3)(dead)]

    net = small_models.model_of(build, IMAGE)
    for name in ("dead", "squeezed"):
        set_variable(net, name, "bias", lambda value: np.full_like(value, -1e3))
    set_variable(net, net.layers[-1].name, "bias", lambda value: np.linspace(1, 2, 4))
    model = small_models.quantized(net, recipe)
    path, data = folder / f"dead_{recipe}.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    for kernels in small_models.KERNELS:
        for index in range(3):
            assert np.rint(steps_apart(model, path, data, kernels, index)).max() <= 2
    verified = qat.verify_tflite(path, model, small_models.batches(data))
    assert verified.layers.not_compared == {}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a16"])
def test_a_bias_that_outgrew_the_range_it_was_calibrated_for(folder, recipe):
    """Neither its register nor the output's range holds it: file and model saturate alike."""
    net = small_models.model_of(lambda x: layers.Conv2D(4, 3, name="conv")(x), IMAGE)
    set_variable(net, "conv", "kernel", lambda value: value * 1e-11)
    set_variable(net, "conv", "bias", np.zeros_like)
    model = small_models.quantized(net, recipe)
    for layer in model.layers:
        if layer.name.endswith("conv"):
            set_variable(model, layer.name, "bias", lambda _: np.asarray([0, 1e-12, 1.0, -1.0]))
    path, data = folder / f"outgrown_{recipe}.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    assert integer_mismatches(model, read_file(path)) == []
    for kernels in small_models.KERNELS:
        assert np.rint(steps_apart(model, path, data, kernels)).max() <= 1


@pytest.mark.parametrize("factor", [1e10, 1e25])
def test_kernels_that_outgrew_the_range_they_were_calibrated_for(folder, factor):
    """Finite still, but training has diverged: no file, and the layer's name."""
    net = small_models.model_of(lambda x: layers.Conv2D(4, 3, name="conv")(x), IMAGE)
    model = small_models.quantized(net)
    set_variable(model, "quant_conv", "kernel", lambda value: value * factor)
    qat.settle_biases(model)
    with pytest.raises(qat.errors.QatError, match="'conv': the smallest step .*calibrate again"):
        qat.export_tflite(model, folder / "m.tflite")
    assert not (folder / "m.tflite").exists()


def test_sixteen_bit_activations_with_four_bit_kernels(folder):
    """LiteRT's 16x4 depthwise computes garbage: either refused, or right."""

    def build(x):
        return [layers.Conv2D(4, 3)(x), layers.DepthwiseConv2D(3)(x), layers.Dense(4)(x)]

    net = small_models.model_of(build, IMAGE)
    model = small_models.quantized(net, small_models.recipe(4, 16))
    path, data = folder / "w4a16.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    for kernels in small_models.KERNELS:
        for index in range(3):
            # float32 itself resolves the outputs to a few of 65,536 steps.
            assert np.rint(steps_apart(model, path, data, kernels, index)).max() <= 2


def test_a_layer_called_twice_behind_norms_of_opposite_signs(folder):
    """One kernel, two kernels in the file, each with the signs of its own batch norm."""

    def build(x):
        shared = layers.Conv2D(4, 3, name="shared")
        one, other = (layers.BatchNormalization(name=name) for name in ("one", "other"))
        return [one(shared(x)), other(shared(layers.MaxPooling2D(2, 1, padding="same")(x)))]

    net = small_models.model_of(build, IMAGE)
    set_variable(net, "one", "gamma", lambda _: np.asarray([1, -1, 0.5, -0.5]))
    set_variable(net, "other", "gamma", lambda _: np.asarray([-1, 1, 0.5, -0.5]))
    model = small_models.quantized(net)
    path, data = folder / "twice.tflite", small_models.data_for(net)
    qat.export_tflite(model, path)
    for kernels in small_models.KERNELS:
        for index in range(2):
            assert np.rint(steps_apart(model, path, data, kernels, index)).max() <= 1


@pytest.mark.parametrize("pool", [False, True])
def test_a_rescaling_that_kernels_read_at_several_widths(folder, pool):
    """It is an operator of its own there: a finer scale alone has no narrower codes."""

    def net(x):
        x = layers.Rescaling(1 / 255)(x)
        y = layers.MaxPooling2D(1)(x) if pool else x
        branches = [
            layers.Conv2D(4, 3, padding="same", name="four")(x),
            layers.Conv2D(4, 3, padding="same", name="eight")(y),
        ]
        return layers.Dense(3)(layers.Flatten()(layers.Add()(branches)))

    four = qat.TensorSpec(bits=4)
    rule = qat.Rule(layer="four", weights=four, activations=four)
    recipe = qat.Recipe.from_name("w8a8").with_rules(rule)
    pixels = np.random.default_rng(0).uniform(0, 255, (16, *IMAGE)).astype(np.float32)
    model = small_models.model_of(net, IMAGE)
    model = small_models.quantized(model, recipe, [pixels], input_range=(0, 255))
    path = qat.export_tflite(model, folder / f"widths{pool}.tflite")
    assert read_file(path).float_operators() == []
    assert integer_mismatches(model, read_file(path)) == []
    for kernels in small_models.KERNELS:
        assert np.rint(steps_apart(model, path, [pixels], kernels)).max() <= 1


def test_the_sign_of_an_average(folder):
    def net(x):
        x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
        y = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
        z = layers.Conv2D(4, 3, name="of_signs")(layers.Average()([x, y]))
        return layers.Dense(3)(layers.Flatten()(z))

    model = small_models.model_of(net, IMAGE)
    data = small_models.data_for(model)
    model = small_models.quantized(model, "w1a1", data)
    path = qat.export_tflite(model, folder / "sign_of_average.tflite")
    assert read_file(path).float_operators() == []
    assert integer_mismatches(model, read_file(path)) == []
    for kernels in small_models.KERNELS:
        assert np.rint(steps_apart(model, path, data, kernels)).max() <= 1


def test_slopes_that_maps_of_two_sizes_share(folder):
    def net(x, y):
        prelu, conv = layers.PReLU(shared_axes=[1, 2]), layers.Conv2D(4, 3)
        return [layers.GlobalAveragePooling2D()(prelu(conv(each))) for each in (x, y)]

    model = small_models.model_of(net, IMAGE, (9, 9, 3))
    data = small_models.data_for(model)
    model = small_models.quantized(model, "w8a8", data)
    path = qat.export_tflite(model, folder / "shared_slopes.tflite")
    assert integer_mismatches(model, read_file(path)) == []
    for index in (0, 1):
        assert steps_apart(model, path, data, "default", index).max() <= 1
