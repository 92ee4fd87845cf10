"""Embedding → GATHER of rows of a table that lies on the output's grid."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Stored
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
        index = self.x.tensor
        if index.dtype == "float32":
            options = schema.CastOptionsT()
            options.inDataType, options.outDataType = (
                schema.TensorType.FLOAT32,
                schema.TensorType.INT32,
            )
            cast = Tensor(name=builder.name(f"{name}/index"), shape=index.shape, dtype="int32")
            index = builder.operator("CAST", 1, [index], cast, options)
        codes = self.table
        if grid is not None:
            with tf.device("/CPU:0"):
                codes = grid.quantize(tf.constant(self.table)).numpy()
        table = on_grid(builder.name(f"{self.name}/embeddings"), codes.shape, grid, codes)
        output = builder.activation(name, self.shape, grid)
        version = 1 if grid is None else 2
        builder.operator("GATHER", version, [table, index], output, schema.GatherOptionsT())
        return Stored(output, grid)


def _embedding(builder, layer: layers.Embedding, inputs, shape):
    if inputs[0].grid is not None:
        raise ExportError(
            f"layer {layer.name!r} (Embedding) reads a quantized tensor, which is no row number; "
            "give it a model input that no other layer reads"
        )
    table = variable(layer, "embeddings")
    return Rows(name=layer.name, shape=shape, x=inputs[0], table=table)


LOWERINGS = {layers.Embedding: _embedding}
