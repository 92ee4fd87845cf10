"""Layers that are a factor → `Affine`, `ChannelScale`; drop paths, crops and bins.

Each function takes an `OperatorCall` and the call's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras
from tf_keras.src.applications.convnext import LayerScale, StochasticDepth
from tf_keras.src.applications.inception_resnet_v2 import CustomScaleLayer

from qat.canonical.operator_arithmetic import affine
from qat.canonical.operator_call import NoLayerError, OperatorCall
from qat.operator_layers import Affine, Buckets, ChannelScale

layers = tf_keras.layers
_MOST_BOUNDARIES = 255  # an 8-bit code for every bucket


def _normalization(call: OperatorCall, x: Any) -> Any:
    """`(x - μ) / σ` with the statistics that it was adapted to, or back."""
    layer = call.call.layer
    mean = np.asarray(layer.mean, float)
    deviation = np.maximum(np.sqrt(np.asarray(layer.variance, float)), tf_keras.backend.epsilon())
    if layer.invert:
        return affine(call, x, deviation, mean)
    if not mean.any() and (deviation == 1).all():
        return x
    return affine(call, x, 1 / deviation, -mean / deviation)


def _layer_scale(call: OperatorCall, x: Any) -> Any:
    scale = call.layer(ChannelScale)
    output = scale(x)
    scale.set_weights(call.call.layer.get_weights())
    return output


def _stochastic_depth(call: OperatorCall, x: Any) -> Any:
    """The same dropout: one draw for each example."""
    rate, shape = call.call.layer.drop_path_rate, (None,) + (1,) * (len(x.shape) - 1)
    return call.layer(layers.Dropout, rate, noise_shape=shape)(x)


def _scaled_sum(call: OperatorCall, inputs: list) -> Any:
    """`a + scale · b`."""
    a, b = inputs
    b = call.layer(Affine, call.call.layer.scale, suffix="scale")(b)
    return call.layer(layers.Add)([a, b])


def _random_crop(call: OperatorCall, x: Any) -> Any:
    """Nothing, if it crops nothing; in inference it resizes instead."""
    layer = call.call.layer
    if tuple(x.shape[1:3]) != (layer.height, layer.width):
        raise NoLayerError("it resizes in inference; crop in the dataset instead")
    return x


def _center_crop(call: OperatorCall, x: Any) -> Any:
    layer = call.call.layer
    sizes = zip(x.shape[1:3], (layer.height, layer.width), strict=True)
    spare = [-1 if size is None else size - wanted for size, wanted in sizes]
    if min(spare) < 0:
        raise NoLayerError("it crops images of a known size, no smaller than its own, alone")
    cropping = tuple((rest // 2, rest - rest // 2) for rest in spare)
    return call.layer(layers.Cropping2D, cropping)(x)


def _discretization(call: OperatorCall, x: Any) -> Any:
    layer = call.call.layer
    if layer.output_mode != "int" or layer.sparse:
        raise NoLayerError(
            f"only output_mode='int' is an operator, not {layer.output_mode!r}; for one-hot "
            "numbers put an Embedding behind it whose rows are the identity matrix"
        )
    boundaries = layer.bin_boundaries
    if not 0 < len(boundaries) <= _MOST_BOUNDARIES:
        raise NoLayerError(
            f"it has {len(boundaries)} boundaries, legal: 1 to {_MOST_BOUNDARIES}; adapt it, or "
            "take fewer bins"
        )
    return call.layer(Buckets, boundaries)(x)


REWRITES: dict[type, Callable[..., Any]] = {
    CustomScaleLayer: _scaled_sum,
    LayerScale: _layer_scale,
    StochasticDepth: _stochastic_depth,
    layers.CenterCrop: _center_crop,
    layers.Discretization: _discretization,
    layers.Normalization: _normalization,
    layers.RandomCrop: _random_crop,
}
