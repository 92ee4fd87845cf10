"""A good start: ranges and statistics of a quantized model from data, before any training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import ranges
from qat.batches import input_batches
from qat.canonical import functional
from qat.collect import ActivationSite, Collected, Unrounded, activation_sites, collect, has_range
from qat.errors import ModelError, QatError
from qat.forward import infer
from qat.layers import FakeQuantize
from qat.quantizers import GridQuantizer, UniformQuantizer
from qat.quantizers.rounding import in_float32
from qat.reestimate import measure_batch_norm

WEIGHT_METHODS = ("mse", "minmax")
ACTIVATION_METHODS = ("mse", "percentile", "minmax")
# From this width down, rounding moves what batch normalization divides by.
LOW_BITS = 4


def calibrate(
    model: tf_keras.Model,
    dataset: tf.data.Dataset,
    *,
    steps: int | None = None,
    activations: str = "mse",
    weights: str = "mse",
    percentile: float = 99.99,
    batch_norm: bool | None = None,
) -> tf_keras.Model:
    """Gives every quantizer the range that suits its weights or data; trains nothing.

    1. Kernels with a learned step: per channel, the bound b of least `mean (w - q_b(w))²`.
    2. Batch normalization statistics are re-estimated behind the quantized kernels.
    3. All batches run as in inference, with rounded kernels and signs but unrounded activations, so
       that no range depends on another; a histogram of each tensor makes its range.
    4. Batch normalization statistics are re-estimated behind the quantized activations too.

    A range that training moves (a running average, a learned step) starts from the one found here.
    Fixed ranges, and grids that follow their tensor, stay as they are.

    Args:
        model: quantized; changed in place.
        dataset: batches of x or (x, y); for several inputs x is a tuple or dictionary.
        steps: batches to use; None = all.
        activations: "mse", the range of least mean squared error; "percentile", which leaves out
            the outliers at both ends; "minmax", all values.
        weights: "mse" or "minmax".
        percentile: 50 to 100; the range is [100 - percentile, percentile] of the values.
        batch_norm: whether steps 2 and 4 happen; None = if some kernel or activation has 4 bits or
            fewer. See `qat.reestimate_batch_norm` on small batches and few examples.

    Returns:
        The model.

    Raises:
        QatError: an unknown method, an empty dataset, NaN or infinite data.
        ModelError: no quantizer in the model, weights that are not finite, data that does not fit.
    """
    _require_legal("activations", activations, ACTIVATION_METHODS)
    _require_legal("weights", weights, WEIGHT_METHODS)
    if not 50.0 < percentile <= 100.0:
        raise QatError(f"percentile must lie above 50 and up to 100, got {percentile!r}")
    quantizers = list(_quantizers(model))
    if not quantizers:
        raise ModelError(
            f"model {model.name!r} has no quantizer; make one with qat.quantize_model first"
        )
    if batch_norm is None:
        batch_norm = any(quantizer.num_bits <= LOW_BITS for quantizer in quantizers)
    # 1. Kernels.
    for layer in model.layers:
        if isinstance(layer, QuantizeWrapper):
            _set_kernel_ranges(layer, weights)
    # 2. Statistics behind them.
    sites = activation_sites(model)
    if batch_norm:
        batches = input_batches(functional(model), dataset, steps)
        measure_batch_norm(model, batches, Unrounded(sites))
    # 3. Activations.
    for site, collected in zip(sites, collect(model, sites, dataset, steps), strict=True):
        ends = _range(site, collected, activations, percentile)
        site.quantizer.set_range(site.weights, *(tf.constant(end, tf.float32) for end in ends))
    # 4. Statistics behind those.
    if batch_norm:
        measure_batch_norm(model, input_batches(functional(model), dataset, steps), infer)
    return model


def _require_legal(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise QatError(f"unknown {name}={value!r}; legal: {', '.join(legal)}")


def _quantizers(model: tf_keras.Model) -> Iterator[GridQuantizer]:
    """All quantizers of ours in the model."""
    for layer in model.layers:
        found = []
        if isinstance(layer, FakeQuantize):
            found = [layer.quantizer]
        elif isinstance(layer, QuantizeWrapper):
            found = [*(made[1] for made in layer._weight_vars), *layer._output_quantizers]
        yield from (quantizer for quantizer in found if isinstance(quantizer, GridQuantizer))


def _set_kernel_ranges(wrapper: QuantizeWrapper, method: str) -> None:
    for weight, quantizer, variables in wrapper._weight_vars:
        if not has_range(quantizer):
            continue
        kernel = in_float32(weight)
        if not tf.reduce_all(tf.math.is_finite(kernel)):
            raise ModelError(
                f"layer {wrapper.layer.name!r} has NaN or infinite weights; take the float model "
                "from before its training diverged"
            )
        if method == "mse" and isinstance(quantizer, UniformQuantizer):
            bound = ranges.mse_bound(
                kernel,
                quantizer.channel_axes,
                num_bits=quantizer.num_bits,
                narrow_range=quantizer.narrow_range,
            )
        else:
            bound = ranges.tensor_bound(kernel, quantizer.channel_axes)
        quantizer.set_range(variables, -bound, bound)


def _range(
    site: ActivationSite, collected: Collected, method: str, percentile: float
) -> tuple[Any, Any]:
    """(minimum, maximum) of a site. Channels that have ranges of their own get all their values."""
    if method == "minmax" or site.channel_axes is not None:
        return collected.minimum, collected.maximum
    values = collected.histogram
    if method == "percentile":
        return values.quantile(1.0 - percentile / 100.0), values.quantile(percentile / 100.0)
    symmetric = getattr(site.quantizer, "symmetric", False)
    return ranges.mse_range(values, num_bits=site.quantizer.num_bits, symmetric=symmetric)
