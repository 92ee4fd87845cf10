"""LayerQuantizeConfig under plain TFMOT: its own annotate, apply and default scheme."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from qat import configs, quantizers
from qat.configs import LayerQuantizeConfig
from qat.recipe import METHODS, RecipeError, TensorSpec

keras = tfmot.quantization.keras
layers = tf_keras.layers

# Layer -> (input shape, constructor, {kernel: axes that share one scale}).
KINDS = {
    "Conv1D": ((9, 3), lambda: layers.Conv1D(5, 3, name="k"), {"kernel": (0, 1)}),
    "Conv2D": ((7, 6, 3), lambda: layers.Conv2D(5, 3, name="k"), {"kernel": (0, 1, 2)}),
    "Depthwise": (
        (7, 6, 3),
        lambda: layers.DepthwiseConv2D(3, name="k"),
        {"depthwise_kernel": (0, 1)},
    ),
    "Depthwise2": (
        (7, 6, 3),
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="k"),
        {"depthwise_kernel": (0, 1)},
    ),
    "Separable": (
        (7, 6, 3),
        lambda: layers.SeparableConv2D(5, 3, depth_multiplier=2, name="k"),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    # The kernel of a transposed convolution is [h, w, out, in].
    "Transpose": ((4, 5, 3), lambda: layers.Conv2DTranspose(5, 3, name="k"), {"kernel": (0, 1, 3)}),
    "Dense": ((6,), lambda: layers.Dense(5, name="k"), {"kernel": (0,)}),
}
# In one dimension; the tests of the exported layers train them.
MORE_KINDS = {
    "Transpose1": ((5, 3), lambda: layers.Conv1DTranspose(5, 3, name="k"), {"kernel": (0, 2)}),
    "Depthwise1": (
        (7, 3),
        lambda: layers.DepthwiseConv1D(3, name="k"),
        {"depthwise_kernel": (0,)},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def quantized(kind, config):
    """(model, wrapper) by TFMOT's own functions and default scheme, weights random."""
    shape, make, _ = KINDS[kind]
    inputs = tf_keras.Input(shape)
    annotated = keras.quantize_annotate_layer(make(), config)
    model = keras.quantize_apply(tf_keras.Model(inputs, annotated(inputs)))
    wrapper = model.layers[-1]
    rng = np.random.default_rng(0)
    for variable in variables(wrapper).values():
        # Channels of very different size, in every axis: a shared scale would show.
        spread = np.exp(rng.normal(0, 1, variable.shape))
        variable.assign(rng.normal(0, 1, variable.shape) * spread)
    return model, wrapper


def variables(layer):
    """{own name: variable} of the kernels and the bias."""
    named = {v.name.split("/")[-1].split(":")[0]: v for v in layer.weights}
    return {name: v for name, v in named.items() if name.endswith("kernel") or name == "bias"}


def batch(kind, count=6):
    return np.random.default_rng(1).normal(size=(count, *KINDS[kind][0])).astype(np.float32)


def rounded(kernel, shared, bits):
    """A kernel on its symmetric narrow grid, in NumPy float32."""
    top = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(kernel).max(shared, keepdims=True) / top
    return np.rint(kernel / scale) * scale


def float_twin(kind, values):
    """A plain layer of this kind with these weights, {name: array}."""
    shape, make, _ = KINDS[kind]
    layer = make()
    layer.build((None, *shape))
    for name, variable in variables(layer).items():
        variable.assign(values[name])
    return layer


def values_of(layer):
    return {name: variable.numpy() for name, variable in variables(layer).items()}


@pytest.mark.parametrize(
    ("kind", "bits"), [*((kind, 4) for kind in KINDS), ("Conv2D", 2), ("Depthwise2", 8)]
)
def test_kernels_are_rounded_per_channel(kind, bits):
    _, wrapper = quantized(kind, configs.uniform(weight_bits=bits, activation_bits=None))
    x, floats = batch(kind), values_of(wrapper)
    y = wrapper(x, training=True).numpy()
    shared = KINDS[kind][2]
    kernels = {name: rounded(floats[name], axes, bits) for name, axes in shared.items()}
    for name, axes in shared.items():
        kernel = getattr(wrapper.layer, name).numpy()
        kept = [axis for axis in range(kernel.ndim) if axis not in axes]
        for channel in np.ndindex(*(kernel.shape[axis] for axis in kept)):
            values = kernel.transpose(*kept, *axes)[channel]
            assert 2 <= len(np.unique(values)) <= 2**bits - 1
    expected = float_twin(kind, floats | kernels)(x).numpy()
    # The convolutions sum some dozens of float32 products in orders of their own.
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    unquantized = float_twin(kind, floats)(x).numpy()
    # An 8-bit step is 1/127 of a channel's range, so the rounding must show above 1e-3 of it.
    assert np.abs(y - unquantized).max() > 1e-3 * np.abs(unquantized).max()


@every_kind
def test_values_are_those_of_the_quantizer_classes(kind):
    """The attribute that the layer computes with, bit for bit."""
    _, wrapper = quantized(kind, configs.uniform(weight_bits=3, activation_bits=None))
    floats = values_of(wrapper)
    wrapper(batch(kind))
    for name, shared in KINDS[kind][2].items():
        used = getattr(wrapper.layer, name)
        np.testing.assert_array_equal(used, rounded(floats[name], shared, 3))
        assert values_of(wrapper)[name].tobytes() == floats[name].tobytes()


@every_kind
def test_training_moves_every_variable(kind):
    model, wrapper = quantized(kind, configs.uniform(weight_bits=8))
    x = batch(kind)
    model(x, training=True)  # ranges
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True) - 1.0))
    gradients = tape.gradient(loss, model.trainable_variables)
    names = {variable.name.split("/")[-1] for variable in model.trainable_variables}
    assert names == {*(f"{name}:0" for name in KINDS[kind][2]), "bias:0"}
    assert all(np.count_nonzero(gradient) for gradient in gradients)
    before = values_of(wrapper)
    model.compile(tf_keras.optimizers.SGD(1e-4), "mse", run_eagerly=True)
    model.fit(x, np.ones(model.output_shape[1:], np.float32)[None].repeat(len(x), 0), verbose=0)
    after = values_of(wrapper)
    assert all((before[name] != after[name]).any() for name in before)


@every_kind
def test_outputs_lie_on_their_grid(kind):
    model, wrapper = quantized(kind, configs.uniform(weight_bits=8, activation_bits=4))
    x = batch(kind)
    for _ in range(3):
        y = model(x, training=True).numpy()
    assert 4 <= len(np.unique(y)) <= 16
    assert len(wrapper._output_quantizers) == 1
    _, wrapper = quantized(kind, configs.uniform(weight_bits=8, activation_bits=None))
    assert wrapper._output_quantizers == []


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        *((kind, made) for kind in KINDS for made in ("w4a8", "learned")),
        ("Conv2D", "w2"),
        ("Depthwise2", "binary"),
    ],
)
def test_h5_needs_only_tfmots_scope(kind, made, tmp_path):
    config = {
        "w4a8": configs.uniform(weight_bits=4),
        "w2": configs.uniform(weight_bits=2, activation_bits=None),
        "binary": configs.binary(surrogate="swish"),
        "learned": LayerQuantizeConfig(
            weights=TensorSpec(bits=4), output=TensorSpec(bits=4, method="lsqplus")
        ),
    }[made]
    model, _ = quantized(kind, config)
    x = batch(kind)
    model(x, training=True)
    for index, variable in enumerate(model.trainable_variables):
        variable.assign(variable * (1 + 0.01 * index) + 0.001)  # no gain is 1, no shift 0
    path = str(tmp_path / "model.h5")
    model.save(path)
    with keras.quantize_scope():
        restored = tf_keras.models.load_model(path)
    np.testing.assert_array_equal(restored(x), model(x))
    # Not only the weights: training goes on alike.
    np.testing.assert_array_equal(restored(2 * x, training=True), model(2 * x, training=True))
    assert restored.layers[-1].quantize_config == config
    names = [[v.name.split("/")[-1] for v in each.weights] for each in (model, restored)]
    assert names[0] == names[1]


def test_an_h5_file_knows_kernel_and_gain_apart(tmp_path):
    """A kernel of one input has its gain's shape: only the order of weights tells them apart."""
    config = LayerQuantizeConfig(weights=TensorSpec(bits=4))
    inputs = tf_keras.Input((1,))
    annotated = keras.quantize_annotate_layer(layers.Dense(3, use_bias=False), config)
    model = keras.quantize_apply(tf_keras.Model(inputs, annotated(inputs)))
    kernel, gain = model.trainable_variables
    assert kernel.shape == gain.shape == (1, 3)
    kernel.assign([[0.5, -0.25, 2.0]])
    gain.assign([[1.5, 1.25, 0.75]])
    model.save(str(tmp_path / "model.h5"))
    with keras.quantize_scope():
        restored = tf_keras.models.load_model(str(tmp_path / "model.h5"))
    values = {v.name.split("/")[-1]: v.numpy() for v in restored.trainable_variables}
    np.testing.assert_array_equal(values["kernel:0"], kernel)
    np.testing.assert_array_equal(values["kernel_gain:0"], gain)


def test_binary_kernels_are_plus_minus_their_mean():
    _, wrapper = quantized("Conv2D", configs.binary())
    kernel = values_of(wrapper)["kernel"]
    wrapper(batch("Conv2D"))
    alpha = np.abs(kernel.astype(float)).mean((0, 1, 2), keepdims=True)
    np.testing.assert_allclose(wrapper.layer.kernel, np.sign(kernel) * alpha, rtol=1e-5)
    assert wrapper._output_quantizers == []


def test_per_tensor_kernels_share_one_scale():
    config = LayerQuantizeConfig(weights=TensorSpec(bits=4, method="minmax", per_channel=False))
    _, wrapper = quantized("Conv2D", config)
    kernel = values_of(wrapper)["kernel"]
    wrapper(batch("Conv2D"))
    np.testing.assert_array_equal(wrapper.layer.kernel, rounded(kernel, None, 4))


def test_options_reach_the_quantizer():
    spec = TensorSpec(bits=8, options={"decay": 0.25})
    assert configs.activation_quantizer(spec).decay == 0.25
    spec = TensorSpec(bits=2, options={"narrow_range": False})
    assert configs.weight_quantizer(spec, (-1,)).narrow_range is False
    spec = TensorSpec(bits=1, options={"surrogate": "tanh", "steepness": 2.0})
    assert configs.activation_quantizer(spec).surrogate_options == {"steepness": 2.0}
    spec = TensorSpec(bits=1, options={"scaled": False})
    assert configs.weight_quantizer(spec, (-1,)).scaled is False


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_an_option_that_no_quantizer_has_is_one_line(bits):
    spec = TensorSpec(bits=bits, options={"speed": 3})
    for make in (configs.activation_quantizer, lambda spec: configs.weight_quantizer(spec, (-1,))):
        with pytest.raises(ValueError, match="speed") as error:
            make(spec)
        assert "\n" not in str(error.value)


def test_quantizers_of_a_width():
    assert configs.activation_quantizer(TensorSpec(bits=16)) == quantizers.MovingAverageQuantizer(
        num_bits=16, symmetric=True
    )
    assert configs.activation_quantizer(TensorSpec(bits=1)) == (
        quantizers.BinaryActivationQuantizer()
    )
    assert configs.weight_quantizer(TensorSpec(bits=5), (-2, -1)) == quantizers.LastValueQuantizer(
        num_bits=5, symmetric=True, channel_axes=(-2, -1)
    )
    assert configs.weight_quantizer(TensorSpec(bits=1, per_channel=False), (-1,)) == (
        quantizers.BinaryWeightQuantizer(channel_axes=None)
    )


LEARNED = {
    "lsq": (quantizers.LsqQuantizer, {}),
    "ewgs": (quantizers.LsqQuantizer, {"backward": "ewgs"}),
    "dsq": (quantizers.LsqQuantizer, {"backward": "dsq"}),
}


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("bits", ["t", 2, 3, 4, 8])
def test_learned_kernels(method, bits):
    """Ternary is -1, 0, 1; two and three bits take the lowest code too, as LSQ does."""
    kind, options = LEARNED[method]
    made = configs.weight_quantizer(TensorSpec(bits=bits, method=method), (-2, -1))
    assert made == kind(
        num_bits=2 if bits == "t" else bits,
        symmetric=True,
        narrow_range=bits not in (2, 3),
        channel_axes=(-2, -1),
        **options,
    )
    top = {"t": 1, 2: 1, 3: 3, 4: 7, 8: 127}[bits]
    assert made.codes_range == (-top - 1 if bits in (2, 3) else -top, top)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("minmax", quantizers.MovingAverageQuantizer(num_bits=4)),
        ("lsq", quantizers.LsqQuantizer(num_bits=4)),
        ("lsqplus", quantizers.LsqPlusQuantizer(num_bits=4)),
        ("pact", quantizers.PactQuantizer(num_bits=4)),
        ("ewgs", quantizers.LsqQuantizer(num_bits=4, backward="ewgs")),
        ("dsq", quantizers.LsqQuantizer(num_bits=4, backward="dsq")),
        ("dorefa", quantizers.DorefaActivationQuantizer(num_bits=4)),
    ],
)
def test_activations_of_a_method(method, expected):
    assert configs.activation_quantizer(TensorSpec(bits=4, method=method)) == expected


ROLES = {
    "weights": lambda spec: configs.weight_quantizer(spec, (-1,)),
    "activations": configs.activation_quantizer,
}
EVERY_SPEC = [
    (role, bits, method)
    for method, made in METHODS.items()
    for role in ROLES
    for bits in getattr(made, role)
]


@pytest.mark.parametrize(("role", "bits", "method"), EVERY_SPEC)
def test_every_spec_makes_a_quantizer_that_says_what_it_is(role, bits, method):
    made = ROLES[role](TensorSpec(bits=bits, method=method))
    assert type(made.num_bits) is int and made.num_bits == (2 if bits == "t" else bits)
    # A reactnet kernel is a binary one; what surrounds it makes the method.
    assert made.method == method or (method == "reactnet" and made.method == "binary")


def test_options_go_before_the_methods_own():
    spec = TensorSpec(bits=4, method="ewgs", options={"strength": 0.2, "narrow_range": False})
    made = configs.weight_quantizer(spec, (-1,))
    assert (made.backward.rule, made.backward.strength) == ("ewgs", 0.2)
    assert made.narrow_range is False


CONFIGS = {
    "uniform": configs.uniform(),
    "uniform2": configs.uniform(weight_bits=2, activation_bits=None),
    "binary": configs.binary(surrogate="identity"),
    "float": configs.keep_float("first layer"),
    "options": LayerQuantizeConfig(
        weights=TensorSpec(bits=1, options={"scaled": False}),
        output=TensorSpec(bits=16, options={"decay": 0.5}),
    ),
    "nothing": LayerQuantizeConfig(),
    "learned": LayerQuantizeConfig(
        weights=TensorSpec(bits="t"), output=TensorSpec(bits=4, method="pact")
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name):
    config = CONFIGS[name]
    text = json.dumps(config.get_config())
    assert LayerQuantizeConfig.from_config(json.loads(text)) == config
    serialized = tf_keras.utils.legacy.serialize_keras_object(config)
    restored = tf_keras.utils.legacy.deserialize_keras_object(json.loads(json.dumps(serialized)))
    assert type(restored) is LayerQuantizeConfig
    assert [other for other in CONFIGS if CONFIGS[other] == restored] == [name]


def test_keep_float_leaves_the_layer_alone():
    model, wrapper = quantized("Conv2D", configs.keep_float("sensitive"))
    x = batch("Conv2D")
    expected = float_twin("Conv2D", values_of(wrapper))(x)
    np.testing.assert_allclose(wrapper(x, training=True), expected, rtol=1e-6, atol=1e-6)
    assert wrapper.quantize_config.keep_float == "sensitive"


def test_keep_float_excludes_specs():
    for specs in ({"weights": TensorSpec()}, {"output": TensorSpec()}):
        with pytest.raises(ValueError, match="keep_float or specs, not both"):
            LayerQuantizeConfig(keep_float="why", **specs)


def test_a_config_names_its_methods():
    """The best known can change between saving and loading."""
    config = LayerQuantizeConfig(weights=TensorSpec(bits=4), output=TensorSpec(bits=8))
    assert (config.weights.method, config.output.method) == ("lsq", "minmax")
    content = config.get_config()
    assert (content["weights"]["method"], content["output"]["method"]) == ("lsq", "minmax")
    assert configs.uniform(weight_bits=4, activation_bits=4).get_config() == (
        LayerQuantizeConfig(
            weights=TensorSpec(bits=4, method="minmax"),
            output=TensorSpec(bits=4, method="minmax"),
        ).get_config()
    )


@pytest.mark.parametrize(
    "specs",
    [
        {"weights": TensorSpec(bits=16)},
        {"weights": TensorSpec(bits=4, method="pact")},
        {"output": TensorSpec(bits="t")},
        {"output": TensorSpec(bits=4, method="statsq")},
    ],
)
def test_what_a_role_does_not_have_is_refused_at_once(specs):
    with pytest.raises(RecipeError) as error:
        LayerQuantizeConfig(**specs)
    assert "\n" not in str(error.value)


def test_a_layer_without_kernel_is_named():
    with pytest.raises(ValueError, match="layer 'act' \\(ReLU\\) has no kernel.*Conv2D") as error:
        configs.uniform().get_weights_and_quantizers(layers.ReLU(name="act"))
    assert "\n" not in str(error.value)


def test_kernels_of_every_layer_have_channels_where_keras_has_them():
    kinds = [*KINDS.values(), *MORE_KINDS.values()]
    assert set(configs.KERNELS) == {type(make()) for _, make, _ in kinds}
    for shape, make, shared in kinds:
        layer = make()
        layer.build((None, *shape))
        for name, axes in configs.kernels(layer).items():
            kernel = getattr(layer, name)
            kept = {axis % len(kernel.shape) for axis in axes}
            assert kept == set(range(len(kernel.shape))) - set(shared[name])
    assert configs.kernels(layers.ReLU()) == {}
