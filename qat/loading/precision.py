"""tf_keras models that compute in 16 bits, or 64, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tf_keras
from absl import logging


def in_float32(model: tf_keras.Model) -> tf_keras.Model:
    """The model itself if its floating numbers are float32, else a copy of it where they are."""
    others = [layer for layer in model._flatten_layers() if not _is_float32(layer)]
    if not others:
        return model
    logging.warning(
        "model %r: %d layers, %r first, computed in %s; they compute in float32 from here on",
        model.name,
        len(others),
        others[0].name,
        others[0].dtype_policy.name,
    )
    return _copy(model)


@contextlib.contextmanager
def made_in_float32() -> Iterator[None]:
    """Inside, new layers compute in float32, whatever the global policy of mixed precision."""
    before = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        tf_keras.mixed_precision.set_global_policy(before)


def _is_float32(layer: tf_keras.layers.Layer) -> bool:
    kind = layer.dtype_policy.compute_dtype or "float32"
    return "float" not in kind or kind == "float32"


def _copy(model: tf_keras.Model) -> tf_keras.Model:
    copy = tf_keras.models.clone_model(model, clone_function=_layer)
    copy.set_weights(model.get_weights())
    copy.trainable = model.trainable
    for layer, original in zip(copy.layers, model.layers, strict=True):
        layer.trainable = original.trainable
    return copy


def _layer(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
    if isinstance(layer, tf_keras.Model):
        return _copy(layer)
    return type(layer).from_config(_config(layer.get_config()))


def _config(value: Any) -> Any:
    """A configuration whose floating types, those of wrapped layers too, are float32."""
    if isinstance(value, dict):
        return {
            key: "float32" if key == "dtype" and "float" in str(inner) else _config(inner)
            for key, inner in value.items()
        }
    return [_config(inner) for inner in value] if isinstance(value, list) else value
