"""What flows into a model's activation quantizers, gathered over batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import (
    QuantizeLayer,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import ranges
from qat.batches import input_batches
from qat.canonical import Call, functional
from qat.errors import ModelError
from qat.forward import forward, in_mode, infer, traced_if_repeated
from qat.histogram import NUM_BINS, Histogram, bin_counts, holds_only_numbers
from qat.layers import FakeQuantize
from qat.quantizers import GridQuantizer


@dataclasses.dataclass(frozen=True)
class ActivationSite:
    """An activation quantizer in its place in a model.

    Attributes:
        layer: a `FakeQuantize`, or TFMOT's wrapper with a quantizer of the layer's output.
        quantizer: its quantizer. weights: the quantizer's variables.
    """

    layer: tf_keras.layers.Layer
    quantizer: GridQuantizer
    weights: dict[str, Any]

    @property
    def channel_axes(self) -> tuple[int, ...] | None:
        """Axes that have a range of their own; None for the one range of ordinary activations."""
        return getattr(self.quantizer, "channel_axes", None)


def activation_sites(model: tf_keras.Model) -> list[ActivationSite]:
    """The activation quantizers that have a range of their own to set; signs have none."""
    found = []
    for layer in model.layers:
        if isinstance(layer, FakeQuantize):
            found.append(ActivationSite(layer, layer.quantizer, layer.quantizer_weights))
        elif isinstance(layer, QuantizeWrapper) and layer._output_quantizers:
            quantizer = layer._output_quantizers[0]
            found.append(ActivationSite(layer, quantizer, layer._output_quantizer_vars))
    return [site for site in found if has_range(site.quantizer)]


def has_range(quantizer: object) -> bool:
    """Whether the quantizer has a range that can be set: neither fixed nor the tensor's own."""
    ours = isinstance(quantizer, GridQuantizer)
    return ours and type(quantizer).set_range is not GridQuantizer.set_range


class Unrounded:
    """A visit of `qat.forward`, in inference, in which values pass the sites as they are.

    Attributes:
        tensors: for each site those that came by since `clear`; not of calls with `observe=False`.
    """

    def __init__(self, sites: list[ActivationSite]):
        self.tensors: list[list[tf.Tensor]] = [[] for _ in sites]
        self._found = {id(site.layer): kept for site, kept in zip(sites, self.tensors, strict=True)}

    def clear(self) -> None:
        """Forgets all tensors."""
        for kept in self.tensors:
            kept.clear()

    def __call__(self, call: Call, args: tuple, kwargs: dict) -> Any:
        if isinstance(call.layer, QuantizeLayer):
            # TFMOT's own quantizer of a model's input: it learns its range in training alone.
            return in_mode(call, args, kwargs, training=True)
        if id(call.layer) not in self._found:
            return infer(call, args, kwargs)
        if isinstance(call.layer, FakeQuantize):
            value, observe = args[0], kwargs.get("observe", True)
        else:
            value, observe = _without_output_quantizer(call, args, kwargs), True
        if observe:
            self._found[id(call.layer)].append(value)
        return value


def _without_output_quantizer(call: Call, args: tuple, kwargs: dict) -> Any:
    before = call.layer._output_quantizers
    call.layer._output_quantizers = []
    try:
        return infer(call, args, kwargs)
    finally:
        call.layer._output_quantizers = before


@dataclasses.dataclass
class Collected:
    """All values of one site, as far as a range needs them.

    Attributes:
        counts: by bin, see `qat.histogram`. minimum, maximum: shaped as the site's range.
    """

    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    minimum: np.ndarray = dataclasses.field(default_factory=lambda: np.float32(np.inf))
    maximum: np.ndarray = dataclasses.field(default_factory=lambda: np.float32(-np.inf))

    def add(self, counts: np.ndarray, minimum: np.ndarray, maximum: np.ndarray) -> None:
        """Takes in the values of one more tensor."""
        self.counts += counts
        self.minimum = np.minimum(self.minimum, minimum)
        self.maximum = np.maximum(self.maximum, maximum)

    @property
    def histogram(self) -> Histogram:
        """The histogram over all channels."""
        return Histogram.of(self.counts, self.minimum.min(), self.maximum.max())


def collect(
    model: tf_keras.Model, sites: list[ActivationSite], dataset: tf.data.Dataset, steps: int | None
) -> list[Collected]:
    """For each site all values of the batches, in inference, no site rounding.

    Raises:
        QatError: as `input_batches`.
        ModelError: NaN or infinite activations.
    """
    network, unrounded = functional(model), Unrounded(sites)

    @traced_if_repeated(reduce_retracing=True)
    def statistics(inputs):
        unrounded.clear()
        forward(network, inputs, unrounded)
        return [
            [
                (bin_counts(value), *ranges.tensor_range(value, site.channel_axes))
                for value in values
            ]
            for site, values in zip(sites, unrounded.tensors, strict=True)
        ]

    results = [Collected() for _ in sites]
    for number, inputs in enumerate(input_batches(network, dataset, steps), start=1):
        for site, result, found in zip(sites, results, statistics(inputs), strict=True):
            for counts, minimum, maximum in found:
                if not holds_only_numbers(counts.numpy()):
                    raise ModelError(
                        f"layer {site.layer.name!r} gets NaN or infinite values in batch {number}, "
                        "though the data has none; look at the weights of the layers before it"
                    )
                result.add(counts.numpy(), minimum.numpy(), maximum.numpy())
    return results
