"""Rewrites that leave the float function unchanged, one method each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.canonical import attention, composites
from qat.canonical.as_layers import as_layers
from qat.canonical.graph import Call, LayerCopies, calls, rebuild
from qat.errors import ModelError

layers = tf_keras.layers
_WITH_ACTIVATION = (
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.Dense,
)
_OF_MANY = (layers.Add, layers.Multiply)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
# TensorFlow's functions that are Keras's under another name or in another module.
_SAME = (
    (tf.nn.relu, tf_keras.activations.relu),
    (tf.nn.sigmoid, tf_keras.activations.sigmoid),
    (tf.nn.tanh, tf_keras.activations.tanh),
    (tf.nn.softmax, tf_keras.activations.softmax),
    (tf.nn.silu, tf_keras.activations.swish),
    (tf.nn.gelu, tf_keras.activations.gelu),
    (tf.nn.elu, tf_keras.activations.elu),
    (tf.nn.selu, tf_keras.activations.selu),
    (tf.nn.softplus, tf_keras.activations.softplus),
)


def canonicalize(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, str]]:
    """A new functional model of the same float function, and where its layers came from.

    Nested models, operator calls and helper layers become plain layers (`as_layers`), separable
    convolutions a depthwise and a pointwise one, attention Dense layers and products, sums and
    products of many pairs, and `activation=` arguments layers, so that each layer is one operator
    of the file. Activation functions get one spelling. Weights are copied.

    Returns:
        (model, origins): origins maps each new layer's name to the name of the user's layer.

    Raises:
        ModelError: subclassed or unbuilt models; operator calls that no layer does.
    """
    model, found = as_layers(model)
    rewriter = _Rewriter(model)
    result = rebuild(rewriter.model, rewriter.visit)
    rewriter.copies.copy_weights()
    for set_weights in rewriter.split_weights:
        set_weights()
    origins = rewriter.origins.items()
    return result, {name: found[old][0][0] if old in found else old for name, old in origins}


class _Rewriter:
    def __init__(self, model: tf_keras.Model):
        self.model = model
        self.copies = LayerCopies()
        self.origins = {layer.name: layer.name for layer in model.layers}
        self.made: dict[tuple[int, str], layers.Layer] = {}
        self.split_weights: list[Callable[[], None]] = []
        # A layer that is called in two ways, only one of which can be taken apart, stays one layer.
        self.whole = {
            id(call.layer)
            for call in calls(model)
            if not attention.takes_apart(call.layer, *call.arguments)
        }
        self.called = {id(call.layer) for call in calls(model)}
        made = {id(layer): _activity_layer(layer) for layer in model.layers}
        self.regularized = {key: make for key, make in made.items() if make is not None}

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        y = self.rewritten(call.layer, args, kwargs, len(call.inputs))
        if id(call.layer) not in self.regularized:
            return y
        # Of the whole layer's output, behind its activation.
        return self.once(call.layer, "activity", self.regularized[id(call.layer)])(y)

    def rewritten(self, layer: layers.Layer, args: tuple, kwargs: dict, num_inputs: int) -> Any:
        """The new model's output of one call."""
        if type(layer) in _SEPARABLE:
            return self.split_separable(layer, args[0])
        if type(layer) in _OF_MANY and num_inputs > 2:
            return self.split_pairs(layer, args[0])
        if composites.is_swish(layer):
            return composites.split_swish(layer, args[0], self.once)
        if type(layer) is layers.Average:
            return composites.split_average(layer, args[0], self.once)
        if isinstance(layer, layers.TimeDistributed):
            return self.without_time(layer, args[0])
        if type(layer) in attention.KINDS and id(layer) not in self.whole:
            x, setters = attention.take_apart(layer, args, kwargs, self.once)
            self.split_weights += setters
            return x if composites.is_linear(layer) else self.activated(layer, x)
        if type(layer) in _WITH_ACTIVATION and not composites.is_linear(layer):
            return self.split_activation(layer, args[0])
        if type(layer) is layers.Activation:
            return self.one_spelling(layer)(args[0])
        return self.copied(layer)(*args, **kwargs)

    def copied(self, layer: layers.Layer) -> layers.Layer:
        """The layer's copy, whose outputs something else regularizes."""
        copy = self.copies(layer)
        if id(layer) in self.regularized:
            copy.activity_regularizer = None
        return copy

    def without_time(self, layer: layers.TimeDistributed, x: Any) -> Any:
        """TimeDistributed → the layer that it repeats, the same one if that is called alone too."""
        inner = layer.layer
        if id(inner) in self.called:
            return self.rewritten(inner, (x,), {}, 1)
        made, set_weights = composites.without_time(layer, self.once)
        self.split_weights.append(set_weights)
        x = made(x)
        return x if composites.is_linear(inner) else self.activated(layer, x, inner)

    def one_spelling(self, layer: layers.Activation) -> layers.Layer:
        """Activation(f) → Activation(Keras's f), or the layer that f is one."""
        if isinstance(layer.activation, layers.Layer) or layer.activation is tf.nn.leaky_relu:
            made = _activation_layer(layer.activation, layer.name)
            return self.made.setdefault((id(layer), ""), made)
        copy = self.copies(layer)
        copy.activation = _keras_function(layer.activation)
        return copy

    def split_activation(self, layer: layers.Layer, x: Any) -> Any:
        """layer(activation=f) → layer, Activation(f)."""
        linear = self.copied(layer)
        linear.activation = tf_keras.activations.linear
        return self.activated(layer, linear(x))

    def split_pairs(self, layer: layers.Layer, inputs: list) -> Any:
        """A sum or product of many → of two and two, each of which has a grid of its own."""
        x, *rest = inputs
        for index, other in enumerate(rest[:-1]):
            pair = self.once(layer, f"part{index}", lambda name: type(layer)(name=name))
            x = pair([x, other])
        return self.copies(layer)([x, rest[-1]])

    def split_separable(self, layer: layers.Layer, x: Any) -> Any:
        """SeparableConv → depthwise, 1×1 convolution, activation.

        The depthwise layer gets a bias of zeros: something that `settle_biases` can settle.
        """
        depthwise = self.once(layer, "depthwise", lambda name: _depthwise_half(layer, name))
        pointwise = self.once(layer, "pointwise", lambda name: _pointwise_half(layer, name))

        def set_weights():
            kernel = layer.get_weights()[0]
            depthwise.set_weights([kernel, np.zeros(kernel.shape[-2] * kernel.shape[-1])])
            pointwise.set_weights(layer.get_weights()[1:])

        self.split_weights.append(set_weights)
        if layer.padding == "causal":
            before = (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
            pad = self.once(layer, "pad", lambda name: layers.ZeroPadding1D((before, 0), name=name))
            x = pad(x)
        x = pointwise(depthwise(x))
        return x if composites.is_linear(layer) else self.activated(layer, x)

    def activated(self, layer: layers.Layer, x: Any, inner: layers.Layer | None = None) -> Any:
        """The activation of the layer, or of the one in it, as a layer of its own, or as two."""
        function = (inner or layer).activation
        suffix = getattr(function, "__name__", "activation")
        made = self.once(layer, suffix, lambda name: _activation_layer(function, name))
        if composites.is_swish(made):
            return composites.split_swish(made, x, self.once)
        return made(x)

    def once(
        self,
        layer: layers.Layer,
        suffix: str,
        make: Callable[[str], layers.Layer],
        of: layers.Layer | None = None,
    ) -> layers.Layer:
        """A layer made from another one (or from `of`, inside of it), shared by all its calls."""
        of = of or layer
        key = id(of), suffix
        if key not in self.made:
            name = f"{layer.name}_{suffix}"
            while name in self.origins:
                name += "_"
            self.origins[name] = self.origins.get(layer.name, layer.name)
            self.made[key] = make(name)
            self.made[key].trainable = of.trainable
        return self.made[key]


def _activity_layer(layer: layers.Layer) -> Callable[[str], layers.Layer] | None:
    """What makes the layer that regularizes the outputs of this one; None if nothing does."""
    inner = layer.layer if isinstance(layer, layers.TimeDistributed) else layer
    regularizer = getattr(inner, "activity_regularizer", None)
    if regularizer is None or type(inner) not in (*_WITH_ACTIVATION, *_SEPARABLE):
        return None
    config = regularizer.get_config()
    if inner is not layer or set(config) - {"l1", "l2"}:
        raise ModelError(
            f"layer {layer.name!r} has the activity_regularizer {type(regularizer).__name__}; only "
            "l1 and l2 can be kept, and none over time: put ActivityRegularization behind the layer"
        )
    return lambda name: layers.ActivityRegularization(
        **{key: float(value) for key, value in config.items()}, name=name
    )


def _activation_layer(function: Any, name: str) -> layers.Layer:
    """The layer of an `activation=` argument: a function, or a layer itself."""
    if isinstance(function, layers.Layer):
        if function.weights:
            raise ModelError(
                f"layer {name!r} is a {type(function).__name__} with weights, given as an "
                "activation; call it as a layer of its own"
            )
        return type(function).from_config({**function.get_config(), "name": name})
    if function is tf.nn.leaky_relu:
        return layers.LeakyReLU(0.2, name=name)
    return layers.Activation(_keras_function(function), name=name)


def _keras_function(function: Any) -> Any:
    return next((keras for tensorflow, keras in _SAME if function is tensorflow), function)


def _depthwise_half(layer: layers.Layer, name: str) -> layers.Layer:
    one = isinstance(layer, layers.SeparableConv1D)
    kind = layers.DepthwiseConv1D if one else layers.DepthwiseConv2D
    return kind(
        layer.kernel_size,
        strides=layer.strides,
        padding="valid" if layer.padding == "causal" else layer.padding,
        depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
        depthwise_initializer=layer.depthwise_initializer,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        name=name,
    )


def _pointwise_half(layer: layers.Layer, name: str) -> layers.Layer:
    kind = layers.Conv1D if isinstance(layer, layers.SeparableConv1D) else layers.Conv2D
    return kind(
        layer.filters,
        1,
        data_format=layer.data_format,
        use_bias=layer.use_bias,
        kernel_initializer=layer.pointwise_initializer,
        kernel_regularizer=layer.pointwise_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_initializer=layer.bias_initializer,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        name=name,
    )
