"""Keras 3 layers as tf_keras layers: classes, configurations and weights, one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tf_keras
from absl import logging
from tf_keras.src.applications.convnext import LayerScale, StochasticDepth
from tf_keras.src.applications.inception_resnet_v2 import CustomScaleLayer

from qat.errors import ModelError
from qat.loading.keras3_operations import as_float32

layers = tf_keras.layers
# Layers that keras.applications defines for itself, in both Keras versions.
APPLICATION_LAYERS: dict[str, type] = {
    kind.__name__: kind for kind in (CustomScaleLayer, LayerScale, StochasticDepth)
}
_SAME_NAME = (
    "Activation ActivityRegularization Add AdditiveAttention AlphaDropout Attention Average "
    "AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization CategoryEncoding "
    "CenterCrop Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose "
    "Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Discretization Dot "
    "Dropout ELU EinsumDense Embedding Flatten GaussianDropout GaussianNoise "
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D "
    "GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization Identity LayerNormalization "
    "LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum MultiHeadAttention "
    "Multiply Normalization PReLU Permute RandomBrightness RandomContrast RandomFlip "
    "RandomRotation RandomTranslation RandomZoom ReLU RepeatVector Rescaling Reshape Resizing "
    "SeparableConv1D SeparableConv2D Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D "
    "SpectralNormalization Subtract TimeDistributed UnitNormalization UpSampling1D UpSampling2D "
    "UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D"
)
# {class of Keras 3: class of tf_keras}.
LAYERS: dict[str, type] = {
    **{name: getattr(layers, name) for name in _SAME_NAME.split()},
    **APPLICATION_LAYERS,
}
# Augmentation that tf_keras lacks; at inference these hand their input on.
AUGMENTATION = frozenset(
    "AugMix CutMix MixUp RandAugment RandomColorDegeneration RandomColorJitter "
    "RandomElasticTransform RandomErasing RandomGaussianBlur RandomGrayscale RandomHue "
    "RandomInvert RandomPerspective RandomPosterization RandomSaturation RandomSharpness "
    "RandomShear".split()
)
_RENAMED = {("LeakyReLU", "negative_slope"): "alpha"}
# Keys that tf_keras lacks, with the value at which they change nothing.
_NEUTRAL: dict[str, Any] = {
    "activity_regularizer": None,
    "antialias": False,
    "data_format": "channels_last",
    "pad_to_aspect_ratio": False,
    "quantization_config": None,
    "renorm": False,
    "rms_scaling": False,
    "sliding_window": None,
    "use_gate": False,
}
# Keys that tf_keras lacks and that say nothing without another one, or only about random numbers.
_IGNORED = ("fill_mode", "fill_value", "renorm_clipping", "renorm_momentum", "seed", "value_range")
# What tf_keras.layers.Layer takes without naming it.
_OF_EVERY_LAYER = ("name", "trainable", "dtype")
_OBJECTS: dict[str, Callable[[Any], Any]] = {
    "initializer": tf_keras.initializers.get,
    "regularizer": tf_keras.regularizers.get,
    "constraint": tf_keras.constraints.get,
}


def describe(layer: Any) -> str:
    """A layer, model or operation of Keras 3 in a message."""
    return f"layer {layer.name!r} ({type(layer).__name__})"


def is_of_keras(layer: Any) -> bool:
    """Whether a function, or the class of a layer, is Keras 3's own rather than the user's."""
    return str(getattr(layer, "__module__", "")).split(".")[0] == "keras"


def tf_keras_layer(layer: Any, custom_objects: Mapping[str, Any]) -> layers.Layer:
    """The same layer in tf_keras, not built; an activation that tf_keras lacks becomes linear.

    Args:
        layer: of Keras 3.
        custom_objects: {class name: tf_keras class} for the user's own layers.

    Raises:
        ModelError: a class or an option that tf_keras lacks, or a layer that Keras has quantized.
    """
    kind = type(layer).__name__
    if getattr(layer, "quantization_mode", None) is not None:
        raise ModelError(
            f"{describe(layer)} was quantized by Keras ({layer.quantization_mode}); give the float "
            "model it came from"
        )
    if is_of_keras(layer) and kind in AUGMENTATION:
        logging.warning(
            "%s: tf_keras has no such augmentation; it is left out of training, and does nothing "
            "at inference. Augment in tf.data instead.",
            describe(layer),
        )
        return layers.Identity(name=layer.name)
    if is_of_keras(layer) and kind == "Lambda":
        return layers.Lambda(layer.function, arguments=layer.arguments, name=layer.name)
    converted = _class_of(layer, custom_objects)
    if not is_of_keras(layer):
        return converted.from_config({**layer.get_config(), "dtype": "float32"})
    if issubclass(converted, layers.Wrapper):
        return _wrapper(layer, converted, custom_objects)
    if kind == "Normalization":
        return _normalization(layer)
    return converted(**_config(layer, converted))


def _class_of(layer: Any, custom_objects: Mapping[str, Any]) -> type:
    kind = type(layer).__name__
    if is_of_keras(layer):
        if kind in LAYERS:
            return LAYERS[kind]
        raise ModelError(
            f"{describe(layer)} has no counterpart in tf_keras here; replace it, or leave it "
            "out of the model that you quantize"
        )
    given = custom_objects.get(kind)
    if inspect.isclass(given) and issubclass(given, layers.Layer):
        return given
    raise ModelError(
        f"{describe(layer)} is your own Keras 3 layer; write it for tf_keras and call "
        f"qat.load_model(model, custom_objects={{{kind!r}: the tf_keras class}}) with the model "
        "that keras.saving.load_model gives"
    )


def _config(layer: Any, converted: type) -> dict[str, Any]:
    """The arguments of the tf_keras class, from the layer's configuration.

    Raises:
        ModelError: an option that tf_keras lacks, at a value that matters.
    """
    known = _parameters(converted)
    config = {}
    for key, value in layer.get_config().items():
        key = _RENAMED.get((type(layer).__name__, key), key)
        if key == "activation":
            same = has_activation(layer.activation)
            value = _SAME_ACTIVATION[layer.activation.__name__] if same else "linear"
        elif key == "dtype":
            value = as_float32(layer.compute_dtype)
        elif make := _OBJECTS.get(key.rsplit("_", 1)[-1]):
            value = _object(layer, key, value, make)
        if key in known or key in _OF_EVERY_LAYER:
            config[key] = value
        elif key == "activity_regularizer" and value is not None:
            config[key] = value
        elif key not in _IGNORED and (key not in _NEUTRAL or value != _NEUTRAL[key]):
            raise ModelError(f"{describe(layer)} has {key}={value!r}, which tf_keras lacks")
    return config


def _parameters(kind: type) -> set[str]:
    """Names that the constructors of a class and its bases take."""
    names = set()
    for base in kind.__mro__[: kind.__mro__.index(layers.Layer)]:
        names |= set(inspect.signature(base.__init__).parameters)
    return names - {"self", "args", "kwargs"}


def _object(layer: Any, key: str, value: Any, make: Callable) -> Any:
    """An initializer, regularizer or constraint."""
    if not isinstance(value, dict):
        return make(value)
    if value.get("registered_name") and key.endswith("initializer"):
        return "zeros"  # the user's own; the trained weights overwrite what it would make
    config = {k: v for k, v in value["config"].items() if k not in ("input_axes", "output_axes")}
    try:
        return make({"class_name": value["class_name"], "config": config})
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{describe(layer)} has {key}={value['class_name']}, which tf_keras lacks; set it to "
            "None"
        ) from error


_ACTIVATIONS = "elu exponential gelu linear mish relu selu sigmoid softmax softplus softsign tanh"
_SAME_ACTIVATION = {**{name: name for name in _ACTIVATIONS.split()}, "silu": "swish"}


def has_activation(function: Any) -> bool:
    """Whether tf_keras has an activation of Keras 3; hard_sigmoid is another function there."""
    return is_of_keras(function) and getattr(function, "__name__", "") in _SAME_ACTIVATION


def computes_in_float32(layer: Any) -> bool:
    """Whether a Keras 3 layer's floating numbers are float32."""
    return as_float32(layer.compute_dtype) == layer.compute_dtype


def _wrapper(layer: Any, kind: type, custom_objects: Mapping[str, Any]) -> layers.Layer:
    inner = tf_keras_layer(layer.layer, custom_objects)
    activation = getattr(layer.layer, "activation", None)
    if activation is not None and not has_activation(activation):
        raise ModelError(
            f"{describe(layer)} wraps a layer with activation={activation!r}, which tf_keras "
            "lacks; put the activation behind it, in a layer of its own"
        )
    options = {"name": layer.name, "trainable": layer.trainable}
    if kind is layers.SpectralNormalization:
        options["power_iterations"] = layer.power_iterations
    return kind(inner, **options)


def _normalization(layer: Any) -> layers.Layer:
    """Mean and variance, however Keras 3 came by them, become constants of the layer."""
    mean, variance = as_numpy(layer.mean), as_numpy(layer.variance)
    kept = [mean.shape[axis] for axis in sorted(axis % mean.ndim for axis in layer.axis)]
    return layers.Normalization(
        axis=layer.axis or None,
        mean=mean.reshape(kept),
        variance=variance.reshape(kept),
        invert=layer.invert,
        name=layer.name,
        trainable=layer.trainable,
    )


def copy_weights(layer: Any, converted: layers.Layer) -> None:
    """The weights of a Keras 3 layer into the tf_keras layer made from it, which is built.

    Raises:
        ModelError: other weights than tf_keras's layer has.
    """
    if isinstance(converted, layers.Normalization):
        return
    if isinstance(converted, layers.Wrapper):
        copy_weights(layer.layer, converted.layer)
        if isinstance(converted, layers.SpectralNormalization):
            converted.vector_u.assign(as_numpy(layer.vector_u))
        return
    source = [tuple(each.shape) for each in layer.weights]
    target = [tuple(each.shape) for each in converted.weights]
    if source != target:
        raise ModelError(f"{describe(layer)} has weights of {source}, tf_keras's of {target}")
    converted.set_weights([as_numpy(each) for each in layer.weights])


def as_numpy(value: Any) -> np.ndarray:
    """A variable or tensor of any Keras 3 backend; 16-bit floats become float32."""
    import keras

    value = keras.ops.convert_to_numpy(value)
    return value.astype(np.float32) if value.dtype.itemsize == 2 else value
