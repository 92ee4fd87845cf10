"""Constant affine layers and frozen batch norms fold into the kernel behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras

from qat.canonical.graph import Call, calls, consumers, rebuild
from qat.operator_layers import Affine, FoldedAway

layers = tf_keras.layers
_KERNELS = (layers.Conv1D, layers.Conv2D, layers.Dense, layers.DepthwiseConv2D)


def fold_forward(
    model: tf_keras.Model, may_fold: Callable[[layers.Layer, layers.Layer], bool]
) -> tf_keras.Model:
    """The model with `W·(a·x + b) + c` as `(W·a)·x + (c + W·b)`, where that is the same.

    It is where the kernel never reads padding, and where nothing else reads the affine layer's
    output. A batch norm is affine when it is frozen; one that trains stays alive. One behind a
    kernel is left to fold into that kernel, as is a layer that is called several times.

    Args:
        model: canonical; its layers are shared with the result, and changed where folded into.
        may_fold: whether this affine layer may fold into this kernel's layer.
    """
    folding = _Folding(model, may_fold)
    if not folding.found:
        return model
    return rebuild(model, folding.visit)


class _Folding:
    def __init__(self, model: tf_keras.Model, may_fold: Callable):
        self.readers = consumers(model)
        self.producer = {id(call.output): call for call in calls(model)}
        self.counts: dict[int, int] = {}
        for call in calls(model):
            self.counts[id(call.layer)] = self.counts.get(id(call.layer), 0) + 1
        # For the id of an affine layer, the layer to fold it into, and back.
        self.found: dict[int, layers.Layer] = {}
        self.affine: dict[int, layers.Layer] = {}
        for call in calls(model):
            target = self._target(call)
            if target is not None and may_fold(call.layer, target):
                self.found[id(call.layer)] = target
                self.affine[id(target)] = call.layer

    def _target(self, call: Call) -> layers.Layer | None:
        frozen = isinstance(call.layer, layers.BatchNormalization) and not call.layer.trainable
        if not (frozen or isinstance(call.layer, Affine)) or not self._alone(call):
            return None
        before = self.producer.get(id(call.inputs[0]))
        if before is not None and type(before.layer) in (*_KERNELS, layers.Conv2DTranspose):
            return None
        reader = self.readers[id(call.output)][0].layer
        if type(reader) not in _KERNELS or self.counts[id(reader)] != 1 or _is_restrained(reader):
            return None
        one_pixel = set(getattr(reader, "kernel_size", (1,))) == {1}
        pads = getattr(reader, "padding", "valid") != "valid" and not one_pixel
        return None if pads or getattr(reader, "groups", 1) != 1 else reader

    def _alone(self, call: Call) -> bool:
        """Called once, and read by one call of a layer."""
        readers = self.readers[id(call.output)]
        return self.counts[id(call.layer)] == 1 and len(readers) == 1 and readers[0] is not None

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        layer = call.layer
        if id(layer) in self.found:
            into = self.found[id(layer)].name
            layer = FoldedAway(type(layer).__name__, into, name=layer.name)
            return layer(args[0])
        if id(layer) in self.affine:
            layer = _folded(layer, *_factors(self.affine[id(layer)]), args[0])
        return layer(*args, **kwargs)


def _is_restrained(layer: layers.Layer) -> bool:
    """Whether training holds its weights themselves to something, not their multiples."""
    return any(
        getattr(layer, f"{weight}_{kind}", None) is not None
        for weight in ("kernel", "depthwise", "bias")
        for kind in ("regularizer", "constraint")
    )


def _folded(layer: layers.Layer, a: np.ndarray, b: np.ndarray, x: Any) -> layers.Layer:
    """The layer on x instead of `a·x + b`; with a bias, if it had none."""
    kernel, *bias = layer.get_weights()
    a, b = (np.broadcast_to(part, kernel.shape[-2])[:, None] for part in (a, b))
    depthwise = isinstance(layer, layers.DepthwiseConv2D)
    shift = (kernel * b).sum(tuple(range(kernel.ndim - (2 if depthwise else 1)))).reshape(-1)
    made = layer
    if not layer.use_bias:
        made = type(layer).from_config({**layer.get_config(), "use_bias": True})
        made.trainable = layer.trainable
        made.build(x.shape)
    made.set_weights([kernel * a, shift + (bias[0] if bias else 0.0)])
    return made


def _factors(layer: layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, offset) of an affine layer."""
    if isinstance(layer, Affine):
        return np.asarray(layer.multiplier, float), np.asarray(layer.offset, float)
    mean, variance = layer.moving_mean.numpy().astype(float), layer.moving_variance.numpy()
    multiplier = (layer.gamma.numpy() if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon)
    return multiplier, (layer.beta.numpy() if layer.center else 0.0) - mean * multiplier
