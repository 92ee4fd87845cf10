"""Embedding → GATHER of rows of a table that lies on the output's grid."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.graph import ExportError, Tensor, on_grid
from qat.export.lower_linear import variable
from qat.export.pending import Pending

layers = tf_keras.layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Pending):
    """Rows of a table: the quantized row is the row of the quantized table.

    Attributes:
        x: whole numbers, or float32 ones that are.
        table: float32, rows first.
    """

    x: Stored
    table: np.ndarray

    def fuses_activation(self) -> bool:
        return False

    def emit(self, builder, name, grid):
        index = self._index(builder, name)
        codes = self.table
        if grid is not None:
            with tf.device("/CPU:0"):
                codes = grid.quantize(tf.constant(self.table)).numpy()
        table = on_grid(builder.name(f"{self.name}/embeddings"), codes.shape, grid, codes)
        output = builder.activation(name, self.shape, grid)
        version = 1 if grid is None else 2
        builder.operator("GATHER", version, [table, index], output, schema.GatherOptionsT())
        return Stored(output, grid)

    def _index(self, builder: Builder, name: str) -> Tensor:
        """The rows' numbers in a type that GATHER takes."""
        x, grid = self.x.tensor, self.x.grid
        if x.dtype in ("int32", "int64"):
            return x
        return builder.row_numbers(x, 0 if grid is None else -int(grid.zero_point), name)


def _embedding(builder, layer: layers.Embedding, inputs, shape):
    grid = inputs[0].grid
    if grid is not None and (grid.scale != 1.0 or inputs[0].gain != 1.0):
        raise ExportError(
            f"layer {layer.name!r} (Embedding) reads a quantized tensor, which is no row number; "
            "give it a model input that no other layer reads, or a Discretization's output"
        )
    table = variable(layer, "embeddings")
    return Rows(name=layer.name, shape=shape, x=inputs[0], table=table)


LOWERINGS = {layers.Embedding: _embedding}
