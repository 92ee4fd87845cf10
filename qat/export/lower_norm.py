"""LayerNormalization in float32: `γ · (x - μ) / √(σ² + ε) + β` over the layer's axes.

TensorFlow's converter takes it apart with two transposes; this does without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.graph import Tensor
from qat.export.lower_linear import variable

layers = tf_keras.layers


class _Formula:
    """Float operators, each on the results of those before."""

    def __init__(self, builder: Builder, name: str):
        self.builder, self.name = builder, name

    def step(self, operator: str, inputs: list[Tensor], options: Any, to: str = "") -> Tensor:
        name = self.builder.name(f"{self.name}/{to}" if to else self.name)
        shape = np.broadcast_shapes(*(tensor.shape for tensor in inputs))
        output = Tensor(name=name, shape=tuple(shape), dtype="float32")
        return self.builder.operator(operator, 1, inputs, output, options)

    def mean(self, x: Tensor, axes: list[int], to: str) -> Tensor:
        constant = self.builder.constant(f"{self.name}/axes", np.asarray(axes, np.int32), "int32")
        options = schema.ReducerOptionsT()
        options.keepDims = True
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        output = self.builder.activation(f"{self.name}/{to}", shape, None)
        return self.builder.operator("MEAN", 1, [x, constant], output, options)

    def constant(self, name: str, value) -> Tensor:
        return self.builder.constant(
            f"{self.name}/{name}", np.asarray(value, np.float32), "float32"
        )


def _layer_normalization(builder: Builder, layer: layers.LayerNormalization, inputs, shape):
    x = builder.to_float(inputs[0], layer.name).tensor
    axes = sorted(axis % len(shape) for axis in np.atleast_1d(layer.axis))
    made = _Formula(builder, layer.name)
    mean = made.mean(x, axes, "mean")
    squares = made.step(
        "SQUARED_DIFFERENCE", [x, mean], schema.SquaredDifferenceOptionsT(), "squares"
    )
    variance = made.mean(squares, axes, "variance")
    epsilon = made.constant("epsilon", layer.epsilon)
    raised = made.step("ADD", [variance, epsilon], schema.AddOptionsT(), "raised")
    inverse = made.step("RSQRT", [raised], None, "inverse")
    centered = made.step("SUB", [x, mean], schema.SubOptionsT(), "centered")
    kept = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    gamma = np.reshape(variable(layer, "gamma"), kept) if layer.scale else np.ones(kept)
    beta = np.reshape(variable(layer, "beta"), kept) if layer.center else np.zeros(kept)
    scale = made.step(
        "MUL", [inverse, made.constant("gamma", gamma)], schema.MulOptionsT(), "scale"
    )
    scaled = made.step("MUL", [centered, scale], schema.MulOptionsT(), "scaled")
    output = made.step("ADD", [scaled, made.constant("beta", beta)], schema.AddOptionsT())
    return Stored(output, None)


LOWERINGS = {layers.LayerNormalization: _layer_normalization}
