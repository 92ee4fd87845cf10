"""The account: what became of every layer of a quantized model."""

from __future__ import annotations

import dataclasses

import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat import configs
from qat.canonical import Call, calls, consumers, functional
from qat.decision import NOT_ANNOTATED
from qat.errors import ModelError
from qat.layers import FakeQuantize
from qat.operator_layers import FoldedAway
from qat.reactnet import METHOD as REACTNET
from qat.reactnet import LearnedShift, LearnedSlope, RSignQuantizer
from qat.roles import FUSES, KEEPS_GRID, Role, role, supports


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAccount:
    """One layer.

    Attributes:
        name, type: as the user built it.
        weight_bits: of its kernel, or of an embedding's rows; None without any or in float.
        activation_bits: of the tensor that a kernel reads, else of the layer's output; None in
            float and inside a fused operator.
        method: the kernel quantizer's, else the output quantizer's; "" for neither; "reactnet" for
            a ReLU that is an RPReLU now, and for a kernel that reads an RSign.
        fused_into: the layer whose operator of the file holds this one; "" for one of its own.
        reason_if_float: why it stays in float32; None if it does not.
    """

    name: str
    type: str
    weight_bits: int | None
    activation_bits: int | None
    method: str
    fused_into: str
    reason_if_float: str | None


def quantization_report(model: tf_keras.Model) -> list[LayerAccount]:
    """A row for every layer of a quantized model, in order of execution.

    Raises:
        ValueError: a model without any quantizer.
    """
    model = functional(model)
    if not any(isinstance(layer, FakeQuantize | QuantizeWrapper) for layer in model.layers):
        raise ModelError(f"model {model.name!r} is not quantized; call qat.quantize_model first")
    walk = _Walk(model)
    # An RPReLU is one row, that of its slope.
    added = (FakeQuantize, LearnedShift)
    rows = [walk.row(call) for call in calls(model) if not isinstance(call.layer, added)]
    return list({row.name: row for row in rows}.values())


class _Walk:
    def __init__(self, model: tf_keras.Model):
        self.producer = {id(out): call for call in calls(model) for out in call.outputs}
        self.readers = consumers(model)
        self.reasons: dict[str, str | None] = {}
        self.quantizer = {}
        for call in calls(model):
            if isinstance(call.layer, FakeQuantize):
                self.quantizer[id(call.inputs[0])] = call.layer.quantizer

    def row(self, call: Call) -> LayerAccount:
        wrapper = call.layer
        layer = _inner(wrapper)
        kernel = _kernel_quantizer(wrapper)
        output = self.quantizer.get(id(call.output)) or _output_quantizer(wrapper)
        reads = self._grid_of(call.inputs[0]) if kernel else None
        fused_into = self._fused_into(call, layer)
        activation = reads or output
        if activation is None and not fused_into and _keeps_grid(layer):
            activation = self._grid_of(call.output)
        weights = output if isinstance(layer, tf_keras.layers.Embedding) else kernel
        reason = _wished(wrapper) or self.reasons.get(fused_into)
        if reason is None and not fused_into and self._is_float(call, layer, kernel, activation):
            reason = NOT_ANNOTATED
        self.reasons[layer.name] = reason
        if reason is not None:  # An output's grid is its readers' then.
            activation = output = None
        return LayerAccount(
            name=layer.name,
            type=getattr(layer, "replaced", type(layer).__name__),
            weight_bits=weights.num_bits if weights else None,
            activation_bits=activation.num_bits if activation else None,
            method=_method(layer, reads, kernel or output),
            fused_into=fused_into,
            reason_if_float=reason,
        )

    def _is_float(self, call: Call, layer, kernel, activation) -> bool:
        """Whether some tensor of the layer's operator has no grid, though nobody said why."""
        if configs.kernels(layer):
            return kernel is None
        if not call.inputs:
            return False
        if activation is None and not self._ends_on_grid(call):
            return True
        # What a concatenation joins lies on its grid; a gather reads numbers of rows.
        no_grids = not supports(layer) or role(layer) in (Role.CONCAT, Role.GATHER)
        return not no_grids and any(self._grid_of(tensor) is None for tensor in call.inputs)

    def _ends_on_grid(self, call: Call) -> bool:
        """Whether its output lies on the grid of a layer fused into it, or of a concatenation."""
        for reader in filter(None, self.readers[id(call.output)]):
            layer = _inner(reader.layer)
            joins = supports(layer) and role(layer) is Role.CONCAT
            if joins or self._fused_into(reader, layer):
                return id(reader.output) in self.quantizer or self._ends_on_grid(reader)
        return False

    def _grid_of(self, tensor):
        """The quantizer on whose grid a tensor lies, seen through layers that only move values."""
        while id(tensor) in self.producer:
            call = self.producer[id(tensor)]
            if isinstance(call.layer, FakeQuantize):
                return call.layer.quantizer
            if _wished(call.layer) or not self._moves(call):
                return None
            tensor = call.inputs[0]
        return None

    def _moves(self, call: Call) -> bool:
        """Whether codes pass unchanged, as through a Rescaling that is a kernel's gain."""
        layer = _inner(call.layer)
        if isinstance(layer, tf_keras.layers.Rescaling):
            return id(call.output) not in self.quantizer
        return _keeps_grid(layer)

    def _fused_into(self, call: Call, layer) -> str:
        """Name of the layer whose operator computes this one too."""
        if isinstance(layer, tf_keras.layers.Rescaling) and id(call.output) not in self.quantizer:
            readers = [reader.layer for reader in self.readers[id(call.output)] if reader]
            return ", ".join(_inner(reader).name for reader in readers)
        if isinstance(layer, FoldedAway):
            return layer.into
        source = self.producer.get(id(call.inputs[0]))
        if source is None or isinstance(source.layer, FakeQuantize):
            return ""
        owner = _inner(source.layer)
        if not (supports(owner) and supports(layer)):
            return ""
        if role(owner) not in FUSES.get(role(layer), ()):
            return ""
        return self._fused_into(source, owner) or owner.name


def _inner(layer):
    return layer.layer if isinstance(layer, QuantizeWrapper) else layer


def _kernel_quantizer(layer):
    weights = getattr(layer, "_weight_vars", None)
    return weights[0][1] if weights else None


def _output_quantizer(layer):
    outputs = getattr(layer, "_output_quantizers", None)
    return outputs[0] if outputs else None


def _method(layer, reads, quantizer) -> str:
    if isinstance(layer, LearnedSlope) or isinstance(reads, RSignQuantizer):
        return REACTNET
    return quantizer.method if quantizer else ""


def _keeps_grid(layer) -> bool:
    return supports(layer) and role(layer) in KEEPS_GRID


def _wished(wrapper) -> str | None:
    """Why the user keeps the layer in float; None if nobody wished it."""
    return getattr(getattr(wrapper, "quantize_config", None), "keep_float", None)
