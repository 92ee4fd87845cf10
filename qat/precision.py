"""Mixed precision: a network computes in 16 bits what it can, and is otherwise the same network."""

from __future__ import annotations

import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.canonical import calls, functional
from qat.deep import deep_models
from qat.wrapper import kernels_once_a_call

LEGAL = ("float32", "bfloat16", "float16")


@deep_models()
def in_precision(model: tf_keras.Model, dtype: str) -> tf_keras.Model:
    """The model with a compute type for its layers; float32 = the model itself.

    Variables stay float32: of kernels, quantizers, ranges and batch normalization. Quantizers read
    kernels before Keras rounds these to 16 bits, and compute their codes in float32; a 16-bit value
    is `code · scale`, rounded. In float32 stay the quantizers of activations, the last kernel and
    what follows it, and layers that are not Keras's own.

    Args:
        model: float or quantized. dtype: one of `LEGAL`.

    Returns:
        A new model with the same values; `set_weights` takes its weights back in their order.

    Raises:
        ValueError: an unknown dtype.

    Source: Micikevicius et al., arXiv 1710.03740.
    """
    if dtype not in LEGAL:
        raise ValueError(f"mixed_precision must be one of {', '.join(LEGAL)}, got {dtype!r}")
    if dtype == "float32":
        return model
    model = functional(model)
    kept = _last_layers(model)

    def copy(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        config = layer.get_config()
        inner = layer.layer if isinstance(layer, QuantizeWrapper) else layer
        if id(layer) not in kept and type(inner).__module__.startswith("tf_keras."):
            config["dtype"] = f"mixed_{dtype}"
            if inner is not layer:
                config["layer"]["config"]["dtype"] = f"mixed_{dtype}"
        return type(layer).from_config(config)

    with tfmot.quantization.keras.quantize_scope():
        made = tf_keras.models.clone_model(model, clone_function=copy)
    made.set_weights(model.get_weights())
    return kernels_once_a_call(made)


def _last_layers(model: tf_keras.Model) -> set[int]:
    """Ids of the last layer with a kernel and of all after it."""
    ordered = [call.layer for call in calls(model)]
    kernels = [
        index
        for index, layer in enumerate(ordered)
        if configs.kernels(getattr(layer, "layer", layer))
    ]
    return {id(layer) for layer in ordered[kernels[-1] if kernels else 0 :]}
