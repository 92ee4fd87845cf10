"""The freeze table: every grid and integer of a quantized model, computed once.

Eager, float32, on the CPU: XLA and NumPy differ from it by ulps, and nothing derives a scale twice.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.export.graph import ExportError
from qat.grid import Grid
from qat.layers import FakeQuantize
from qat.quantizers import BinaryActivationQuantizer, GridQuantizer


@dataclasses.dataclass(frozen=True)
class FrozenKernel:
    """A kernel's trained integers, in Keras layout.

    Attributes:
        codes: whole numbers, int8, the kernel's shape.
        scale: float32, shaped to broadcast against codes.
        bits: width of the smallest integer that holds the codes.
        unit: all codes are whole multiples of it.
    """

    codes: np.ndarray
    scale: np.ndarray
    bits: int
    unit: int

    @property
    def values(self) -> np.ndarray:
        """The fake-quantized kernel that training's forward used, float32."""
        return self.codes.astype(np.float32) * self.scale


def freeze_kernel(layer: QuantizeWrapper) -> FrozenKernel | None:
    """The integers of a wrapped layer's kernel; None where the recipe left it in float.

    Raises:
        ExportError: a quantizer that is not one of ours; weights that are NaN or infinite.
    """
    if not layer._weight_vars:
        return None
    if len(layer._weight_vars) != 1:
        raise ExportError(
            f"layer {layer.layer.name!r} quantizes {len(layer._weight_vars)} weights in one "
            "layer; build the model with qat.quantize_model, which splits it"
        )
    weight, quantizer, weights = layer._weight_vars[0]
    _require_ours(quantizer, layer.layer.name)
    with tf.device("/CPU:0"):
        value = tf.convert_to_tensor(weight)
        if not np.isfinite(value.numpy()).all():
            raise ExportError(
                f"layer {layer.layer.name!r} has NaN or infinite weights; training diverged: "
                "lower the learning rate and train again"
            )
        codes = quantizer.codes(value, weights).numpy()
        scale = quantizer.grid(weights, value).numpy().scale
    return FrozenKernel(
        codes=codes.astype(np.int8),
        scale=scale,
        bits=quantizer.container_bits,
        unit=quantizer.code_unit,
    )


def freeze_grid(quantizer: GridQuantizer, weights: dict, name: str) -> Grid:
    """The grid of an activation quantizer.

    Raises:
        ExportError: never calibrated; not finite; not one of our quantizers.
    """
    _require_ours(quantizer, name)
    try:
        with tf.device("/CPU:0"):
            grid = quantizer.grid(weights).numpy()
    except ValueError as error:
        raise ExportError(f"quantizer of {name!r}: {error}") from error
    if not (np.isfinite(grid.scale).all() and np.isfinite(grid.zero_point).all()):
        raise ExportError(
            f"quantizer of {name!r} has a NaN or infinite range; training diverged: lower the "
            "learning rate and train again"
        )
    if grid.scale.ndim:
        raise ExportError(f"quantizer of {name!r} is per channel; activations need one scale")
    return grid


def freeze_activation(layer: FakeQuantize) -> Grid:
    """The grid of a FakeQuantize layer. Raises as `freeze_grid`."""
    return freeze_grid(layer.quantizer, layer.quantizer_weights, layer.name)


def freeze_output(layer: QuantizeWrapper) -> Grid | None:
    """The grid that the layer's own config gives its output, if it does."""
    if not layer._output_quantizers:
        return None
    quantizer = layer._output_quantizers[0]
    return freeze_grid(quantizer, layer._output_quantizer_vars, layer.layer.name)


def is_sign(layer: FakeQuantize) -> bool:
    """Whether the layer makes ±1 of its input."""
    return isinstance(layer.quantizer, BinaryActivationQuantizer)


def kernel_channels(layer, kernel: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (broadcastable against the kernel) as one number per output channel."""
    ((_, axes),) = configs.kernels(layer).items()
    shape = [kernel.shape[a] if a - kernel.ndim in axes else 1 for a in range(kernel.ndim)]
    return np.broadcast_to(values, shape).reshape(-1)


def _require_ours(quantizer: object, name: str) -> None:
    if not isinstance(quantizer, GridQuantizer):
        raise ExportError(
            f"{name!r} uses {type(quantizer).__name__}, which has no grid(); use the quantizers of "
            "qat.quantizers, or quantize with qat.quantize_model"
        )
