"""Rewrites that leave the float function unchanged, one method each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tf_keras

from qat.canonical import composites
from qat.canonical.graph import Call, LayerCopies, functional, rebuild
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


def canonicalize(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, str]]:
    """A new functional model of the same float function, and where its layers came from.

    Separable convolutions become a depthwise and a pointwise one, sums and products of many
    become pairs, and `activation=` arguments become layers, so that each layer is one operator of
    the file. Weights are copied.

    Returns:
        (model, origins): origins maps each new layer's name to the name of the user's layer.

    Raises:
        ValueError: subclassed or unbuilt models; models nested in models.
    """
    rewriter = _Rewriter(functional(model))
    result = rebuild(rewriter.model, rewriter.visit)
    rewriter.copies.copy_weights()
    for set_weights in rewriter.split_weights:
        set_weights()
    return result, rewriter.origins


class _Rewriter:
    def __init__(self, model: tf_keras.Model):
        self.model = model
        self.copies = LayerCopies()
        self.origins = {layer.name: layer.name for layer in model.layers}
        self.made: dict[tuple[int, str], layers.Layer] = {}
        self.split_weights: list[Callable[[], None]] = []

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        layer = call.layer
        if isinstance(layer, tf_keras.Model):
            raise ModelError(
                f"layer {layer.name!r} is a model nested in {self.model.name!r}; flatten it: "
                "build one functional model from its layers"
            )
        if type(layer) is layers.SeparableConv2D:
            return self.split_separable(layer, args[0])
        if type(layer) in _OF_MANY and len(call.inputs) > 2:
            return self.split_pairs(layer, args[0])
        if composites.is_swish(layer):
            return composites.split_swish(layer, args[0], self.once)
        if type(layer) is layers.Average:
            return composites.split_average(layer, args[0], self.once)
        if isinstance(layer, layers.TimeDistributed):
            inner, set_weights = composites.without_time(layer, self.once)
            self.split_weights.append(set_weights)
            x = inner(args[0])
            return x if composites.is_linear(layer.layer) else self.activated(layer, x, layer.layer)
        if type(layer) in _WITH_ACTIVATION and not composites.is_linear(layer):
            return self.split_activation(layer, args[0])
        return self.copies(layer)(*args, **kwargs)

    def split_activation(self, layer: layers.Layer, x: Any) -> Any:
        """layer(activation=f) → layer, Activation(f)."""
        linear = self.copies(layer)
        linear.activation = tf_keras.activations.linear
        return self.activated(layer, linear(x))

    def split_pairs(self, layer: layers.Layer, inputs: list) -> Any:
        """A sum or product of many → of two and two, each of which has a grid of its own."""
        x, *rest = inputs
        for index, other in enumerate(rest[:-1]):
            pair = self.once(layer, f"part{index}", lambda name: type(layer)(name=name))
            x = pair([x, other])
        return self.copies(layer)([x, rest[-1]])

    def split_separable(self, layer: layers.SeparableConv2D, x: Any) -> Any:
        """SeparableConv2D → depthwise (no bias), 1×1 convolution (bias), activation."""
        depthwise = self.once(layer, "depthwise", lambda name: _depthwise_half(layer, name))
        pointwise = self.once(layer, "pointwise", lambda name: _pointwise_half(layer, name))

        def set_weights():
            depthwise.set_weights(layer.get_weights()[:1])
            pointwise.set_weights(layer.get_weights()[1:])

        self.split_weights.append(set_weights)
        x = pointwise(depthwise(x))
        return x if composites.is_linear(layer) else self.activated(layer, x)

    def activated(self, layer: layers.Layer, x: Any, inner: layers.Layer | None = None) -> Any:
        """The activation of the layer, or of the one in it, as a layer of its own, or as two."""
        function = (inner or layer).activation
        name = getattr(function, "__name__", "activation")
        made = self.once(layer, name, lambda name: layers.Activation(function, name=name))
        if composites.is_swish(made):
            return composites.split_swish(made, x, self.once)
        return made(x)

    def once(
        self, layer: layers.Layer, suffix: str, make: Callable[[str], layers.Layer]
    ) -> layers.Layer:
        """A layer made from another one, shared by all calls of that one."""
        key = id(layer), suffix
        if key not in self.made:
            name = f"{layer.name}_{suffix}"
            while name in self.origins:
                name += "_"
            self.origins[name] = self.origins.get(layer.name, layer.name)
            self.made[key] = make(name)
            self.made[key].trainable = layer.trainable
        return self.made[key]


def _depthwise_half(layer: layers.SeparableConv2D, name: str) -> layers.Layer:
    return layers.DepthwiseConv2D(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
        use_bias=False,
        depthwise_initializer=layer.depthwise_initializer,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        name=name,
    )


def _pointwise_half(layer: layers.SeparableConv2D, name: str) -> layers.Layer:
    return layers.Conv2D(
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
        activity_regularizer=layer.activity_regularizer,
        name=name,
    )
