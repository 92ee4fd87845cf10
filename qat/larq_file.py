"""Bit-packed convolutions of a .tflite file: LceBconv2d's kernels as the ±1 that their bits mean.

Reads Larq Compute Engine's format on its own; nothing is shared with the export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qat.grid import Grid

CONVOLUTION, QUANTIZE = "LceBconv2d", "LceQuantize"
BIT = "bit"  # the type, by name, of a kernel seen as ±1
_WORD = 32
_MOVES_BITS = ("CONCATENATION", "PAD", "PADV2", "RESHAPE")
# Multipliers and biases are worked out in float64 and stored in float32.
_FLOAT32_ERROR = 1e-6


def runs_on_larq(file: Any) -> bool:
    """Whether a FileModel has operators that only Larq Compute Engine runs."""
    return any(op.name.startswith("Lce") for op in file.operators)


def kernel_of(op: Any, operators: Sequence[Any]) -> Any:
    """The constant behind an LceBconv2d's kernel; one that is read twice over counts once."""
    kernel = op.inputs[1]
    producer = _producer(kernel, operators)
    if producer is not None and producer.name == "CONCATENATION":
        parts = {id(tensor): tensor for tensor in producer.inputs}
        if len(parts) == 1:
            return producer.inputs[0]
    return kernel


def seen_as_bits(op: Any, operators: Sequence[Any]) -> Any:
    """An LceBconv2d with its kernel as a constant of ±1, one bit each; others as they are."""
    if op.name != CONVOLUTION:
        return op
    values = signs(op, operators)
    if values is None:
        return op
    packed = kernel_of(op, operators)
    kernel = dataclasses.replace(packed, shape=values.shape, dtype=BIT, data=values)
    return dataclasses.replace(op, inputs=(op.inputs[0], kernel, *op.inputs[2:]))


def signs(op: Any, operators: Sequence[Any]) -> np.ndarray | None:
    """An LceBconv2d's kernel as ±1 in int8, OHWI; None where its filling bits would count.

    The number of channels is that of the tensor whose signs are packed, else all of the words.
    """
    kernel = kernel_of(op, operators)
    if kernel.data is None:
        return None
    words = kernel.data.astype("<i4")
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    channels = _channels(op.inputs[0], operators) or bits.shape[-1]
    used, fill = bits[..., :channels], bits[..., channels:]
    # Read once, the filling bits must be 0 as those of the image. Read beside +1 and -1 they cancel
    # out if half of them are 1.
    expected = 0 if kernel is op.inputs[1] else fill.shape[-1] / 2
    if (fill.sum(axis=-1) != expected).any():
        return None
    return 1 - 2 * used.astype(np.int8)


def convolution_mismatch(op: Any, step: np.ndarray, bias: np.ndarray) -> str | None:
    """What differs between an LceBconv2d and a binary convolution of the model; None if nothing.

    Args:
        step: per channel, what one agreeing pair of ±1 adds to the model's output.
        bias: per channel, in the model's units.
    """
    kernel, multiplier, offset = op.inputs[1:4]
    # A sum over an image padded with +1 and the same image padded with -1 is twice the sum.
    copies = op.inputs[0].shape[-1] / -(-kernel.shape[-1] // _WORD)
    channels = kernel.shape[0]
    for name, stored, expected in (
        ("multipliers", multiplier.data * copies, step),
        ("biases", offset.data, bias),
    ):
        expected = np.broadcast_to(expected, channels)
        different = np.abs(stored - expected) > _FLOAT32_ERROR * np.abs(expected)
        if different.any():
            return f"{int(different.sum())} of {channels} {name} differ"
    return None


def sign_mismatch(file: Any, name: str, grid: Grid, is_plus: np.ndarray) -> str | None:
    """Whether LceQuantize gives the codes of its int8 input the model's signs; None if so.

    Args:
        name: of the tensor of bits.
        grid: of the tensor that the sign is taken of.
        is_plus: whether each of its codes, from the lowest on, becomes +1.
    """
    packed = next(
        (op for op in file.operators if op.name == QUANTIZE and op.outputs[0].name == name), None
    )
    if packed is None:
        return f"{name} is missing from the file"
    (x,) = packed.inputs
    if x.dtype != "int8" or x.scale[0] != grid.scale or x.zero_point[0] != grid.zero_point:
        return f"{name}: taken of another grid"
    codes = np.arange(grid.qmin, grid.qmax + 1)[:, None]
    different = int(((codes >= x.zero_point[0]) != is_plus).sum())
    return f"{name}: {different} codes get another sign" if different else None


def _producer(tensor: Any, operators: Sequence[Any]) -> Any:
    return next((op for op in operators if any(t is tensor for t in op.outputs)), None)


def _channels(tensor: Any, operators: Sequence[Any]) -> int | None:
    """How many channels the bits of a tensor stand for, by the LceQuantize that made them."""
    producer = _producer(tensor, operators)
    if producer is None:
        return None
    if producer.name == QUANTIZE:
        return producer.inputs[0].shape[-1]
    moves = producer.name in _MOVES_BITS
    return _channels(producer.inputs[0], operators) if moves else None
