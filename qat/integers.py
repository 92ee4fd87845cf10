"""The file's integers against the model's.

Each quantizer is asked again for its codes and grid, and compared with the tensors that a plain
reader of the bytes finds under the layer's name. Nothing here is shared with the code that wrote
them: layouts, batch-norm folding and biases are worked out anew.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import larq_file
from qat.canonical import Call, calls, consumers, functional
from qat.integer_kernels import (
    as_read,
    channels_last,
    channels_last_of_file,
    folded_factors,
    per_channel,
    requantization,
    scale_or_bias_mismatch,
    values_of_codes,
)
from qat.layers import FakeQuantize, QuantizedPReLU
from qat.quantizers import BinaryActivationQuantizer
from qat.reactnet import LearnedShift, LearnedSlope
from qat.tflite_file import FileModel, FileOperator, FileTensor

layers = tf_keras.layers
# Parts of a layer's output that carry its grid under a name of their own.
_OUTPUTS = r"(_\d+)?(/(int8|clamped|reshape|sign|output))?(_\d+)?"


def integer_mismatches(model: tf_keras.Model, file: FileModel) -> list[str]:
    """Every tensor of the file whose integers, scale or zero point are not the model's; one line
    each, empty if all agree."""
    return _Comparison(functional(model), file).run()


class _Comparison:
    def __init__(self, model: tf_keras.Model, file: FileModel):
        self.file = file
        self.calls = calls(model)
        self.readers = consumers(model)
        self.producer = {id(call.output): call for call in self.calls}
        self.names = {getattr(layer, "layer", layer).name for layer in model.layers}
        unpacked = file.unpacked_constants()
        self.operators = [
            dataclasses.replace(
                op,
                inputs=tuple(
                    as_read(t, unpacked[t.name]) if t.name in unpacked else t for t in op.inputs
                ),
            )
            for op in file.operators
            if not any(t.name in unpacked for t in op.outputs)
        ]
        # The tensors that a call has been found to own; a layer called twice owns two.
        self.taken: set[str] = set()

    def run(self) -> list[str]:
        found: list[str] = []
        for call in self.calls:
            try:
                found += self.mismatches(call)
            except (AttributeError, IndexError, StopIteration, TypeError, ValueError) as error:
                # A damaged or foreign file need not have the tensors that go with this one.
                found.append(
                    f"{call.layer.name}: built otherwise ({type(error).__name__}: {error})"
                )
        return [" ".join(line.split()) for line in found]

    def mismatches(self, call: Call) -> list[str]:
        """What differs in the file for one call of a layer."""
        if isinstance(call.layer, QuantizeWrapper) and call.layer._weight_vars:
            return self.kernel_mismatches(call)
        if isinstance(call.layer, LearnedSlope | QuantizedPReLU):
            return self.slope_mismatches(call.layer)
        if isinstance(call.layer, LearnedShift):
            return self.shift_mismatches(call)
        if not isinstance(call.layer, FakeQuantize):
            return []
        signs = isinstance(call.layer.quantizer, BinaryActivationQuantizer)
        if signs:
            return self.grid_mismatches(call.layer) + self.sign_mismatches(call)
        return self.grid_mismatches(call.layer) + self.table_mismatches(call)

    def grid_mismatches(self, layer: FakeQuantize) -> list[str]:
        """The tensors named after the layer must lie on its grid, to the last bit."""
        with tf.device("/CPU:0"):
            grid = layer.quantizer.grid(layer.quantizer_weights).numpy()
        base = layer.name.removesuffix("_fake_quantize")
        pattern = re.compile(re.escape(base) + _OUTPUTS)
        named = [
            tensor
            for tensor in self.file.tensors
            if (match := pattern.fullmatch(tensor.name))
            # "conv_1/reshape" is the second of conv's only if no layer is named conv_1.
            and (not match[1] or base + match[1] not in self.names)
            and len(tensor.scale) == 1
            and tensor.dtype != "uint8"
        ]
        expected = f"scale {float(grid.scale):.6g}, zero point {int(grid.zero_point)}"
        if not named and any(tensor.name == f"{base}/sign/bits" for tensor in self.file.tensors):
            return []  # bits have no grid; `sign_mismatches` looks at them
        if not named:
            return [f"{layer.name}: no tensor named {base!r} has a scale; expected {expected}"]
        return [
            f"{tensor.name}: scale {tensor.scale[0]:.6g}, zero point {tensor.zero_point[0]}; "
            f"the model has {expected}"
            for tensor in named
            if tensor.scale[0] != grid.scale or tensor.zero_point[0] != grid.zero_point
        ]

    def kernel_mismatches(self, call: Call) -> list[str]:
        """Some operator with this layer's name must have its codes, scales and biases."""
        layer = call.layer.layer
        pattern = re.compile(re.escape(f"{layer.name}/kernel") + r"(_\d+)?")
        reasons = []
        for op in self.operators:
            kernel = next((t for t in op.inputs if pattern.fullmatch(t.name)), None)
            # LceBconv2d's words are compared where they have been read as bits.
            if kernel is None or kernel.dtype == "int32" or kernel.name in self.taken:
                continue
            reason = self.operator_mismatch(call, kernel, op)
            if reason is None:
                self.taken.add(kernel.name)
                return []
            reasons.append(f"{kernel.name}: {reason}")
        return reasons[:1] or [f"{layer.name}/kernel is missing from the file"]

    def operator_mismatch(self, call: Call, kernel: FileTensor, op: FileOperator) -> str | None:
        """What differs between a call and an operator of the file; None if nothing does."""
        layer = call.layer.layer
        ((weight, quantizer, weights),) = call.layer._weight_vars
        with tf.device("/CPU:0"):
            value = tf.convert_to_tensor(weight)
            codes = quantizer.codes(value, weights).numpy()
            scale = quantizer.grid(weights, value).numpy().scale
        multiplier, offset = self.folded(call)
        expected = channels_last(layer, codes) * np.where(multiplier < 0, -1, 1)
        if kernel.dtype == "float32":
            return None  # the layer's input is float, and so is its operator
        if kernel.data is None or kernel.data.size != expected.size:
            return f"shape {kernel.shape}, the model has {codes.shape}"
        stored = channels_last_of_file(layer, kernel.data).reshape(expected.shape)
        # The operator may read finer codes, or coarser ones that still tell all apart.
        most, read = int(np.abs(expected).max()) or 1, int(np.abs(stored).max()) or 1
        different = int((stored.astype(int) * most != expected * read).sum())
        if different:
            return f"{different} of {expected.size} integers differ"
        if kernel.zero_point.any():
            return "the zero point is not 0"
        step = most / read * per_channel(layer, codes, scale) * np.abs(multiplier)
        step = step * self.gain(call.inputs[0])
        bias = self.bias(layer, multiplier, offset)
        if kernel.dtype == larq_file.BIT:
            return larq_file.convolution_mismatch(op, step, bias)
        moved, early, reason = requantization(call, self.readers, kernel, op, self.file)
        if reason is not None:
            return reason
        return scale_or_bias_mismatch(kernel, op, step, bias + moved, early=early)

    def sign_mismatches(self, call: Call) -> list[str]:
        """Every code of the input must get the sign that its real value gets in the model."""
        name = f"{call.layer.name.removesuffix('_fake_quantize')}/sign"
        compared = self.operator_reading(f"{name}/threshold")
        source = self.source(call.inputs[0])
        if source is None:
            return [f"{name} is taken of no grid"]
        with tf.device("/CPU:0"):
            grid = source.quantizer.grid(source.quantizer_weights).numpy()
        codes = np.arange(grid.qmin, grid.qmax + 1)[:, None]
        reals = (codes - grid.zero_point).astype(np.float32) * grid.scale
        bias = call.layer.quantizer_weights.get("bias")
        bias = np.float32(0) if bias is None else bias.numpy()
        expected = reals * np.float32(self.gain(call.inputs[0])) >= -bias
        if compared is None:
            reason = larq_file.sign_mismatch(self.file, f"{name}/bits", grid, expected)
            return [] if reason is None else [reason]
        x, limit = compared.inputs
        select = next(op for op in self.file.operators if compared.outputs[0] in op.inputs)
        (zero_point,) = x.zero_point
        step = x.scale[0]
        same = limit.scale[0] == step and limit.zero_point[0] == zero_point == grid.zero_point
        if not (same and 2.0**-8 <= step < 1.0):  # finer, the kernel takes neighbours for equal
            return [f"{limit.name}: compared on another grid, or on one of inexact steps"]
        plus, minus = (tensor.data.reshape(-1) for tensor in select.inputs[1:])
        chosen = np.where(codes >= limit.data.reshape(-1), plus, minus)
        different = int((np.sign(chosen) != np.where(expected, 1, -1)).any(axis=0).sum())
        return [f"{limit.name}: {different} thresholds differ"] if different else []

    def table_mismatches(self, call: Call) -> list[str]:
        """A table of codes or rows must hold what the model makes of each code or row."""
        maker, quantizer = self.producer.get(id(call.inputs[0])), call.layer.quantizer
        name = f"{call.layer.name.removesuffix('_fake_quantize')}/table"
        operator = self.operator_reading(name)
        with tf.device("/CPU:0"):
            if maker is not None and isinstance(maker.layer, layers.Embedding):
                operator = self.operator_reading(f"{maker.layer.name}/embeddings")
                expected = maker.layer.embeddings
            elif operator is None:
                return []
            else:
                source = self.source(maker.inputs[0])
                grid = source.quantizer.grid(source.quantizer_weights)
                expected = values_of_codes(maker, grid, self.gain(maker.inputs[0]))
            codes = quantizer.codes(tf.convert_to_tensor(expected), call.layer.quantizer_weights)
        different = int((operator.inputs[0].data.reshape(codes.shape) != codes.numpy()).sum())
        return [f"{operator.inputs[0].name}: {different} codes differ"] if different else []

    def slope_mismatches(self, layer: LearnedSlope | QuantizedPReLU) -> list[str]:
        """The PRELU's constant must hold the codes and the scale of the layer's slopes."""
        name = f"{layer.name}/slope"
        operator = self.operator_reading(name)
        if operator is None:
            return [f"{name} is missing from the file"]
        with tf.device("/CPU:0"):
            learned = layer.slope if isinstance(layer, LearnedSlope) else layer.alpha
            value = tf.convert_to_tensor(learned)
            codes = layer.quantizer.codes(value, {}).numpy()
            scale = layer.quantizer.grid({}, value).numpy().scale
        stored = next(tensor for tensor in operator.inputs if tensor.name == name)
        different = int((stored.data.reshape(-1) != codes.reshape(-1)).sum())
        if different or stored.scale[0] != scale or stored.zero_point.any():
            return [f"{name}: {different} of {codes.size} slopes differ, or their scale"]
        return []

    def shift_mismatches(self, call: Call) -> list[str]:
        """The affine operator must multiply by one and add the layer's shifts."""
        name = f"{call.layer.name}/kernel"
        operator = self.operator_reading(name)
        if operator is None:
            return [f"{name} is missing from the file"]
        kernel = next(tensor for tensor in operator.inputs if tensor.name == name)
        code = kernel.data.reshape(-1).astype(float)
        if (code <= 0).any() or kernel.zero_point.any():
            return [f"{name}: not a multiplication by one"]
        moved, early, reason = requantization(call, self.readers, kernel, operator, self.file)
        shifts = call.layer.shift.numpy() + moved
        reason = reason or scale_or_bias_mismatch(kernel, operator, 1 / code, shifts, early=early)
        return [] if reason is None else [f"{name}: {reason}"]

    def operator_reading(self, name: str) -> FileOperator | None:
        """The operator with a constant of this name."""
        found = (op for op in self.file.operators for t in op.inputs if t.name == name)
        return next(found, None)

    def source(self, tensor) -> FakeQuantize | None:
        """The quantizer on whose grid a tensor lies, seen through layers that move values."""
        while id(tensor) in self.producer:
            call = self.producer[id(tensor)]
            if isinstance(call.layer, FakeQuantize):
                return call.layer
            tensor = call.inputs[0]
        return None

    def folded(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """(multiplier, offset) of the affine layer that alone reads the call's output, float64."""
        readers = self.readers[id(call.output)]
        norm = readers[0].layer if len(readers) == 1 and readers[0] is not None else None
        return folded_factors(norm)

    def bias(self, layer, multiplier, offset) -> np.ndarray:
        own = layer.bias.numpy().astype(float) if layer.use_bias else 0.0
        return own * multiplier + offset

    def gain(self, tensor) -> float:
        """Product of the Rescalings between a tensor and the grid it lies on."""
        gain = 1.0
        while id(tensor) in self.producer:
            call = self.producer[id(tensor)]
            if isinstance(call.layer, FakeQuantize):
                break
            if isinstance(call.layer, layers.Rescaling):
                gain *= call.layer.scale
            tensor = call.inputs[0]
        return gain
