"""Putting the biases of a trained model on the grid that the file stores them on."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.canonical import Call, calls, consumers, functional
from qat.export.containers import Container, kernel_container, require_weight_storage
from qat.export.lower_linear import AFFINE_CODE, OPERATORS, affine_of
from qat.export.lower_reactnet import slopes
from qat.export.target import Target, find_target
from qat.grid import Grid
from qat.layers import FakeQuantize, QuantizedPReLU
from qat.neighbours import Output, grid_of, output_of, source_of
from qat.operator_layers import Affine, ChannelScale
from qat.quantizers import BinaryActivationQuantizer, GridQuantizer
from qat.reactnet import LearnedShift, LearnedSlope
from qat.ties import LARGEST_BIAS, away_from_ties, early, from_lowest, second_rounding

layers = tf_keras.layers


def settle_biases(
    model: tf_keras.Model, *, weight_storage: str = "size", target: str = "litert"
) -> tf_keras.Model:
    """Rounds every bias to the int32 multiple of its scale that the file will hold.

    The file stores `round(b / S)`, S = input scale · kernel scale, of the bias b that batch
    normalization leaves. Left to the export, that rounding is the largest difference between model
    and file: where a sign or a 4-bit grid follows, it moves codes. Here the model takes it over:
    the batch norm's beta (else the layer's own bias) changes by at most S / 2. Convolutions with
    packed kernels, and all of target tflm, reach 8-bit codes up to S early: the model's bias is
    that much above the file's (`qat.ties.early`). In a file of another storage or target biases are
    up to S / 2 off. A layer with neither bias nor beta has nothing to settle. Biases of 1-bit
    kernels that read signs move up to 63 S farther, less than 1/8 of an output step, to where all
    of LiteRT's kernels round all sums alike (`qat.ties.away_from_ties`). RPReLU's shifts are biases
    too; PRELU's kernel rounds twice, which its slopes learn here (`qat.prelu`). Call it when
    training is over; a second call changes nothing.

    Args:
        model: quantized and calibrated; changed in place.
        weight_storage, target: that `export_tflite` will be given.

    Returns:
        The model.

    Raises:
        ExportError: an unknown weight_storage or target.
    """
    require_weight_storage(weight_storage)
    storage = _Storage(weight_storage, find_target(target))
    model = functional(model)
    readers = consumers(model)
    producer = {id(call.output): call for call in calls(model)}
    for call in calls(model):
        wrapped = isinstance(call.layer, QuantizeWrapper) and call.layer._weight_vars
        pieces = isinstance(call.layer, LearnedShift | LearnedSlope | QuantizedPReLU)
        source, gain = source_of(call.inputs[0], producer) if wrapped or pieces else (None, 1.0)
        if source is None:
            continue
        following, output = readers[id(call.output)], output_of(call, readers)
        alone = len(following) == 1 and following[0] is not None
        if wrapped:
            reader = following[0].layer if alone else None
            _settle(call, reader, source, gain, output, storage)
        elif output is not None:
            step = gain * float(grid_of(source.quantizer, source.quantizer_weights).scale)
            _settle_piece(call.layer, step, output, storage)
    return model


@dataclasses.dataclass(frozen=True)
class _Storage:
    weight_storage: str
    target: Target

    def operator(self, layer: layers.Layer) -> str:
        operator = OPERATORS[type(layer)]
        return self.target.dense if operator == "FULLY_CONNECTED" else operator


def _settle(
    call: Call,
    reader: layers.Layer | None,
    source: FakeQuantize,
    gain: float,
    output: Output | None,
    storage: _Storage,
) -> None:
    layer = call.layer.layer
    ((weight, quantizer, weights),) = call.layer._weight_vars
    settled = _settled(layer, reader)
    if settled is None:
        return
    variable, factor, rest, multiplier = settled
    with tf.device("/CPU:0"):
        value = tf.convert_to_tensor(weight)
        scale = quantizer.grid(weights, value).numpy().scale
        codes = quantizer.codes(value, weights).numpy().astype(int)
    shape = _channel_shape(layer, weight)
    signs = np.where(np.broadcast_to(multiplier, [np.prod(shape)]) < 0, -1, 1).reshape(shape)
    operator = storage.operator(layer)
    container = _container(layer, quantizer, codes * signs, output, storage)
    step = np.broadcast_to(scale, shape).reshape(-1) * np.abs(multiplier)
    step = (
        step
        * float(grid_of(source.quantizer, source.quantizer_weights).scale)
        * gain
        / container.finer
    )
    twice = container.rounds_twice(operator, storage.target)
    sums = _sums(layer, codes, source, container.finer)
    _settle_bias(variable, factor, rest, step, output, twice=twice, sums=sums)


def _settle_bias(
    variable: tf.Variable,
    factor: np.ndarray | float,
    rest: np.ndarray | float,
    step: np.ndarray,
    output: Output | None,
    *,
    twice: bool,
    sums: np.ndarray | None = None,
) -> None:
    """Settles `factor · variable + rest`, the bias of an operator whose sums have these steps."""
    written, ahead = None if output is None else output.grid, np.zeros_like(step)
    if output is not None and twice:
        written = output.grid if output.rectified else from_lowest(step, output.grid)
        ahead = early(step, written, rectified=output.rectified)
        rest = rest + float(output.grid.zero_point - written.zero_point) * float(written.scale)
    _round(variable, factor, rest, step, ahead, sums, written)


def _settle_piece(
    layer: LearnedShift | LearnedSlope | QuantizedPReLU,
    step: float,
    output: Output,
    storage: _Storage,
) -> None:
    """Of RPReLU and PReLU: a shift as a bias, `early` of a slope; step: of the tensor it reads."""
    if not isinstance(layer, LearnedShift):
        with tf.device("/CPU:0"):
            value = tf.convert_to_tensor(getattr(layer, slopes(layer)))
            scale = float(layer.quantizer.grid({}, value).numpy().scale)
        layer.early.assign(second_rounding(step * scale, float(output.grid.scale)))
        return
    twice = Container("int8", "int8").rounds_twice("DEPTHWISE_CONV_2D", storage.target)
    step = np.full(layer.shift.shape, step / AFFINE_CODE)
    _settle_bias(layer.shift, 1.0, 0.0, step, output, twice=twice)


def _settled(layer: layers.Layer, reader: layers.Layer | None) -> tuple | None:
    """(variable, factor, rest, multiplier): the operator's bias is `factor · variable + rest`, and
    its kernel `multiplier` times the layer's; None if no variable can settle it."""
    own = layer.bias.numpy().astype(float) if layer.use_bias else 0.0
    if isinstance(reader, layers.BatchNormalization):
        if not reader.center:
            return None
        deviation = np.sqrt(reader.moving_variance.numpy().astype(float) + reader.epsilon)
        multiplier = (reader.gamma.numpy().astype(float) if reader.scale else 1.0) / deviation
        return reader.beta, 1.0, (own - reader.moving_mean.numpy()) * multiplier, multiplier
    if not layer.use_bias:
        return None
    if isinstance(reader, Affine | ChannelScale):
        multiplier, offset = affine_of(reader)
        return layer.bias, multiplier, offset, multiplier
    return layer.bias, 1.0, 0.0, np.ones(())


def _container(
    layer: layers.Layer,
    quantizer: GridQuantizer,
    codes: np.ndarray,
    output: Output | None,
    storage: _Storage,
) -> Container:
    """What holds the kernel in the file; without an output grid its operator computes in float."""
    if output is None:
        return Container("int8", "int8")
    return kernel_container(
        codes.T if isinstance(layer, layers.Dense) else codes,
        bits=quantizer.container_bits,
        unit=quantizer.code_unit,
        operator=storage.operator(layer),
        output=output.grid,
        storage=storage.weight_storage,
        target=storage.target,
    )


def _sums(
    layer: layers.Layer, codes: np.ndarray, source: FakeQuantize, finer: float
) -> np.ndarray | None:
    """What a kernel of codes ±c and 0 that reads signs ±s can sum up to; None for all others.

    `finer · c · s · k`, |k| <= products per sum. Padding leaves out whole pixels: with an even
    number of channels, and no 0, k is even.
    """
    largest = np.abs(codes).max()
    signs = isinstance(source.quantizer, BinaryActivationQuantizer)
    if not (signs and np.isin(np.abs(codes), (0, largest)).all()):
        return None
    products = codes.size // int(np.prod(_channel_shape(layer, codes)))
    channels = products // int(np.prod(getattr(layer, "kernel_size", 1)))
    even = channels % 2 == 0 and codes.all()
    k = np.arange(-products, products + 1, 2 if even else 1)
    return k * float(finer * largest * source.quantizer.grid({}).qmax)


def _channel_shape(layer: layers.Layer, weight: tf.Variable | np.ndarray) -> list[int]:
    ((_, axes),) = configs.kernels(layer).items()
    rank = len(weight.shape)
    return [size if axis - rank in axes else 1 for axis, size in enumerate(weight.shape)]


def _round(
    variable: tf.Variable,
    factor: np.ndarray | float,
    rest: np.ndarray | float,
    step: np.ndarray,
    ahead: np.ndarray,
    sums: np.ndarray | None,
    output: Grid | None,
) -> None:
    """Changes the variable so that `factor · variable + rest` is whole steps, plus `ahead`.

    Given the kernel's sums and its output's grid, a number that keeps clear of rounding ties.
    Channels whose bias leaves half of int32 are left alone: the export raises their scale.
    """
    value = variable.numpy().astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((factor * value + rest) / step - ahead)
        if sums is not None and output is not None:
            codes = away_from_ties(codes, step / float(output.scale), sums, output)
        settled = ((codes + ahead) * step - rest) / factor
        legal = (np.abs(codes) < LARGEST_BIAS) & np.isfinite(settled)
    variable.assign(np.where(legal, settled, value).astype(np.float32))
