"""Which container holds each weight of a file, what its operator reads, and what that takes."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

import numpy as np
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat.tflite_file import FileModel, FileOperator, FileTensor

_BITS = {"bit": 1, "int2": 2, "int4": 4, "int8": 8}
_PACKED = ("int2", "int4")
_NAME = re.compile(r"(.+)/(kernel|bias|multiplier)(_\d+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightRow:
    """A kernel or bias of a file.

    Attributes:
        layer, tensor, operator: that it belongs to, its name, and what reads it.
        stored, read: types in the file and at the operator; they differ where the file unpacks it.
        values, bytes: how many, and what they take.
        bits: of the narrowest integers that hold a kernel, or as many as its recipe asks for where
            that is more; None for biases and kernels in float.
        narrowest: container that would hold a kernel of these bits for this operator and target.
    """

    layer: str
    tensor: str
    operator: str
    stored: str
    read: str
    values: int
    bytes: int
    bits: int | None
    narrowest: str | None

    @property
    def too_wide(self) -> bool:
        """Whether a narrower container would do."""
        return self.bits is not None and _BITS[self.narrowest] < _BITS[self.stored]


def weight_rows(file: FileModel, model: tf_keras.Model, target: str) -> list[WeightRow]:
    """A row for each of `FileModel.weights`.

    Args:
        file: as read.
        model: that the file was made from; its recipe says how wide each kernel must be.
        target: "litert", "tflm" or "lce".
    """
    quantizers = {
        layer.layer.name: layer._weight_vars[0][1]
        for layer in model.layers
        if isinstance(layer, QuantizeWrapper) and layer._weight_vars
    }
    rows = []
    for op, read, stored in file.weight_reads():
        match = _NAME.fullmatch(stored.name)
        layer = match[1] if match else stored.name
        kernel = match and match[2] == "kernel" and stored.dtype in _BITS
        bits = _bits(stored, quantizers.get(layer)) if kernel else None
        rows.append(
            WeightRow(
                layer=layer,
                tensor=stored.name,
                operator=op.name,
                stored=stored.dtype,
                read=read.dtype,
                values=int(np.prod(stored.shape)),
                bytes=stored.bytes,
                bits=bits,
                narrowest=None if bits is None else _narrowest(bits, op, stored, target),
            )
        )
    return rows


def bytes_by_layer(rows: Iterable[WeightRow]) -> dict[str, int]:
    """{layer: bytes of its weights}, in order of execution."""
    total = collections.Counter()
    for row in rows:
        total[row.layer] += row.bytes
    return dict(total)


def _bits(kernel: FileTensor, quantizer) -> int | None:
    """Codes of ±7, which stand for ±1, take two bits."""
    if kernel.dtype == "bit":
        return 1
    if kernel.data is None:
        return None
    codes = kernel.data.astype(int)
    if quantizer is None or quantizer.code_unit > 1:
        codes, least = codes // max(1, int(np.gcd.reduce(codes, axis=None))), 1
    else:
        least = quantizer.container_bits
    return max(least, 1 + max(int(codes.max()), -int(codes.min()) - 1).bit_length())


def _narrowest(bits: int, op: FileOperator, kernel: FileTensor, target: str) -> str:
    """LiteRT unpacks any container for convolutions. Its FULLY_CONNECTED reads packed ones itself,
    and only in rows of whole bytes on XNNPACK; the other targets only read INT4, in convolutions.
    """
    wide = op.outputs[0].dtype == "int16"
    if kernel.dtype == "bit":
        types = ("bit",)
    elif target != "litert":
        convolution = op.name in ("CONV_2D", "DEPTHWISE_CONV_2D")
        types = ("int4",) if convolution and not wide else ()
    elif op.name == "FULLY_CONNECTED":
        types = ("int4",) if wide else _PACKED
        types = [name for name in types if kernel.shape[-1] * _BITS[name] % 8 == 0]
    else:
        types = _PACKED
    return next((name for name in types if bits <= _BITS[name]), "int8")
