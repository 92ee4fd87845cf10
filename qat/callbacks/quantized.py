"""The quantizers of a model, as training-time methods see them."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.grid import Grid
from qat.layers import FakeQuantize
from qat.quantizers import GridQuantizer, UniformQuantizer


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that is rounded to the nearest point of a uniform grid.

    Attributes:
        weight: the latent kernel. quantizer, variables: what rounds it.
        filter_size: weights of one output channel.
    """

    weight: tf.Variable
    quantizer: UniformQuantizer
    variables: dict[str, Any]
    filter_size: int

    def grid(self) -> Grid:
        """The grid that the weight is rounded to now."""
        return self.quantizer.grid(self.variables, tf.convert_to_tensor(self.weight))


def rounded_kernels(model: tf_keras.Model, max_bits: int) -> list[Kernel]:
    """The trainable kernels of up to `max_bits` bits that are rounded to a uniform grid.

    Binary, ternary (other than by learned steps) and odd codes follow rules of their own.
    """
    found = []
    for wrapper in _wrappers(model):
        for weight, quantizer, variables in wrapper._weight_vars:
            if wrapper.trainable and _rounds(quantizer) and quantizer.num_bits <= max_bits:
                size = _filter_size(wrapper.layer, weight)
                found.append(Kernel(weight, quantizer, variables, size))
    return found


@dataclasses.dataclass(frozen=True)
class GridKernel:
    """A kernel and what puts it on a grid."""

    weight: tf.Variable
    quantizer: GridQuantizer
    variables: dict[str, Any]


def grid_kernels(model: tf_keras.Model) -> dict[str, GridKernel]:
    """{variable's name: kernel} of all kernels that a quantizer of ours rounds."""
    return {
        weight.name.split(":")[0]: GridKernel(weight, quantizer, variables)
        for wrapper in _wrappers(model)
        for weight, quantizer, variables in wrapper._weight_vars
        if isinstance(quantizer, GridQuantizer)
    }


def uniform_quantizers(model: tf_keras.Model) -> list[tuple[UniformQuantizer, dict[str, Any]]]:
    """Every quantizer that rounds to a uniform grid, of kernels and of activations, once."""
    found: dict[int, tuple[Any, dict[str, Any]]] = {}
    for wrapper in _wrappers(model):
        pairs = [(quantizer, variables) for _, quantizer, variables in wrapper._weight_vars]
        if wrapper._output_quantizers:
            pairs.append((wrapper._output_quantizers[0], wrapper._output_quantizer_vars))
        found.update((id(pair[0]), pair) for pair in pairs)
    for layer in model.submodules:
        if isinstance(layer, FakeQuantize):
            found[id(layer.quantizer)] = layer.quantizer, layer.quantizer_weights
    return [pair for pair in found.values() if _rounds(pair[0])]


def _wrappers(model: tf_keras.Model) -> list[QuantizeWrapper]:
    return [layer for layer in model.submodules if isinstance(layer, QuantizeWrapper)]


def _rounds(quantizer: Any) -> bool:
    """Whether the codes are the nearest ones of the grid, and not made by a rule of their own."""
    uniform = isinstance(quantizer, UniformQuantizer)
    return uniform and type(quantizer).codes is GridQuantizer.codes


def _filter_size(layer: tf_keras.layers.Layer, weight: tf.Variable) -> int:
    name = weight.name.split(":")[0].split("/")[-1]
    axes = configs.kernels(layer).get(name, (-1,))
    filters = 1
    for axis in axes:
        filters *= weight.shape[axis]
    return weight.shape.num_elements() // filters
