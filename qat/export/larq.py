"""Larq Compute Engine: a convolution of ±1 by ±α takes one bit a value, in its custom operators.

| operator | reads | gives |
|---|---|---|
| LceQuantize | int8 codes | a bit a channel, 32 to an int32: 1 (for -1) where code < zero point |
| LceBconv2d | bits, kernel bits OHWI, a multiplier and bias per channel | int8 codes |

LceBconv2d counts disagreeing bits, `sum = channels_in · taps - 2 · count`, and rounds
`(multiplier · sum + bias) / scale + zero_point` once, in float32; no tensor is in float.

A bit cannot be the 0 that Keras pads with, and LceBconv2d takes zero padding for int8 outputs only
in its slow reference kernel. But 0 = (1 - 1) / 2: the image is padded with +1 and with -1, both lie
beside each other as channels, and a kernel that repeats itself reads twice the sum, for half the
multiplier. The file holds the kernel once: CONCATENATION repeats constants when it is loaded.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from qat.export.builder import Builder, Stored
from qat.export.graph import Graph, Operator, Tensor, activation_dtype
from qat.export.linear import Linear
from qat.export.target import Target
from qat.grid import Grid

WORD = 32  # channels in an int32
# The newest that Larq Compute Engine 0.16, TensorFlow Lite 2.16, knows.
_NEWEST_FULLY_CONNECTED = 11
_MOVES_SIGNS = ("RESHAPE", "MAX_POOL_2D")
_LARGEST_CODE = 2.0**30  # what LceBconv2d rounds must fit into int32


class LarqBuilder(Builder):
    """Writes the binary convolutions that Larq Compute Engine has a kernel for as LceBconv2d."""

    def __init__(self, *, weight_storage: str, target: Target):
        super().__init__(weight_storage=weight_storage, target=target)
        # For the id of a ±1 tensor, the int8 tensor whose codes from its zero point on are +1.
        self._sources: dict[int, Tensor] = {}
        self._bits: dict[int, Tensor] = {}

    def sign(self, value: Stored, grid: Grid, name: str, thresholds: np.ndarray) -> Stored:
        """As `Builder.sign`; LceQuantize reads its input instead where it compares with 0."""
        stored = super().sign(value, grid, name, thresholds)
        zero = thresholds.size == 1 and thresholds.item() == int(value.grid.zero_point)
        direct = zero and value.tensor.dtype == "int8"
        self._sources[id(stored.tensor)] = value.tensor if direct else stored.tensor
        return stored

    def packed_convolution(self, linear: Linear, name: str, grid: Grid) -> Stored | None:
        """LceBconv2d for a binary convolution; None, and a note for 1-bit kernels, for others."""
        if not _is_binary(linear):
            return None
        reason = self._reason(linear, grid)
        if reason is not None:
            self.graph.notes[linear.name] = f"not bit-packed: {reason}"
            return None
        bits, padded = self._input(linear)
        copies = 2 if padded else 1
        kernel = pack(linear.kernel, balanced=padded)
        kernel = self.constant(f"{linear.name}/kernel", kernel, "int32")
        if padded:
            kernel = self._beside(kernel, kernel, f"{linear.name}/twice")
        channels = linear.x.shape[3] if copies == 1 else kernel.shape[3] * WORD
        one = float(linear.x.grid.scale) * linear.x.grid.qmax * linear.x.gain
        multiplier = linear.scale * np.abs(linear.kernel).max() * one / copies
        limit = float(grid.scale) * _LARGEST_CODE
        values = {"multiplier": multiplier, "bias": np.clip(linear.bias, -limit, limit)}
        constants = [
            self.constant(f"{linear.name}/{key}", value.astype(np.float32), "float32")
            for key, value in values.items()
        ]
        output = self.activation(name, linear.shape, grid)
        # The fifth input is thresholds, for outputs of bits.
        inputs = [bits, kernel, *constants, None]
        self.operator("LceBconv2d", 1, inputs, output, _options(linear, channels))
        return self.clamped(Stored(output, grid), name)

    def _reason(self, linear: Linear, grid: Grid) -> str | None:
        """Why a binary kernel has no LceBconv2d; None if it has one."""
        x = linear.x
        if linear.operator != "CONV_2D":
            return f"Larq Compute Engine has no binary {linear.operator}"
        if linear.kernel.shape[3] != x.shape[3]:
            return "its optimized kernels take no grouped convolution"
        if self._source(x.tensor) is None:
            return "its input is not ±1"
        if activation_dtype(grid) != "int8":
            return "its output has 16 bits"
        if x.shape[3] % 2 and any(map(any, _padding(linear))):
            return "zero padding needs an even number of input channels"
        if not _saturates(linear.activation, grid):
            return f"the output's grid goes beyond its {linear.activation}"
        return None

    def _source(self, tensor: Tensor) -> Tensor | None:
        """The int8 tensor to pack for a ±1 tensor; None for all others."""
        if id(tensor) in self._sources:
            return self._sources[id(tensor)]
        producer = self._producer(tensor)
        if producer is None or producer.name not in _MOVES_SIGNS:
            return None
        return None if self._source(producer.inputs[0]) is None else tensor

    def _producer(self, tensor: Tensor) -> Operator | None:
        return next((op for op in self.graph.operators if op.outputs[0] is tensor), None)

    def _input(self, linear: Linear) -> tuple[Tensor, bool]:
        """(bits that the convolution reads, whether they lie there twice to pad with zeros)."""
        x, pads = linear.x, _padding(linear)
        bits = self._packed(x)
        if not any(map(any, pads)):
            return bits, False
        name = f"{linear.name}/padded"
        shape = tuple(n + sum(pad) for n, pad in zip(bits.shape, pads, strict=True))
        margins = self.constant(f"{name}/margins", np.asarray(pads, np.int32), "int32")
        minus = self.constant(f"{name}/minus_one", np.asarray(-1), "int32")
        images = [
            Tensor(name=self.name(f"{name}/{sign}"), shape=shape, dtype="int32")
            for sign in ("plus", "minus")
        ]
        self.operator("PAD", 1, [bits, margins], images[0], schema.PadOptionsT())
        self.operator("PADV2", 1, [bits, margins, minus], images[1], schema.PadV2OptionsT())
        return self._beside(*images, name), True

    def _packed(self, x: Stored) -> Tensor:
        """The bits of a ±1 tensor, packed once however often they are read."""
        if id(x.tensor) not in self._bits:
            shape = (*x.shape[:-1], -(-x.shape[-1] // WORD))
            name = self.name(f"{x.tensor.name}/bits")
            bits = Tensor(name=name, shape=shape, dtype="int32")
            self.operator("LceQuantize", 1, [self._source(x.tensor)], bits, b"")
            self._bits[id(x.tensor)] = bits
        return self._bits[id(x.tensor)]

    def _beside(self, one: Tensor, other: Tensor, name: str) -> Tensor:
        """Two tensors of words as one, along the channels."""
        options = schema.ConcatenationOptionsT()
        options.axis = 3
        shape = (*one.shape[:3], one.shape[3] + other.shape[3])
        output = Tensor(name=self.name(name), shape=shape, dtype="int32")
        return self.operator("CONCATENATION", 1, [one, other], output, options)


def pack(kernel: np.ndarray, *, balanced: bool) -> np.ndarray:
    """Signs of an OHWI kernel as int32 words, the first channel in the lowest bit, 1 for -1.

    Args:
        balanced: the bits that fill the last word are half ones: read beside +1 and beside -1
            they cancel out. Else they are 0, as LceQuantize's.
    """
    channels = kernel.shape[-1]
    bits = np.zeros((*kernel.shape[:-1], -(-channels // WORD) * WORD), np.uint8)
    bits[..., :channels] = kernel < 0
    if balanced:
        bits[..., channels + (bits.shape[-1] - channels) // 2 :] = 1
    return np.packbits(bits, axis=-1, bitorder="little").view("<i4")


def finish(graph: Graph) -> Graph:
    """Leaves out operators that nobody reads any more, and what LCE's TensorFlow Lite lacks."""
    read = {id(tensor) for tensor in graph.outputs}
    kept = []
    for operator in reversed(graph.operators):
        if id(operator.outputs[0]) in read:
            read.update(id(tensor) for tensor in operator.inputs)
            kept.append(operator)
    graph.operators[:] = reversed(kept)
    for operator in graph.operators:
        if operator.name == "FULLY_CONNECTED":
            operator.version = min(operator.version, _NEWEST_FULLY_CONNECTED)
    return graph


def _is_binary(linear: Linear) -> bool:
    """Whether the kernel is ±one code; 8-bit ones are batch norms of their own."""
    return linear.bits <= 4 and len(np.unique(np.abs(linear.kernel))) == 1


def _padding(linear: Linear) -> list[tuple[int, int]]:
    """(before, after) of every dimension; for an odd number the extra one comes after."""
    options = linear.options(schema.ActivationFunctionType.NONE)
    if options.padding == schema.Padding.VALID:
        return [(0, 0)] * 4
    pads = [(0, 0)]
    strides = options.strideH, options.strideW
    dilations = options.dilationHFactor, options.dilationWFactor
    for axis, stride, dilation in zip((1, 2), strides, dilations, strict=True):
        reach = (linear.kernel.shape[axis] - 1) * dilation + 1
        last = (linear.shape[axis] - 1) * stride
        total = max(last + reach - linear.x.shape[axis], 0)
        pads.append((total // 2, total - total // 2))
    return [*pads, (0, 0)]


def _saturates(activation: str | None, grid: Grid) -> bool:
    """Whether the ends of the grid are those of the ReLU, which LceBconv2d itself would clamp
    before the multiplier."""
    if activation is None:
        return True
    top = (grid.qmax - float(grid.zero_point)) * float(grid.scale)
    return grid.zero_point == grid.qmin and (activation == "relu" or top <= 6 * (1 + 1e-6))


def _options(linear: Linear, channels: int) -> bytes:
    """LceBconv2d's options, a flexbuffer; the image has its padding already."""
    made = linear.options(schema.ActivationFunctionType.NONE)
    return bytes(
        flexbuffers.Dumps(
            {
                "channels_in": channels,
                "dilation_height_factor": made.dilationHFactor,
                "dilation_width_factor": made.dilationWFactor,
                "fused_activation_function": schema.ActivationFunctionType.NONE,
                "pad_values": 0,
                "padding": schema.Padding.VALID,
                "stride_height": made.strideH,
                "stride_width": made.strideW,
            }
        )
    )
