"""TFMOT QuantizeConfigs: which weights of a layer are quantized, and whether its output is."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow_model_optimization as tfmot
import tf_keras

from qat import quantizers
from qat.reactnet import METHOD as REACTNET
from qat.reactnet import RSignQuantizer
from qat.recipe import TERNARY, RecipeError, TensorSpec

layers = tf_keras.layers

# For each layer type, its kernels and the axes of each that are output channels. The last axis
# of a depthwise kernel is the depth multiplier alone: a channel is a pair of the last two axes.
KERNELS: dict[type, dict[str, tuple[int, ...]]] = {
    layers.Conv1D: {"kernel": (-1,)},
    layers.Conv2D: {"kernel": (-1,)},
    layers.Conv1DTranspose: {"kernel": (-2,)},
    layers.DepthwiseConv1D: {"depthwise_kernel": (-2, -1)},
    layers.DepthwiseConv2D: {"depthwise_kernel": (-2, -1)},
    layers.SeparableConv2D: {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)},
    layers.Conv2DTranspose: {"kernel": (-2,)},
    layers.Dense: {"kernel": (-1,)},
}


def kernels(layer: layers.Layer) -> dict[str, tuple[int, ...]]:
    """{attribute: channel axes} of the layer's kernels; empty if it has none that we quantize."""
    return KERNELS.get(type(layer), {})


def weight_quantizer(spec: TensorSpec, channel_axes: tuple[int, ...]) -> quantizers.GridQuantizer:
    """The quantizer for a kernel: zero point 0, per channel if the spec and its method say so."""
    spec = spec.resolved("weights")
    settings = {"channel_axes": channel_axes if spec.per_channel else None}
    if spec.bits == 1:
        kind, own = _BINARY_WEIGHTS[spec.method]
    elif spec.method in _TERNARY_WEIGHTS:
        kind, own = _TERNARY_WEIGHTS[spec.method]
    elif spec.method in _ODD_WEIGHTS:
        kind, own = _ODD_WEIGHTS[spec.method]
        settings["num_bits"] = spec.bits
    else:
        kind, own = _UNIFORM[spec.method]
        bits = 2 if spec.bits == TERNARY else spec.bits
        # Two and three bits have few levels to leave unused; a ternary grid is -1, 0, 1.
        narrow = spec.bits == TERNARY or bits >= 4 or spec.method == "minmax"
        settings |= {"num_bits": bits, "symmetric": True, "narrow_range": narrow}
    return _made(kind, spec, **{**settings, **own})


def activation_quantizer(spec: TensorSpec) -> quantizers.GridQuantizer:
    """The quantizer for an activation tensor; symmetric at 16 bits."""
    spec = spec.resolved("activations")
    if spec.bits == 1:
        return _made(_SIGNS[spec.method], spec)
    kind, own = _ACTIVATIONS[spec.method]
    return _made(kind, spec, num_bits=spec.bits, symmetric=spec.bits == 16, **own)


def range_quantizer(minimum: float, maximum: float, spec: TensorSpec) -> quantizers.GridQuantizer:
    """The quantizer for an activation tensor whose range is known beforehand."""
    return quantizers.FixedRangeQuantizer(
        minimum=minimum, maximum=maximum, num_bits=spec.bits, symmetric=spec.bits == 16
    )


# By method: the quantizer and the options that make it that method.
_Table = dict[str, tuple[type, dict[str, Any]]]
_UNIFORM: _Table = {
    "minmax": (quantizers.LastValueQuantizer, {}),
    "lsq": (quantizers.LsqQuantizer, {}),
    "lsqplus": (quantizers.LsqPlusQuantizer, {}),
    "pact": (quantizers.PactQuantizer, {}),
    "ewgs": (quantizers.LsqQuantizer, {"backward": "ewgs"}),
    "dsq": (quantizers.LsqQuantizer, {"backward": "dsq"}),
}
_ACTIVATIONS: _Table = {
    **_UNIFORM,
    "minmax": (quantizers.MovingAverageQuantizer, {}),
    "dorefa": (quantizers.DorefaActivationQuantizer, {}),
}
_SIGNS = {"binary": quantizers.BinaryActivationQuantizer, REACTNET: RSignQuantizer}
# Papers that take one scale for a layer, whatever the spec says; only the options change that.
_WHOLE_LAYER = {"channel_axes": None}
_ODD_WEIGHTS: _Table = {
    "dorefa": (quantizers.DorefaWeightQuantizer, _WHOLE_LAYER),
    "statsq": (quantizers.StatsqQuantizer, {}),
}
_TERNARY_WEIGHTS: _Table = {
    "twn": (quantizers.TwnQuantizer, {}),
    "ttq": (quantizers.TtqQuantizer, _WHOLE_LAYER),
}
_BINARY_WEIGHTS: _Table = {
    "binary": (quantizers.BinaryWeightQuantizer, {}),
    "reactnet": (quantizers.BinaryWeightQuantizer, {}),
    "xnor": (quantizers.XnorWeightQuantizer, {}),
    "bwn": (quantizers.BwnWeightQuantizer, {}),
    "dorefa": (quantizers.DorefaBinaryWeightQuantizer, _WHOLE_LAYER),
}


def _made(kind: type, spec: TensorSpec, **settings: Any) -> quantizers.GridQuantizer:
    try:
        return kind(**{**settings, **spec.options})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"options {spec.options} of method {spec.method!r}: {error}") from error


@tf_keras.utils.register_keras_serializable("qat")
class LayerQuantizeConfig(tfmot.quantization.keras.QuantizeConfig):
    """Quantizes a layer's kernels and, if asked, its output.

    Works with plain `tfmot.quantization.keras.quantize_annotate_layer(layer, config)`. Under
    `qat.scheme` leave `output` out: the scheme places the activation quantizers.

    Args:
        weights: spec for the kernels; None leaves them in float.
        output: spec for the layer's output; None leaves it to whoever reads it.
        keep_float: the reason, when the layer is to stay in float32 altogether.

    Raises:
        RecipeError: a width or method that kernels or outputs do not have.
    """

    def __init__(
        self,
        *,
        weights: TensorSpec | None = None,
        output: TensorSpec | None = None,
        keep_float: str | None = None,
    ):
        if keep_float is not None and (weights is not None or output is not None):
            raise ValueError("give keep_float or specs, not both")
        # The method by name: what is best for a width can change between saving and loading.
        self.weights = None if weights is None else weights.resolved("weights")
        self.output = None if output is None else output.resolved("activations")
        self.keep_float = keep_float

    def get_weights_and_quantizers(self, layer):
        if self.weights is None:
            return []
        if not kernels(layer):
            legal = ", ".join(kind.__name__ for kind in KERNELS)
            raise ValueError(
                f"layer {layer.name!r} ({type(layer).__name__}) has no kernel to quantize; "
                f"layers that do: {legal}"
            )
        return [
            (getattr(layer, name), weight_quantizer(self.weights, axes))
            for name, axes in kernels(layer).items()
        ]

    def set_quantize_weights(self, layer, quantize_weights):
        if self.weights is not None:
            for name, value in zip(kernels(layer), quantize_weights, strict=True):
                setattr(layer, name, value)

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        pass

    def get_output_quantizers(self, layer):
        return [] if self.output is None else [activation_quantizer(self.output)]

    def get_config(self) -> dict[str, Any]:
        return {
            "weights": None if self.weights is None else dataclasses.asdict(self.weights),
            "output": None if self.output is None else dataclasses.asdict(self.output),
            "keep_float": self.keep_float,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerQuantizeConfig:
        config = dict(config)
        for key in ("weights", "output"):
            if config.get(key) is not None:
                config[key] = TensorSpec(**config[key])
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    __hash__ = None


def uniform(*, weight_bits: int = 8, activation_bits: int | None = 8) -> LayerQuantizeConfig:
    """Min-max config: kernels per channel at `weight_bits`, output at `activation_bits` or not."""
    weights = TensorSpec(bits=weight_bits, method="minmax")
    output = None
    if activation_bits is not None:
        output = TensorSpec(bits=activation_bits, method="minmax")
    return LayerQuantizeConfig(weights=weights, output=output)


def binary(*, surrogate: str = "clipped") -> LayerQuantizeConfig:
    """Binary kernels, scaled per channel by their mean magnitude; the output is left alone."""
    options = {"surrogate": surrogate}
    return LayerQuantizeConfig(weights=TensorSpec(bits=1, options=options))


def keep_float(reason: str) -> LayerQuantizeConfig:
    """Leaves a layer in float32 and records why."""
    return LayerQuantizeConfig(keep_float=reason)
