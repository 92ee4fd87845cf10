"""Attention and other products of activations → Dense layers, `MatMul` and softmax.

`softmax(q · kᵀ / √d) · v`, with q, k and v projected and split into heads (Vaswani et al. 2017,
arXiv 1706.03762, equation 1). With masks or over several axes they stay the layers they are.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import tf_keras

from qat.canonical.composites import Once
from qat.errors import ModelError
from qat.operator_layers import MatMul

layers = tf_keras.layers
SetWeights = Callable[[], None]
_DENSE = re.compile(r"((?:\.\.\.)?\w*)(\w),(\w)(\w)->((?:\.\.\.)?\w*)(\w)")


def takes_apart(layer: layers.Layer, args: tuple, kwargs: dict) -> bool:
    """Whether `take_apart` knows this call.

    Raises:
        ModelError: an attention that is causal by an option that Keras does not save.
    """
    if type(layer) not in _SPLITS:
        return False
    if getattr(layer, "causal", False):
        raise ModelError(
            f"layer {layer.name!r} ({type(layer).__name__}) has causal=True, which Keras loses "
            "when it copies the layer; call it with use_causal_mask=True"
        )
    given = _arguments(layer, args, kwargs)
    inputs = [given.pop(name, None) for name in ("inputs", "query", "value", "key")]
    tensors = [tensor for value in inputs for tensor in _tensors(value)]
    masked = any(getattr(tensor, "_keras_mask", None) is not None for tensor in tensors)
    # What is left are masks, modes and further outputs.
    plain = all(value is None or value is False for value in given.values())
    plain = plain and not masked and layer.activity_regularizer is None
    return plain and _PLAIN[type(layer)](layer, {tensor.shape.rank for tensor in tensors})


def _tensors(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def take_apart(
    layer: layers.Layer, args: tuple, kwargs: dict, once: Once
) -> tuple[Any, list[SetWeights]]:
    """(output, setters of the new layers' weights)."""
    return _SPLITS[type(layer)](layer, _arguments(layer, args, kwargs), once)


def _arguments(layer: layers.Layer, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Those of the call that were given, by name."""
    return dict(inspect.signature(layer.call).bind(*args, **kwargs).arguments)


def _split_heads(layer: layers.MultiHeadAttention, given: dict, once: Once):
    query, value = given["query"], given["value"]
    key = value if given.get("key") is None else given["key"]
    setters: list[SetWeights] = []

    def heads(part: str, x: Any, factor: float = 1.0) -> Any:
        """(batch, heads, time, size)."""
        inner = getattr(layer, f"_{part}_dense")
        count, size = inner.kernel.shape[1:]
        x, setter = _dense(layer, inner, part, count * size, x, once, factor)
        setters.append(setter)
        apart = once(layer, f"{part}_apart", _maker(layers.Reshape, (-1, count, size)))
        return once(layer, f"{part}_turned", _maker(layers.Permute, (2, 1, 3)))(apart(x))

    factor = 1.0 / math.sqrt(layer._key_dim)
    if layer._kernel_regularizer or layer._bias_regularizer:
        query = heads("query", query)
        query = once(layer, "query_scaled", _maker(layers.Rescaling, factor))(query)
    else:
        query = heads("query", query, factor)
    key, value = heads("key", key), heads("value", value)
    x = _attend(layer, query, key, value, _dropout(layer._dropout, given), once)
    x = once(layer, "turned", _maker(layers.Permute, (2, 1, 3)))(x)
    inner = layer._output_dense
    count, size, units = inner.kernel.shape
    x = once(layer, "joined", _maker(layers.Reshape, (-1, count * size)))(x)
    x, setter = _dense(layer, inner, "output", units, x, once)
    return x, [*setters, setter]


def _split_attention(layer: layers.Attention, given: dict, once: Once):
    query, value, *rest = given["inputs"]
    key = rest[0] if rest else value
    return _attend(layer, query, key, value, _dropout(layer.dropout, given), once), []


def _dropout(rate: float, given: dict) -> float:
    return 0.0 if given.get("training") is False else rate


def _attend(layer: layers.Layer, query, key, value, dropout: float, once: Once) -> Any:
    """`softmax(query · keyᵀ) · value`."""
    scores = once(layer, "scores", _maker(MatMul, transpose_b=True))([query, key])
    shares = once(layer, "softmax", _maker(layers.Activation, "softmax"))(scores)
    if dropout:
        shares = once(layer, "dropout", _maker(layers.Dropout, dropout))(shares)
    return once(layer, "attended", _maker(MatMul))([shares, value])


def _split_dot(layer: layers.Dot, given: dict, once: Once):
    one, other = given["inputs"]
    first, second = _dot_axes(layer, one.shape.rank)
    vectors = one.shape.rank == 2
    if vectors:
        row = once(layer, "row", _maker(layers.Reshape, (1, -1)))
        one, other, first, second = row(one), row(other), 2, 2
    if first == 1:
        one = once(layer, "turned", _maker(layers.Permute, (2, 1)))(one)
    suffix = "number" if vectors else "product"
    x = once(layer, suffix, _maker(MatMul, transpose_b=second == 2))([one, other])
    return (once(layer, "column", _maker(layers.Reshape, (1,)))(x) if vectors else x), []


def _dot_axes(layer: layers.Dot, rank: int) -> tuple[int, int]:
    axes = (layer.axes,) * 2 if isinstance(layer.axes, int) else layer.axes
    first, second = (axis % rank for axis in axes)
    return first, second


def _split_einsum(layer: layers.EinsumDense, given: dict, once: Once):
    x, setter = _dense(layer, layer, "dense", layer.kernel.shape[-1], given["inputs"], once)
    return x, [setter]


def _is_dense(layer: layers.EinsumDense) -> bool:
    """Whether its equation is Dense's, e.g. `abx,xy->aby` or `...x,xy->...y`."""
    found = _DENSE.fullmatch(layer.equation)
    if found is None:
        return False
    before, summed, also_summed, made, also_before, also_made = found.groups()
    same = (before, summed, made) == (also_before, also_summed, also_made)
    return same and summed != made and layer.bias_axes in (None, made)


def _dense(
    layer: layers.Layer,
    inner: layers.EinsumDense,
    suffix: str,
    units: int,
    x: Any,
    once: Once,
    factor: float = 1.0,
) -> tuple[Any, SetWeights]:
    """Dense with the kernel of an EinsumDense, times a factor."""
    names = ("kernel_regularizer", "bias_regularizer", "kernel_constraint", "bias_constraint")
    options = {name: getattr(inner, name) for name in names}
    use_bias = inner.bias is not None
    dense = once(layer, suffix, _maker(layers.Dense, units, use_bias=use_bias, **options))

    def set_weights() -> None:
        shapes = [(-1, units), (units,)]
        weights = zip(inner.get_weights(), shapes, strict=False)
        dense.set_weights([factor * weight.reshape(shape) for weight, shape in weights])

    return dense(x), set_weights


def _maker(kind: type, *args: Any, **options: Any) -> Callable[[str], layers.Layer]:
    return lambda name: kind(*args, **options, name=name)


_SPLITS: dict[type, Callable] = {
    layers.MultiHeadAttention: _split_heads,
    layers.Attention: _split_attention,
    layers.Dot: _split_dot,
    layers.EinsumDense: _split_einsum,
}
KINDS = tuple(_SPLITS)
# Of which options and ranks of inputs.
_PLAIN: dict[type, Callable[[Any, set[int]], bool]] = {
    layers.MultiHeadAttention: lambda layer, ranks: (
        ranks == {3}
        and layer._attention_axes == (1,)
        and layer._output_dense.kernel.shape.rank == 3
        and not (layer._kernel_constraint or layer._bias_constraint)  # of other axes
    ),
    layers.Attention: lambda layer, ranks: (
        ranks == {3} and not layer.use_scale and layer.score_mode == "dot"
    ),
    layers.Dot: lambda layer, ranks: (
        not layer.normalize
        and ranks in ({2}, {3})
        and 0 not in _dot_axes(layer, max(ranks, default=1))
    ),
    layers.EinsumDense: lambda layer, ranks: _is_dense(layer),
}
