"""Keras 3 models converted to tf_keras. The oracle is Keras 3's own output."""

from __future__ import annotations

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers, ops

import qat
from qat.errors import ModelError
from qat.loading import files, safety

TOLERANCE = 1e-5  # of the largest output
IMAGE, SEQUENCE, VOLUME = (8, 6, 4), (8, 4), (6, 6, 6, 2)


def randomize(model, seed=0):
    """No weight keeps a constant that could hide a wrong order; kernels are random already."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        value = np.float32(ops.convert_to_numpy(weight))
        if "int" in weight.dtype or value.ndim > 1 and np.ptp(value):
            continue
        positive = any(part in weight.path for part in ("variance", "gamma"))
        draw = rng.uniform(0.5, 1.5, weight.shape) if positive else rng.normal(0, 0.3, weight.shape)
        weight.assign(draw)


def random_inputs(model, seed=1):
    rng = np.random.default_rng(seed)

    def draw(tensor):
        shape = (2, *tensor.shape[1:])
        if "int" in tensor.dtype:
            return rng.integers(0, 4, shape).astype(tensor.dtype)
        return rng.normal(0, 1, shape).astype(tensor.dtype)

    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(draw, inputs)


def converts(model, *, tolerance=None, **options):
    """Converts, compares the outputs of both, and gives the tf_keras model.

    tolerance: of the largest output, a function of the model and its inputs.
    """
    randomize(model)
    converted = qat.load_model(model, **options)
    assert isinstance(converted, tf_keras.Model)
    x = random_inputs(model)
    expected, got = model(x, training=False), converted(x, training=False)
    keras.tree.assert_same_structure(expected, got)
    outputs = zip(keras.tree.flatten_with_path(expected), keras.tree.flatten(got), strict=True)
    allowed = tolerance(model, x) if tolerance else TOLERANCE
    for (path, one), other in outputs:
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype.kind == other.dtype.kind and one.shape == other.shape, path
        largest = np.abs(one).max() + 1e-30
        np.testing.assert_allclose(other, one, rtol=0, atol=allowed * largest, err_msg=str(path))
    return converted


def chain(layer, shape, dtype="float32"):
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, layer(x))


def on_image(function):
    x = keras.Input(IMAGE)
    return keras.Model(x, function(x))


REGULARIZED = {
    "kernel_regularizer": "l2",
    "bias_initializer": keras.initializers.Constant(0.1),
    "kernel_constraint": keras.constraints.MaxNorm(100.0),
}
LAYERS = [
    (layers.Conv1D(3, 3, padding="causal", dilation_rate=2), SEQUENCE),
    (layers.Conv2D(4, (3, 2), 2, padding="same", groups=2, activation="relu"), IMAGE),
    (layers.Conv2D(4, 3, dilation_rate=2, use_bias=False, **REGULARIZED), IMAGE),
    (layers.Conv3D(3, 2, activation="silu"), VOLUME),
    (layers.Conv1DTranspose(3, 3, strides=2), SEQUENCE),
    (layers.Conv2DTranspose(3, 3, 2, padding="same", output_padding=1), IMAGE),
    (layers.Conv2DTranspose(3, 2, 3), IMAGE),
    (layers.Conv3DTranspose(2, 3, 2), VOLUME),
    (layers.DepthwiseConv1D(3, depth_multiplier=2), SEQUENCE),
    (layers.DepthwiseConv2D(3, 2, padding="same", depth_multiplier=2), IMAGE),
    (layers.SeparableConv1D(5, 3, depth_multiplier=2), SEQUENCE),
    (layers.SeparableConv2D(5, 3, padding="same", activation="tanh"), IMAGE),
    (layers.Dense(5, activation="gelu", **REGULARIZED), SEQUENCE),
    (layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d", activation="elu"), SEQUENCE),
    (layers.MaxPooling1D(2, 3, padding="same"), SEQUENCE),
    (layers.MaxPooling2D((2, 3), 2), IMAGE),
    (layers.MaxPooling3D(2), VOLUME),
    (layers.AveragePooling1D(3, 2, padding="same"), SEQUENCE),
    (layers.AveragePooling2D(3, 2, padding="same"), IMAGE),
    (layers.AveragePooling3D(2), VOLUME),
    (layers.GlobalAveragePooling1D(keepdims=True), SEQUENCE),
    (layers.GlobalAveragePooling2D(), IMAGE),
    (layers.GlobalAveragePooling3D(), VOLUME),
    (layers.GlobalMaxPooling1D(), SEQUENCE),
    (layers.GlobalMaxPooling2D(keepdims=True), IMAGE),
    (layers.GlobalMaxPooling3D(), VOLUME),
    (layers.BatchNormalization(epsilon=0.01), IMAGE),
    (layers.BatchNormalization(center=False, axis=1), IMAGE),
    (layers.BatchNormalization(scale=False, trainable=False), IMAGE),
    (layers.LayerNormalization(epsilon=1e-6), IMAGE),
    (layers.LayerNormalization(axis=(1, 2, 3), center=False), IMAGE),
    (layers.GroupNormalization(2), IMAGE),
    (layers.UnitNormalization(), IMAGE),
    (layers.SpectralNormalization(layers.Conv2D(3, 3)), IMAGE),
    (layers.ReLU(6.0, negative_slope=0.1, threshold=0.2), IMAGE),
    (layers.LeakyReLU(negative_slope=0.17), IMAGE),
    (layers.PReLU(shared_axes=[1, 2]), IMAGE),
    (layers.ELU(0.7), IMAGE),
    (layers.Softmax(axis=1), IMAGE),
    (layers.Rescaling(1 / 127.5, offset=-1.0), IMAGE),
    (layers.Rescaling([0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]), IMAGE),
    (layers.Normalization(mean=[1, 2, 3, 4], variance=[1, 2, 3, 4]), IMAGE),
    (layers.Normalization(axis=None, mean=1.0, variance=4.0, invert=True), IMAGE),
    (layers.Resizing(5, 7), IMAGE),
    (layers.Resizing(4, 4, "nearest", crop_to_aspect_ratio=True), IMAGE),
    (layers.CenterCrop(4, 4), IMAGE),
    (layers.RandomFlip(), IMAGE),
    (layers.RandomRotation(0.1), IMAGE),
    (layers.RandomTranslation(0.1, 0.2), IMAGE),
    (layers.RandomZoom(0.2), IMAGE),
    (layers.RandomContrast(0.2), IMAGE),
    (layers.RandomBrightness(0.2), IMAGE),
    (layers.RandomHue(0.2, value_range=(0, 1)), (8, 8, 3)),
    (layers.Dropout(0.3, noise_shape=(None, 1, 1, 4)), IMAGE),
    (layers.SpatialDropout1D(0.3), SEQUENCE),
    (layers.SpatialDropout2D(0.3), IMAGE),
    (layers.SpatialDropout3D(0.3), VOLUME),
    (layers.GaussianDropout(0.3), IMAGE),
    (layers.GaussianNoise(0.3), IMAGE),
    (layers.AlphaDropout(0.3), IMAGE),
    (layers.ActivityRegularization(l2=0.1), IMAGE),
    (layers.Identity(), IMAGE),
    (layers.Flatten(), IMAGE),
    (layers.Reshape((4, -1)), IMAGE),
    (layers.Permute((3, 1, 2)), IMAGE),
    (layers.RepeatVector(3), (4,)),
    (layers.Cropping1D((1, 2)), SEQUENCE),
    (layers.Cropping2D(((1, 0), (0, 2))), IMAGE),
    (layers.Cropping3D(1), VOLUME),
    (layers.ZeroPadding1D(2), SEQUENCE),
    (layers.ZeroPadding2D(((1, 0), (0, 2))), IMAGE),
    (layers.ZeroPadding3D(1), VOLUME),
    (layers.UpSampling1D(3), SEQUENCE),
    (layers.UpSampling2D((2, 3), interpolation="bilinear"), IMAGE),
    (layers.UpSampling3D(2), VOLUME),
    (layers.TimeDistributed(layers.Conv2D(3, 3, activation="relu")), (3, 6, 6, 2)),
]


def named_after_type(case):
    return type(case).__name__ if isinstance(case, layers.Layer) else ""


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=named_after_type)
def test_a_layer_computes_the_same(layer, shape):
    model = chain(layer, shape)
    converted = converts(model)
    assert [each.name for each in converted.layers] == [each.name for each in model.layers]
    made = converted.get_layer(layer.name)
    assert made.trainable == layer.trainable
    if not isinstance(layer, layers.RandomHue):  # tf_keras has none
        assert type(made) is getattr(tf_keras.layers, type(layer).__name__)
    for one, other in zip(model.weights, converted.weights, strict=False):
        if not isinstance(layer, layers.SpectralNormalization):
            np.testing.assert_array_equal(other.numpy(), one.numpy())


@pytest.mark.parametrize(
    ("layer", "dtype"),
    (
        (layers.Embedding(5, 3), "int32"),
        (layers.CategoryEncoding(5, output_mode="multi_hot"), "int32"),
        (layers.Discretization([0.5, 1.5, 2.5]), "int32"),
        (layers.Rescaling(1 / 255.0), "uint8"),
    ),
    ids=named_after_type,
)
def test_a_layer_of_integers_computes_the_same(layer, dtype):
    converts(chain(layer, (6,), dtype))


@pytest.mark.parametrize(
    "layer",
    (
        layers.Add(),
        layers.Average(),
        layers.Concatenate(axis=1),
        layers.Dot(axes=-1, normalize=True),
        layers.Maximum(),
        layers.Minimum(),
        layers.Multiply(),
        layers.Subtract(),
        layers.Attention(use_scale=True),
        layers.AdditiveAttention(),
    ),
    ids=named_after_type,
)
def test_a_layer_of_two_inputs_computes_the_same(layer):
    one, other = keras.Input(SEQUENCE), keras.Input(SEQUENCE)
    converts(keras.Model([one, other], layer([one, layers.Dense(4)(other)])))


def test_attention_computes_the_same():
    query, value = keras.Input((5, 6), name="query"), keras.Input((7, 6), name="value")
    attention = layers.MultiHeadAttention(2, 3, value_dim=4, output_shape=8, dropout=0.1)
    converts(keras.Model([query, value], attention(query, value, use_causal_mask=True)))


def test_masks_are_handed_on():
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True)(words)
    converts(keras.Model(words, layers.GlobalAveragePooling1D()(layers.Dropout(0.1)(x))))


ACTIVATIONS = (
    "celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear "
    "log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus "
    "softsign sparse_plus sparse_sigmoid squareplus tanh tanh_shrink"
)


def test_activations_compute_the_same():
    """As layers and as convolutions' own; one that tf_keras lacks is called twice."""
    x = keras.Input(IMAGE)
    outputs = {}
    for name in ACTIVATIONS.split():
        conv = layers.Conv2D(4, 1, activation=name, name=f"conv_{name}")
        y = layers.Activation(name, name=f"act_{name}")(conv(x) * 0.5)
        outputs[name] = conv(y) if name == "hard_silu" else y
    model = keras.Model(x, outputs)
    assert {op.name for op in model.operations} <= {layer.name for layer in converts(model).layers}


def test_a_layer_as_an_activation_computes_the_same():
    converts(chain(layers.Conv2D(3, 3, activation=layers.LeakyReLU(0.3)), IMAGE))


OPERATIONS = {
    "add": lambda x: x + 2.0,
    "radd": lambda x: 2 + x,
    "subtract": lambda x: 1.0 - x,
    "multiply": lambda x: x * np.arange(4, dtype="float32"),
    "divide": lambda x: x / 3.0 + 1.0 / (ops.abs(x) + 1.0),
    "floor_divide": lambda x: x // 0.7,
    "mod": lambda x: x % 0.7,
    "power": lambda x: ops.power(ops.abs(x), 1.5) + x**2,
    "negative": lambda x: -x,
    "maximum": lambda x: ops.maximum(x, 0.1) + ops.minimum(x, 0.2),
    "clip": lambda x: ops.clip(x, -0.5, 0.5),
    "exp": lambda x: ops.exp(x) + ops.expm1(x) + ops.sin(x) + ops.cos(x),
    "log": lambda x: ops.log(ops.abs(x) + 1) + ops.log1p(ops.square(x)),
    "logs": lambda x: ops.log2(ops.abs(x) + 1) + ops.log10(ops.abs(x) + 1),
    "sqrt": lambda x: ops.sqrt(ops.abs(x)) + ops.rsqrt(ops.abs(x) + 1) + ops.reciprocal(x + 9),
    "round": lambda x: ops.round(x) + ops.floor(x) + ops.ceil(x) + ops.sign(x),
    "round_to": lambda x: ops.round(x, 1),
    "erf": lambda x: ops.erf(x),
    "mean": lambda x: ops.mean(x, axis=(1, 2), keepdims=True),
    "mean_of_integers": lambda x: ops.mean(ops.cast(x * 5, "int32"), axis=-1),
    "sum": lambda x: ops.sum(x, axis=-1),
    "max": lambda x: ops.max(x, axis=1) + ops.amin(x, axis=1) + ops.prod(x, axis=1),
    "var": lambda x: ops.var(x, axis=(1, 2)) + ops.std(x, axis=(1, 2)),
    "logsumexp": lambda x: ops.logsumexp(x, axis=-1, keepdims=True),
    "argmax": lambda x: ops.argmax(x, axis=-1) + ops.argmin(x, axis=-1),
    "norm": lambda x: ops.norm(x, axis=-1, keepdims=True),
    "normalize": lambda x: ops.normalize(x, axis=-1),
    "where": lambda x: ops.where(x > 0, x, 0.0) + ops.where(x < 0, 1.0, x * 2),
    "compare": lambda x: ops.logical_or(ops.logical_not(x >= 0.5), ops.equal(x, 1.0)),
    "any": lambda x: ops.logical_and(ops.any(x > 1, axis=-1), ops.all(x < 3, axis=-1)),
    "types": lambda x: ops.cast(x * 3, "int32") + x,
    "float16": lambda x: ops.cast(ops.cast(x > 0, "float16"), "float32"),
    "item": lambda x: x[:, 1:, ::2],
    "item_of_all": lambda x: x[..., -1] + x[:, :, :, 0],
    "item_new": lambda x: x[:, None, 1:3, 2],
    "reverse": lambda x: x[:, ::-1] + ops.flip(x, axis=2),
    "reshape": lambda x: ops.reshape(x, (-1, 24, 8)),
    "ravel": lambda x: ops.ravel(x),
    "transpose": lambda x: ops.transpose(x, (0, 3, 1, 2)),
    "moveaxis": lambda x: ops.moveaxis(x, -1, 1) + ops.swapaxes(ops.swapaxes(x, 3, 1), 2, 3),
    "moveaxes": lambda x: ops.moveaxis(x, (1, 3), (2, 1)),
    "squeeze": lambda x: ops.squeeze(ops.expand_dims(x, (1, 3)), axis=(1,)),
    "concatenate": lambda x: ops.concatenate([x, x * 2, ops.relu(x)], axis=-1),
    "stack": lambda x: ops.stack([x, x + 1], axis=1),
    "unstack": lambda x: ops.unstack(x, axis=-1)[1],
    "split": lambda x: ops.multiply(*ops.split(x, 2, axis=-1)),
    "split_at": lambda x: ops.concatenate(ops.split(x, [1, 3], axis=2)[::-1], axis=2),
    "tile": lambda x: ops.tile(x, (1, 2, 1, 3)),
    "repeat": lambda x: ops.repeat(x, 2, axis=1),
    "roll": lambda x: ops.roll(x, 1, axis=2),
    "take": lambda x: ops.take(x, [2, 0], axis=-1),
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=1.5),
    "pad_reflect": lambda x: ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"),
    "ones_like": lambda x: ops.ones_like(x) * 2 + ops.zeros_like(x) + x,
    "matmul": lambda x: ops.matmul(x, np.ones((4, 3), "float32")),
    "matmul_self": lambda x: ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))),
    "dot": lambda x: ops.dot(x, np.ones((4, 3), "float32")),
    "tensordot": lambda x: ops.tensordot(x, np.ones((4, 3), "float32"), axes=1),
    "relu": lambda x: ops.relu(x) + ops.relu6(x * 9) + ops.leaky_relu(x, 0.3),
    "sigmoid": lambda x: ops.sigmoid(x) + ops.tanh(x) + ops.silu(x) + ops.hard_silu(x),
    "softmax": lambda x: ops.softmax(x, axis=1) + ops.log_softmax(x),
    "gelu": lambda x: ops.gelu(x) + ops.gelu(x, approximate=False),
    "elu": lambda x: ops.elu(x, 0.7) + ops.selu(x) + ops.softplus(x) + ops.celu(x, 0.5),
    "threshold": lambda x: ops.threshold(x, 0.1, 7.0),
    "max_pool": lambda x: ops.max_pool(x, 2) + ops.average_pool(x, (2, 2), strides=2),
    "average_pool": lambda x: ops.average_pool(x, 3, strides=2, padding="same"),
    "conv": lambda x: ops.conv(x, np.ones((3, 3, 4, 2), "float32"), 2, "same"),
    "one_hot": lambda x: ops.one_hot(ops.argmax(x, axis=-1), 4),
    "depth_to_space": lambda x: ops.depth_to_space(x, 2),
    "resize": lambda x: ops.image.resize(x, (5, 9)),
    "resize_nearest": lambda x: ops.image.resize(x, (16, 12), interpolation="nearest"),
    "resize_antialias": lambda x: ops.image.resize(x, (4, 4), antialias=True),
    "grayscale": lambda x: ops.image.rgb_to_grayscale(x[..., :3]),
    "pad_images": lambda x: ops.image.pad_images(x, 1, 2, target_height=11, target_width=10),
    "crop_images": lambda x: ops.image.crop_images(x, 1, 2, target_height=4, target_width=3),
    "stop_gradient": lambda x: ops.stop_gradient(ops.copy(x)),
}


def test_operations_compute_the_same(tmp_path):
    """One model for all, which takes less time than one for each."""
    model = on_image(lambda x: {name: make(x) for name, make in OPERATIONS.items()})
    converted = converts(model)
    assert {op.name for op in model.operations} <= {layer.name for layer in converted.layers}
    # What the conversion calls is no hidden code when the result is loaded again.
    converted.save(tmp_path / "model.keras")
    safety.check_safe(files.read_model_file(tmp_path / "model.keras"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_converted_operations_are_saved_and_loaded(name, tmp_path):
    model = on_image(OPERATIONS[name])
    converted = qat.load_model(model)
    converted.save(tmp_path / "model.keras")
    x = random_inputs(model)
    expected, got = converted(x), qat.load_model(tmp_path / "model.keras")(x)
    for one, other in zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True):
        np.testing.assert_array_equal(other, one)


# ---------------------------------------------------------------- graphs


def test_shared_layers_stay_shared():
    conv = layers.Conv2D(4, 3, padding="same", name="conv")
    x = keras.Input(IMAGE)
    converted = converts(keras.Model(x, conv(conv(x) + x)))
    assert [layer.name for layer in converted.layers].count("conv") == 1
    assert len(converted.weights) == 2


def test_nested_models_and_what_they_share():
    shared = layers.Dense(4, name="shared")
    x = keras.Input(IMAGE, name="inner_input")
    inner = keras.Model(x, [shared(x), ops.relu(x)], name="inner")
    stem = keras.Sequential([keras.Input(IMAGE), layers.Conv2D(4, 1), shared], name="stem")
    x = keras.Input(IMAGE)
    one, other = inner(stem(x))
    again, _ = inner(other)
    model = keras.Model(x, layers.Add()([one, again, shared(other)]))
    converted = converts(model)
    assert {"inner", "stem", "shared"} <= {layer.name for layer in converted.layers}
    inside = (converted.get_layer(name).get_layer("shared") for name in ("inner", "stem"))
    assert {id(converted.get_layer("shared"))} == {id(layer) for layer in inside}


def test_dictionaries_and_lists_of_tensors():
    image, scale = keras.Input(IMAGE, name="image"), keras.Input((1, 1, 4), name="scale")
    product = layers.Multiply()([image, scale])
    outputs = {"sum": ops.sum(product, axis=(1, 2)), "parts": [product, image + 1.0]}
    model = keras.Model({"image": image, "scale": scale}, outputs)
    converted = converts(model)
    got = converted(random_inputs(model))
    assert set(got) == {"sum", "parts"} and len(got["parts"]) == 2
    assert set(converted.input) == {"image", "scale"}


def test_sequential_models_and_batch_sizes():
    model = keras.Sequential([keras.Input(IMAGE, batch_size=2), layers.Flatten(), layers.Dense(3)])
    assert converts(model).input_shape == (2, *IMAGE)


def test_a_frozen_model_stays_frozen():
    model = keras.Sequential([keras.Input(IMAGE), layers.Conv2D(3, 3), layers.Flatten()])
    model.layers[0].trainable = False
    assert not converts(model).trainable_weights


@pytest.mark.parametrize("policy", ("mixed_float16", "bfloat16", "float16"))
def test_narrow_types_become_float32(policy, caplog):
    model = chain(layers.Conv2D(3, 3, dtype=policy), IMAGE)
    randomize(model)
    converted = qat.load_model(model)
    assert {weight.dtype for weight in converted.weights} == {tf.float32}
    for one, other in zip(model.weights, converted.weights, strict=True):
        np.testing.assert_array_equal(np.float32(ops.convert_to_numpy(one)), other.numpy())
    assert policy in caplog.text and "float32 from here on" in caplog.text


def test_a_normalization_that_saw_data_computes_the_same():
    layer = layers.Normalization(axis=(1, -1))
    layer.adapt(np.random.default_rng(0).normal(3, 2, (20, 4, 5, 1)).astype("float32"))
    converts(chain(layer, (4, 5, 1)))


@keras.saving.register_keras_serializable("test_keras3")
class Twice(layers.Layer):
    def call(self, x):
        return x * 2


class TwiceInTfKeras(tf_keras.layers.Layer):
    def call(self, x):
        return x * 2


def test_layers_of_the_users_own():
    model = chain(Twice(name="twice"), IMAGE)
    with pytest.raises(ModelError, match=r"'twice' \(Twice\) is your own Keras 3 layer"):
        qat.load_model(model)
    converted = converts(model, custom_objects={"Twice": TwiceInTfKeras})
    assert isinstance(converted.get_layer("twice"), TwiceInTfKeras)


# ---------------------------------------------------------------- refusals


class Subclassed(keras.Model):
    def call(self, x):
        return x


def subclassed_functional():
    class Mine(keras.Model):
        def call(self, x):
            return super().call(x) + 1

    x = keras.Input(IMAGE)
    return Mine(x, layers.Dense(2)(x), name="mine")


def quantized():
    model = chain(layers.Dense(2, name="dense"), SEQUENCE)
    model.quantize("int8")
    return model


REFUSED = {
    "subclassed": (lambda: Subclassed(name="sub"), r"'sub' is subclassed \(Subclassed\)"),
    "own call": (subclassed_functional, r"'mine' is subclassed \(Mine\)"),
    "unbuilt": (lambda: keras.Sequential([layers.Dense(2)], name="s"), "'s' is not built"),
    "recurrent": (lambda: chain(layers.LSTM(2, name="memory"), SEQUENCE), r"'memory' \(LSTM\)"),
    "own activation": (
        lambda: chain(layers.Dense(2, activation=lambda x: x, name="d"), SEQUENCE),
        "'d' .Dense. has activation",
    ),
    "option": (
        lambda: chain(layers.LayerNormalization(rms_scaling=True, name="n"), SEQUENCE),
        "'n' .* has rms_scaling=True",
    ),
    "operation": (lambda: on_image(lambda x: ops.sort(x)), "operation 'sort"),
    "option of one": (
        lambda: on_image(lambda x: ops.image.resize(x, (4, 4), pad_to_aspect_ratio=True)),
        "pad_to_aspect_ratio=True",
    ),
    "quantized": (quantized, "'dense' .* was quantized by Keras"),
    "not finite": (
        lambda: chain(layers.PReLU(alpha_initializer=keras.initializers.Constant(np.nan)), (4,)),
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named_in_one_line(case):
    make, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as error:
        qat.load_model(make())
    assert "\n" not in str(error.value)


def test_quantize_model_takes_a_keras_3_model():
    quantized_model = qat.quantize_model(chain(layers.Dense(3, name="head"), (4,)), "w8a8")
    assert "head" in [row.name for row in qat.quantization_report(quantized_model)]


# ---------------------------------------------------------------- keras.applications

CONSTRUCTORS = sorted(name for name in dir(keras.applications) if name[0].isupper())
SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}


def float32_noise(build, model, x):
    """Three times how far float32 takes Keras 3's own output from float64's, at least TOLERANCE.

    Deep networks of random weights enlarge the last bits of their sums: EfficientNetV2B3 by 5e-4.
    Once for Keras 3, once for ours (0.8 to 1.2 of it in four networks), once for chance.
    """
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        exact = build()
        exact.set_weights(model.get_weights())
        expected = np.asarray(exact(x.astype(np.float64), training=False))
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    distance = np.abs(np.asarray(model(x, training=False)) - expected).max()
    return max(TOLERANCE, 3 * float(distance / np.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_an_application_computes_the_same(name):
    size = SMALLEST.get(name, 32)

    def build():
        shape = (size, size, 3)
        application = getattr(keras.applications, name)
        return application(weights=None, input_shape=shape, classes=10, classifier_activation=None)

    model = build()
    converted = converts(model, tolerance=lambda model, x: float32_noise(build, model, x))
    kept = {operation.name for operation in model.operations}
    assert kept <= {layer.name for layer in converted.layers}
    del model, converted
    keras.backend.clear_session()
    tf_keras.backend.clear_session()
    gc.collect()
