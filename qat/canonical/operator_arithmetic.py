"""TensorFlow functions that compute → layers: sums, products, activations, means.

Each function takes an `OperatorCall` and the arguments of the TensorFlow function under their
names there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras

from qat.canonical.operator_call import NoLayerError, OperatorCall, constants, integers, is_tensor
from qat.operator_layers import Affine, MatMul, ReduceMax, ReduceMean

layers = tf_keras.layers


def _channel_constant(value: Any, x: Any) -> float | list[float]:
    """A number, or one per channel of x."""
    numbers = constants(value).astype(float)
    if numbers.size == 1 and numbers.ndim <= len(x.shape):
        return float(numbers.reshape(()))
    if numbers.ndim <= len(x.shape) and numbers.size == numbers.shape[-1] == x.shape[-1]:
        return numbers.reshape(-1).tolist()
    raise NoLayerError(
        f"its constant has shape {numbers.shape}; only one number, or one for each of the "
        f"{x.shape[-1]} channels, can stay in integers"
    )


def affine(call: OperatorCall, x: Any, multiplier: Any = 1.0, offset: Any = 0.0) -> Any:
    """`multiplier · x + offset` with constants, scalar or per channel.

    Raises:
        NoLayerError: constants of another shape.
    """
    return call.layer(Affine, _channel_constant(multiplier, x), _channel_constant(offset, x))(x)


def _merged(call: OperatorCall, kind: type, x: Any, y: Any) -> Any:
    if len(x.shape) != len(y.shape):
        raise NoLayerError(f"it joins the shapes {tuple(x.shape)} and {tuple(y.shape)}; reshape")
    return call.layer(kind)([x, y])


def _add(call: OperatorCall, x: Any, y: Any) -> Any:
    if is_tensor(x) and is_tensor(y):
        return _merged(call, layers.Add, x, y)
    return affine(call, x, offset=y) if is_tensor(x) else affine(call, y, offset=x)


def _add_n(call: OperatorCall, inputs: list) -> Any:
    return call.layer(layers.Add)(list(inputs)) if len(inputs) > 1 else inputs[0]


def _bias_add(call: OperatorCall, value: Any, bias: Any, data_format: str | None) -> Any:
    _require_channels_last(data_format)
    return affine(call, value, offset=bias)


def _subtract(call: OperatorCall, x: Any, y: Any) -> Any:
    if is_tensor(x) and is_tensor(y):
        return _merged(call, layers.Subtract, x, y)
    if is_tensor(x):
        return affine(call, x, offset=-constants(y))
    return affine(call, y, -1.0, x)


def _multiply(call: OperatorCall, x: Any, y: Any) -> Any:
    if is_tensor(x) and is_tensor(y):
        return _merged(call, layers.Multiply, x, y)
    return affine(call, x, y) if is_tensor(x) else affine(call, y, x)


def _divide(call: OperatorCall, x: Any, y: Any) -> Any:
    if is_tensor(y):
        raise NoLayerError("TFLite divides in float only; multiply by a constant")
    return affine(call, x, 1.0 / constants(y).astype(float))


def _matmul(
    call: OperatorCall, a: Any, b: Any, transpose_a: Any, transpose_b: Any, **options: Any
) -> Any:
    if not (is_tensor(a) and is_tensor(b)):
        raise NoLayerError("a product with a constant is a layer with a kernel; use Dense")
    if len(a.shape) < 3 and len(b.shape) < 3:
        raise NoLayerError("it works on axis 0, the batch")
    if tuple(a.shape[:-2]) != tuple(b.shape[:-2]) or any(options.values()):
        raise NoLayerError("only plain products, example by example, are supported")
    if transpose_a:
        turned = [*range(1, len(a.shape) - 2), len(a.shape) - 1, len(a.shape) - 2]
        a = call.layer(layers.Permute, turned, suffix="turned")(a)
    return call.layer(MatMul, bool(transpose_b))([a, b])


def _negative(call: OperatorCall, x: Any) -> Any:
    return affine(call, x, -1.0)


def _square(call: OperatorCall, x: Any) -> Any:
    return call.layer(layers.Multiply)([x, x])


def _power(call: OperatorCall, x: Any, y: Any) -> Any:
    if not is_tensor(x) or is_tensor(y) or constants(y) != 2:
        raise NoLayerError("of powers only x ** 2 can stay in integers")
    return _square(call, x)


def _activation(function: str) -> Callable:
    def rewrite(call: OperatorCall, **arguments: Any) -> Any:
        (x,) = arguments.values()
        return call.layer(layers.Activation, function)(x)

    return rewrite


def _relu6(call: OperatorCall, features: Any) -> Any:
    return call.layer(layers.ReLU, 6.0)(features)


def _leaky_relu(call: OperatorCall, features: Any, alpha: Any) -> Any:
    return call.layer(layers.LeakyReLU, float(constants(alpha)))(features)


def _silu(call: OperatorCall, features: Any, beta: Any) -> Any:
    if constants(beta) != 1:
        raise NoLayerError("of swish only beta=1 is supported")
    return call.layer(layers.Activation, "swish")(features)


def _gelu(call: OperatorCall, features: Any, approximate: bool) -> Any:
    if approximate:
        raise NoLayerError("of gelu only approximate=False is supported")
    return call.layer(layers.Activation, "gelu")(features)


def _softmax(call: OperatorCall, logits: Any, axis: Any = None, dim: Any = None) -> Any:
    axis = -1 if axis is None else integers(axis)[0]
    return call.layer(layers.Softmax, -1 if axis == len(logits.shape) - 1 else axis)(logits)


def _maximum(call: OperatorCall, x: Any, y: Any) -> Any:
    if is_tensor(x) and is_tensor(y):
        return _merged(call, layers.Maximum, x, y)
    return _clipped(call, *((x, y) if is_tensor(x) else (y, x)), None)


def _minimum(call: OperatorCall, x: Any, y: Any) -> Any:
    if is_tensor(x) and is_tensor(y):
        return _merged(call, layers.Minimum, x, y)
    x, bound = (x, y) if is_tensor(x) else (y, x)
    inner = x._keras_history.layer
    plain = isinstance(inner, layers.Activation) and inner.activation is tf_keras.activations.relu
    if not (plain or (isinstance(inner, layers.ReLU) and _is_plain(inner))):
        raise NoLayerError("of bounds from above only min(relu(x), bound) can stay in integers")
    (x,) = x.node.keras_inputs
    return _clipped(call, x, 0, bound)


def _is_plain(layer: layers.ReLU) -> bool:
    return layer.max_value is None and not layer.negative_slope and not layer.threshold


def _clip(call: OperatorCall, t: Any, clip_value_min: Any, clip_value_max: Any) -> Any:
    return _clipped(call, t, clip_value_min, clip_value_max)


def _clipped(call: OperatorCall, x: Any, low: Any, high: Any) -> Any:
    if constants(low).any():
        raise NoLayerError("of bounds from below only 0, a ReLU, can stay in integers")
    if high is None:
        return call.layer(layers.ReLU)(x)
    return call.layer(layers.ReLU, float(constants(high)))(x)


def _axes(call: OperatorCall, axis: Any, rank: int) -> list[int]:
    if axis is None:
        raise NoLayerError("it reduces the batch too; name the axes")
    return sorted({call.axis(one, rank) for one in integers(axis)})


def _reduction(pools: dict[int, type], general: type) -> Callable:
    """The global pool of the rank where the axes are the spatial ones, else the general layer."""

    def rewrite(call: OperatorCall, input_tensor: Any, axis: Any, keepdims: Any, **_) -> Any:
        rank = len(input_tensor.shape)
        axes = _axes(call, axis, rank)
        if rank in pools and axes == list(range(1, rank - 1)):
            return call.layer(pools[rank], keepdims=bool(keepdims))(input_tensor)
        return call.layer(general, axes, bool(keepdims))(input_tensor)

    return rewrite


_mean = _reduction({3: layers.GlobalAveragePooling1D, 4: layers.GlobalAveragePooling2D}, ReduceMean)


def _sum(call: OperatorCall, input_tensor: Any, axis: Any, keepdims: Any, **_) -> Any:
    """As many times the mean as there are terms."""
    sizes = [input_tensor.shape[a] for a in _axes(call, axis, len(input_tensor.shape))]
    if None in sizes:
        raise NoLayerError("the number of terms is unknown; fix the model's input size")
    mean = _mean(call, input_tensor, axis, keepdims)
    return call.layer(Affine, float(np.prod(sizes)), suffix="sum")(mean)


def _pool(kind: type) -> Callable:
    def rewrite(call, ksize: Any, strides: Any, padding: str, data_format: Any, **image) -> Any:
        (x,) = image.values()
        _require_channels_last(data_format)
        if len(x.shape) != 4 or not isinstance(padding, str):
            raise NoLayerError("only pools over images with padding 'SAME' or 'VALID' have a layer")
        window, step = _window(ksize), _window(strides)
        return call.layer(kind, window, strides=step, padding=padding.lower())(x)

    return rewrite


def _window(sizes: Any) -> tuple[int, int]:
    sizes = integers(sizes)
    sizes = sizes[1:3] if len(sizes) == 4 else sizes * (2 // len(sizes))
    return tuple(sizes)


def _require_channels_last(data_format: str | None) -> None:
    if data_format not in (None, "NHWC", "N...C"):
        raise NoLayerError(f"it has data_format={data_format!r}; TFLite is NHWC")


_max_pool, _average_pool = _pool(layers.MaxPooling2D), _pool(layers.AveragePooling2D)
REWRITES: dict[str, Callable[..., Any]] = {
    "__operators__.add": _add,
    "clip_by_value": _clip,
    "linalg.matmul": _matmul,
    "math.add": _add,
    "math.add_n": _add_n,
    "math.divide": _divide,
    "math.maximum": _maximum,
    "math.minimum": _minimum,
    "math.multiply": _multiply,
    "math.negative": _negative,
    "math.pow": _power,
    "math.reduce_max": _reduction(
        {3: layers.GlobalMaxPooling1D, 4: layers.GlobalMaxPooling2D}, ReduceMax
    ),
    "math.reduce_mean": _mean,
    "math.reduce_sum": _sum,
    "math.sigmoid": _activation("sigmoid"),
    "math.softplus": _activation("softplus"),
    "math.square": _square,
    "math.subtract": _subtract,
    "math.tanh": _activation("tanh"),
    "math.truediv": _divide,
    "nn.avg_pool": _average_pool,
    "nn.avg_pool2d": _average_pool,
    "nn.bias_add": _bias_add,
    "nn.elu": _activation("elu"),
    "nn.gelu": _gelu,
    "nn.leaky_relu": _leaky_relu,
    "nn.max_pool": _max_pool,
    "nn.max_pool2d": _max_pool,
    "nn.relu": _activation("relu"),
    "nn.relu6": _relu6,
    "nn.selu": _activation("selu"),
    "nn.sigmoid": _activation("sigmoid"),
    "nn.silu": _silu,
    "nn.softmax": _softmax,
    "nn.softplus": _activation("softplus"),
    "nn.tanh": _activation("tanh"),
}
