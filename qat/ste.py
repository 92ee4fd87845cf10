"""Straight-through estimators: a hard function forward, the derivative of a smooth proxy backward.

    y = hard(x),    dL/dx = dL/dy · proxy'(x)

The forward never depends on the surrogate. `SURROGATES` maps the name of a proxy of sign(x) to its
derivative; a step's proxy is (1 + proxy(x - threshold)) / 2, so its derivative is half of that, but
"identity" stays 1, as the straight-through estimator is defined.

    name      proxy of sign(x)                     its derivative                         arXiv
    identity  x                                    1                                      1308.3432
    clipped   clip(x, -1, 1)                       1 if abs(x) <= 1 else 0                1602.02830
    bireal    x·(2 - abs(x)), beyond ±1 sign(x)    2 - 2·abs(x) if abs(x) <= 1 else 0     1808.00278
    swish     2·σ(bx)·(1 + bx·σ(-bx)) - 1          b·(2 - bx·tanh(bx/2)) / (1 + cosh bx)  1812.11800
    sigmoid   2·σ(kx) - 1                          2k·σ(kx)·σ(-kx)
    tanh      tanh(kx)                             k·(1 - tanh²(kx))
    relaxed   2·σ(x/T) - 1                         2/T·σ(x/T)·σ(-x/T)                     1611.00712

b = `beta` (default 5, the paper's), k = `steepness` (10, or 5 for tanh), T = `temperature` (0.1):
slope 5 at zero, all four. "relaxed" is the binary concrete relaxation without its noise, so sigmoid
with k = 1/T. Options are Python numbers: a `tf.function` keeps those it was traced with.

x is a float tensor of any shape, y has its shape and dtype. Comparisons are made in x's dtype; the
slope is computed in float32 (float64 for float64), finite for every finite x, and the gradient is
rounded once, to x's dtype. A NaN in x is a NaN in y, so that diverged training shows. TensorFlow
reads float32 and bfloat16 subnormals as zero: sign_ste(-1e-40) is +1. Illegal input: ValueError.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable

import tensorflow as tf

Elementwise = Callable[..., tf.Tensor]


def _logistic_slope(z: tf.Tensor) -> tf.Tensor:
    """σ(z)·σ(-z), the derivative of the logistic σ: exact in both tails, never an overflow."""
    e = tf.exp(-tf.abs(z))
    return e / tf.square(1.0 + e)


def _identity(x: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(x)


def _clipped(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.abs(x) <= 1.0, x.dtype)


def _bireal(x: tf.Tensor) -> tf.Tensor:
    return 2.0 * tf.nn.relu(1.0 - tf.abs(x))


def _swish(x: tf.Tensor, beta: float = 5.0) -> tf.Tensor:
    # The bell is zero at 1000 in float64 too; stopping there keeps it from meeting an infinity.
    z = tf.minimum(tf.abs(beta * x), 1000.0)
    return 2.0 * beta * _logistic_slope(z) * (2.0 - z * tf.tanh(0.5 * z))


def _sigmoid(x: tf.Tensor, steepness: float = 10.0) -> tf.Tensor:
    return 2.0 * steepness * _logistic_slope(steepness * x)


def _tanh(x: tf.Tensor, steepness: float = 5.0) -> tf.Tensor:
    return _sigmoid(x, 2.0 * steepness)  # tanh(kx) = 2·σ(2kx) - 1


def _relaxed(x: tf.Tensor, temperature: float = 0.1) -> tf.Tensor:
    return _sigmoid(x, 1.0 / temperature)


def _dsq(x: tf.Tensor, alpha: float = 0.4) -> tf.Tensor:
    k = math.log(2.0 - alpha) - math.log(alpha)
    # 1 - tanh²(z) = 4·σ(2z)·σ(-2z)
    return 2.0 * k / (1.0 - alpha) * _logistic_slope(2.0 * k * (x - tf.floor(x) - 0.5))


SURROGATES: dict[str, Elementwise] = {
    "identity": _identity,
    "clipped": _clipped,
    "bireal": _bireal,
    "swish": _swish,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "relaxed": _relaxed,
}
ROUND_SURROGATES: dict[str, Elementwise] = {"identity": _identity, "dsq": _dsq}
# Every option lies above 1e-30 and below this; beyond 1e±30, slopes would leave float32.
_OPTION_LIMIT = {"alpha": 0.5, "beta": 1e30, "steepness": 1e30, "temperature": 1e30}


def round_ste(
    x: tf.Tensor, *, surrogate: str = "identity", alpha: float | None = None
) -> tf.Tensor:
    """Rounding to the nearest integer, halves to even, with a straight-through gradient.

    y = round(x);  dx = dy ("identity") or dy·dsq'(x) ("dsq"), where dsq is a soft staircase:
    dsq(x) = n + 1/2 + a/2·tanh(k·(x - n - 1/2)), n = floor(x), a = 1/(1 - alpha) and
    k = ln(2/alpha - 1).

    Its slope is continuous everywhere: highest, a·k/2, at the half-integers, where y jumps; lowest
    at the integers; 1 on average. `alpha`, for "dsq" only, lies in (0, 0.5) and is 0.4 by default;
    less is harder. An infinite x lies on no stair: NaN. Source: DSQ, arXiv 1908.05033.
    """
    x = _floating(x, "round_ste")
    return _straight_through(x, tf.round, _slope(ROUND_SURROGATES, surrogate, {"alpha": alpha}))


def sign_ste(
    x: tf.Tensor,
    *,
    surrogate: str = "clipped",
    beta: float | None = None,
    steepness: float | None = None,
    temperature: float | None = None,
) -> tf.Tensor:
    """Sign with a surrogate gradient: binary weights and activations.

    y = +1 where x >= 0 (so also at 0 and -0), -1 where x < 0;  dx = dy·SURROGATES[surrogate](x).

    An option that is None takes the surrogate's default: beta 5 ("swish"), steepness 10 ("sigmoid")
    or 5 ("tanh"), temperature 0.1 ("relaxed"). An option of another surrogate raises ValueError.
    """
    x = _floating(x, "sign_ste")
    options = {"beta": beta, "steepness": steepness, "temperature": temperature}
    return _straight_through(x, _sign, _slope(SURROGATES, surrogate, options))


def step_ste(
    x: tf.Tensor,
    *,
    threshold: float = 0.0,
    surrogate: str = "clipped",
    beta: float | None = None,
    steepness: float | None = None,
    temperature: float | None = None,
) -> tf.Tensor:
    """A step from 0 to 1 at `threshold`, with a surrogate gradient.

    y = 1 where x >= threshold, 0 where x < threshold;
    dx = dy·SURROGATES[surrogate](x - threshold)/2, or dy alone for "identity".

    Both passes use the threshold as rounded to x's dtype. To learn one, pass x minus a variable.
    Options as in `sign_ste`.
    """
    x = _floating(x, "step_ste")
    threshold = _number(threshold, "threshold", x.dtype)
    options = {"beta": beta, "steepness": steepness, "temperature": temperature}
    sign_slope = _slope(SURROGATES, surrogate, options)
    gain = 1.0 if surrogate == "identity" else 0.5
    hard = functools.partial(_step, threshold=threshold)
    return _straight_through(x, hard, lambda x: gain * sign_slope(x - threshold))


def binary_activation(
    x: tf.Tensor, *, threshold: float = 0.5, steepness: float = 10.0
) -> tf.Tensor:
    """A 0/1 activation whose gradient is that of a steep sigmoid centred on its threshold.

    y = 1 where x >= threshold, else 0;  dx = dy·σ'(steepness·(x - threshold))·steepness.

    The gradient peaks at steepness/4 on the threshold and is gone some 10/steepness away from it.
    """
    return step_ste(x, threshold=threshold, surrogate="sigmoid", steepness=steepness)


def relaxed_step(x: tf.Tensor, *, temperature: float = 0.1) -> tf.Tensor:
    """A step at zero whose gradient is that of its logistic relaxation.

    y = 1 where x >= 0, else 0;  dx = dy·σ'(x/temperature)/temperature.

    A low temperature is close to the step, with a tall and narrow gradient; a high one is smooth.
    """
    return step_ste(x, surrogate="relaxed", temperature=temperature)


def quantize_to_levels(
    x: tf.Tensor,
    *,
    num_levels: int = 2,
    minimum: float | None = None,
    maximum: float | None = None,
    percentile: float | None = None,
) -> tf.Tensor:
    """Hard quantization to evenly spaced levels of a range, straight-through inside of it.

    y = minimum + k·(maximum - minimum)/(num_levels - 1), the level k in 0…num_levels - 1 nearest
    to x (halves go up);  dx = dy where minimum <= x <= maximum, 0 outside, where y saturates.

    An end that is None is measured: the smallest or largest x or, for outliers to saturate, the one
    of rank 100 - `percentile` or `percentile` per cent (50 < percentile <= 100). A given end wins
    over a measured one beyond it. The gradient takes the range for a constant. Both ends are levels
    exactly; a constant tensor is its own range and comes back as it is, with dx = dy.
    """
    x = _floating(x, "quantize_to_levels")
    if not isinstance(num_levels, numbers.Integral) or num_levels < 2:
        raise ValueError(f"num_levels must be an integer of at least 2, got {num_levels!r}")
    low, high = _level_range(x, minimum, maximum, percentile)
    hard = functools.partial(_nearest_level, low=low, high=high, steps=int(num_levels) - 1)
    return _straight_through(x, hard, lambda wide: tf.cast((x >= low) & (x <= high), wide.dtype))


def _straight_through(x: tf.Tensor, hard: Elementwise, slope: Elementwise) -> tf.Tensor:
    """y = hard(x), dx = dy·slope(x), the product in float32 or wider."""

    @tf.custom_gradient
    def estimator(x):
        def backward(upstream):
            with tf.control_dependencies([upstream]):  # not before: then slope takes x's memory
                wide = tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32)
                return tf.cast(tf.cast(upstream, wide.dtype) * slope(wide), x.dtype)

        return hard(x), backward

    return estimator(x)


def _sign(x: tf.Tensor) -> tf.Tensor:
    return tf.sign(tf.sign(x) + 0.5)  # three passes, selections take more; NaN for NaN


def _step(x: tf.Tensor, *, threshold: float) -> tf.Tensor:
    # A NaN fails both comparisons and is passed on.
    y = tf.where(x < threshold, tf.constant(0.0, x.dtype), x)
    return tf.where(x >= threshold, tf.constant(1.0, x.dtype), y)


def _nearest_level(x: tf.Tensor, *, low: tf.Tensor, high: tf.Tensor, steps: int) -> tf.Tensor:
    # In float64, so that y is a level rounded once. A constant tensor has no span and no offsets.
    x64, first, last = (tf.cast(value, tf.float64) for value in (x, low, high))
    span = tf.where(last > first, last - first, 1.0)
    offset = steps * (tf.clip_by_value(x64, first, last) - first)
    k = tf.round(offset / span)
    # Compilers divide by a constant with its reciprocal and miss halves; products do not.
    excess = 2.0 * (offset - k * span)
    t = tf.where(excess >= span, k + 1.0, tf.where(excess < -span, k - 1.0, k)) / steps
    return tf.cast(first * (1.0 - t) + last * t, x.dtype)


def _level_range(
    x: tf.Tensor, minimum: float | None, maximum: float | None, percentile: float | None
) -> tuple[tf.Tensor, tf.Tensor]:
    if minimum is not None and maximum is not None:
        if not minimum < maximum:
            raise ValueError(f"minimum must be below maximum, got {minimum!r} and {maximum!r}")
        if percentile is not None:
            raise ValueError("percentile measures a range: leave out minimum, maximum or both")
    low, high = _measured_range(tf.stop_gradient(x), percentile)
    if minimum is not None:
        low = tf.constant(_number(minimum, "minimum", x.dtype), x.dtype)
        high = tf.maximum(low, high)
    if maximum is not None:
        high = tf.constant(_number(maximum, "maximum", x.dtype), x.dtype)
        low = tf.minimum(low, high)
    return low, high


def _measured_range(x: tf.Tensor, percentile: float | None) -> tuple[tf.Tensor, tf.Tensor]:
    if percentile is None:
        return tf.reduce_min(x), tf.reduce_max(x)
    if not 50.0 < percentile <= 100.0:
        raise ValueError(f"percentile must be in (50, 100], got {percentile!r}")
    ordered = tf.sort(tf.reshape(x, [-1]))
    last = tf.size(x) - 1
    rank = tf.cast(tf.round(tf.cast(last, tf.float64) * (percentile / 100.0)), tf.int32)
    return ordered[last - rank], ordered[rank]


def _slope(registry: dict[str, Elementwise], surrogate: str, options: dict) -> Elementwise:
    """The derivative registered under a name, with those of the options that are not None."""
    if surrogate not in registry:
        raise ValueError(f"unknown surrogate {surrogate!r}: choose from {', '.join(registry)}")
    _, *legal = inspect.signature(registry[surrogate]).parameters
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in legal:
            raise ValueError(f"surrogate {surrogate!r} takes {legal or 'no option'}, not {name}")
        limit = _OPTION_LIMIT[name]
        if not (isinstance(value, numbers.Real) and 1e-30 < value < limit):
            raise ValueError(f"{name} must be a number in (1e-30, {limit}), got {value!r}")
    return functools.partial(registry[surrogate], **{k: float(v) for k, v in given.items()})


def _floating(x: tf.Tensor, function: str) -> tf.Tensor:
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise ValueError(f"{function} takes a float tensor, got {x.dtype.name}: tf.cast it first")
    return x


def _number(value: float, name: str, dtype: tf.DType) -> float:
    """A finite Python number, rounded to the dtype of the tensor that it is compared with."""
    if not isinstance(value, numbers.Real) or not abs(value) <= float(dtype.max):
        raise ValueError(f"{name} must be a finite number in {dtype.name}, got {value!r}")
    return float(dtype.as_numpy_dtype(value))
