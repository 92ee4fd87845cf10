"""Where the activation quantizers go: one grid wherever the integer file has a tensor.

An operator of the file is a fused group (convolution, batch normalization, ReLU), so its inner
tensors get no quantizer and its output gets one. Layers that only move values keep the grid of
their input. Activations below 8 bits belong to the tensor that a kernel reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tf_keras

from qat import configs, quantizers
from qat.canonical.graph import Call, calls, consumers, rebuild
from qat.decision import NOT_ANNOTATED, Decision, wide_spec
from qat.layers import FakeQuantize, ReplacedBySign
from qat.negatives import never_negative
from qat.reactnet import METHOD as REACTNET
from qat.reactnet import LearnedShift, LearnedSlope
from qat.recipe import RecipeError, TensorSpec
from qat.roles import FUSES, KEEPS_GRID, Role, fixed_range, require_widths, role, supports

layers = tf_keras.layers
# A layer that moves codes, and that nobody wants in float, is none of the file's float operators.
_NO_WISH = (None, NOT_ANNOTATED)
_FUSES_INTO_CONCAT = (*FUSES[Role.RELU], Role.RELU)


def place_quantizers(
    model: tf_keras.Model,
    decisions: Mapping[str, Decision],
    *,
    input_range: tuple[float, float] | None = None,
    wrap: Callable[[layers.Layer], layers.Layer] = lambda layer: layer,
) -> tf_keras.Model:
    """A new model with `FakeQuantize` layers, sharing all its other layers with `model`.

    Where a kernel reads 1-bit activations, the ReLU in front of it becomes the identity: the
    sign takes its place. With method "reactnet" it becomes an RPReLU.

    Args:
        model: canonical functional model.
        decisions: by layer name, for every layer.
        input_range: (minimum, maximum) of the model's inputs; None = observed like any other.
        wrap: what to put in a layer's place, e.g. the wrapper that quantizes its kernel.

    Raises:
        UnsupportedLayerError: a quantized layer has no integer operator.
        RecipeError: 16-bit activations mixed with narrower ones; a method that cuts off negative
            numbers for a tensor that can have some.
    """
    placement = _Placement(model, decisions, input_range, wrap)
    return rebuild(model, placement.visit, placement.on_input)


class _Placement:
    def __init__(self, model, decisions, input_range, wrap):
        self.decisions = decisions
        self.input_range = input_range
        self.readers = consumers(model)
        self.producer = {id(out): call for call in calls(model) for out in call.outputs}
        self.wide = wide_spec(decisions)
        # The ids of the outputs of ReLUs that become RPReLUs.
        self.rprelus: set[int] = set()
        self.roles: dict[int, Role] = {}
        for call in reversed(calls(model)):  # a role can depend on the readers' roles
            self.roles[id(call.output)] = self._role(call)
        # For the id of a new tensor, the quantizer layer on whose grid it lies.
        self.source: dict[int, FakeQuantize] = {}
        # Low-bit versions of a tensor, made once for all kernels that read it alike.
        self.narrowed: dict[tuple[int, str], Any] = {}
        self.names = {layer.name for layer in model.layers}
        self.wrap = wrap
        # A layer called several times gets one wrapper.
        self.wrappers: dict[int, layers.Layer] = {}

    # What the old model says.

    def _role(self, call: Call) -> Role:
        if not self._is_integer(call) and not supports(call.layer):
            return Role.COMPUTE
        found = role(call.layer)
        if found in KEEPS_GRID and self.decisions[call.layer.name].keep_float not in _NO_WISH:
            return Role.COMPUTE
        signs = self._sign_specs(call) if found is Role.RELU else []
        if signs and self._is_integer(call) and any(sign.method == REACTNET for sign in signs):
            self.rprelus.add(id(call.output))
            return Role.COMPUTE
        if signs:
            return Role.IDENTITY
        if isinstance(call.layer, layers.Rescaling) and self._is_gain(call):
            return Role.PASS
        return found

    def _role_of(self, call: Call) -> Role:
        return self.roles[id(call.output)]

    def _is_integer(self, call: Call | None) -> bool:
        """Whether the call is an integer operator of the file; the model's caller is none."""
        return call is not None and self.decisions[call.layer.name].keep_float is None

    def _moves_only(self, call: Call | None) -> bool:
        return call is not None and self._role_of(call) in (Role.PASS, Role.IDENTITY)

    def _final_readers(self, tensor: Any) -> list[Call | None]:
        """Readers of a tensor, seen through the layers that only move values."""
        found = []
        for reader in self.readers.get(id(tensor), []):
            found += self._final_readers(reader.output) if self._moves_only(reader) else [reader]
        return found

    def _read_spec(self, call: Call | None) -> TensorSpec | None:
        """The spec of the tensor that a quantized kernel reads; None for all other readers."""
        if self._is_integer(call) and self._role_of(call) is Role.LINEAR:
            return self.decisions[call.layer.name].activations
        return None

    def _sign_specs(self, call: Call) -> list[TensorSpec]:
        """The specs of the signs that read a call's output."""
        specs = [self._read_spec(reader) for reader in self._final_readers(call.output)]
        return [spec for spec in specs if spec is not None and spec.bits == 1]

    def _has_bias(self, tensor: Any) -> bool:
        """Whether a trained bias per channel is added to the tensor and to nothing else."""
        call, readers = self.producer.get(id(tensor)), self.readers[id(tensor)]
        if call is None or len(readers) != 1:
            return False
        if isinstance(call.layer, layers.Add):
            return any(self._has_bias(term) for term in call.inputs)
        found = self._role_of(call)
        own = (found is Role.LINEAR and call.layer.use_bias) or (
            found is Role.BATCHNORM and getattr(call.layer, "center", False)
        )
        return bool(own and call.layer.trainable)

    def _is_gain(self, call: Call) -> bool:
        """A Rescaling that every reader's kernel absorbs: it relabels the scale, codes stay."""
        scale, offset = call.layer.scale, call.layer.offset
        plain = isinstance(scale, int | float) and scale > 0 and offset == 0
        specs = [self._read_spec(reader) for reader in self._final_readers(call.output)]
        if not plain or None in specs:
            return False
        if all(spec.bits >= self.wide.bits for spec in specs):
            return True
        # No narrower grid may follow: a requantization needs the real numbers.
        alike = all(spec == specs[0] for spec in specs) and specs[0].bits > 1
        return alike and self._is_all_that_reads(call)

    def _is_all_that_reads(self, call: Call) -> bool:
        """Whether nobody else reads what the call's input moves, so that its readers choose the
        grid; a model's input always has the wide one."""
        tensor = call.inputs[0]
        while (made := self.producer.get(id(tensor))) and len(self.readers[id(tensor)]) == 1:
            kind = role(made.layer) if supports(made.layer) else Role.COMPUTE
            if kind not in (Role.PASS, Role.IDENTITY):
                return kind is not Role.AVERAGE
            tensor = made.inputs[0]
        return False

    def _inside_operator(self, call: Call) -> bool:
        """Whether the output is an inner tensor of a fused operator, which has no grid."""
        readers = self.readers.get(id(call.output), [])
        if len(readers) != 1 or readers[0] is None:
            return False
        mine, its = self._role_of(call), self._role_of(readers[0])
        stays_integer = not self._is_integer(call) or self._is_integer(readers[0])
        if its in FUSES:
            return mine in FUSES[its] and stays_integer
        both = self._is_integer(call) and stays_integer
        return its is Role.CONCAT and mine in _FUSES_INTO_CONCAT and both

    def _touches_integers(self, tensor: Any) -> bool:
        """Whether the producer or some reader of the tensor computes in integers."""
        parties = [self.producer.get(id(tensor)), *self._final_readers(tensor)]
        return any(self._is_integer(party) for party in parties)

    def _spec(self, tensor: Any) -> TensorSpec:
        """Wide, unless every reader is a kernel that wants the same narrow uniform grid."""
        specs = [self._read_spec(reader) for reader in self._final_readers(tensor)]
        narrow = specs and all(spec == specs[0] for spec in specs) and specs[0] is not None
        return specs[0] if narrow and specs[0].bits > 1 else self.wide

    # What the new model gets.

    def on_input(self, old: Any, new: Any) -> Any:
        readers = [reader and self._role_of(reader) for reader in self._final_readers(old)]
        if not self._touches_integers(old) or set(readers) == {Role.GATHER}:
            return new
        quantizer = configs.activation_quantizer(self.wide)
        if self.input_range is not None:
            quantizer = configs.range_quantizer(*self.input_range, self.wide)
        return self._quantize(new, quantizer, new.node.layer.name)

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        layer, found = call.layer, self._role_of(call)
        require_widths(layer, found, self.wide.bits if self._is_integer(call) else 8)
        spec = self._read_spec(call)
        if spec is not None and args:
            self._require_no_negatives(call, spec)
            args = (self._narrow(args[0], spec, layer.name), *args[1:])
        if id(call.output) in self.rprelus:
            return self._rprelu(call, args[0])
        if found is Role.IDENTITY and role(layer) is Role.RELU:
            layer = ReplacedBySign(type(layer).__name__, name=self._replacement_name(layer))
        else:
            layer = self._wrapped(layer)
        new = layer(*args, **kwargs)
        grid_layer = self.source.get(id(args[0])) if args and call.inputs else None
        if found in (Role.PASS, Role.IDENTITY):
            return self._lies_on(new, grid_layer)
        if found is Role.AVERAGE and grid_layer is not None:
            return self._lies_on(grid_layer(new, observe=False, averages=True), grid_layer)
        if self._inside_operator(call) or not self._touches_integers(call.output):
            return new
        return self._quantize(new, self._output_quantizer(call), call.layer.name)

    def _rprelu(self, call: Call, x: Any) -> Any:
        """RPReLU in a ReLU's place, each of its operators with a grid of its own.

        Its first shift is the bias in front, if that feeds nothing else; its second one is the bias
        of the RSigns behind, if nothing else reads it: there a parameter of its own would only be
        the same one again, and an operator of the file.
        """
        name = self._replacement_name(call.layer)
        if not self._has_bias(call.inputs[0]):
            x = self._shifted(x, f"{name}_shift_in", configs.activation_quantizer(self.wide))
        x = LearnedSlope(type(call.layer).__name__, name=name)(x)
        quantizer = self._output_quantizer(call)
        readers = self._final_readers(call.output)
        rsigns = [spec for spec in self._sign_specs(call) if spec.method == REACTNET]
        if len(rsigns) == len(readers):
            return self._quantize(x, quantizer, name)
        x = self._quantize(x, configs.activation_quantizer(self.wide), name)
        return self._shifted(x, f"{name}_shift_out", quantizer)

    def _shifted(self, tensor: Any, name: str, quantizer: quantizers.GridQuantizer) -> Any:
        name = self._unique(name)
        return self._quantize(LearnedShift(name=name)(tensor), quantizer, name)

    def _replacement_name(self, layer: layers.Layer) -> str:
        return layer.name if len(layer.inbound_nodes) == 1 else self._unique(layer.name)

    def _wrapped(self, layer: layers.Layer) -> layers.Layer:
        if id(layer) not in self.wrappers:
            self.wrappers[id(layer)] = self.wrap(layer)
        return self.wrappers[id(layer)]

    def _output_quantizer(self, call: Call) -> quantizers.GridQuantizer:
        if self._role_of(call) is Role.FIXED:
            return configs.range_quantizer(*fixed_range(call.layer, self.wide.bits), self.wide)
        return configs.activation_quantizer(self._spec(call.output))

    def _quantize(self, tensor: Any, quantizer: quantizers.GridQuantizer, name: str) -> Any:
        grid_layer = FakeQuantize(quantizer, name=self._unique(f"{name}_fake_quantize"))
        return self._lies_on(grid_layer(tensor), grid_layer)

    def _lies_on(self, tensor: Any, grid_layer: FakeQuantize | None) -> Any:
        if grid_layer is not None:
            self.source[id(tensor)] = grid_layer
        return tensor

    def _narrow(self, tensor: Any, spec: TensorSpec, name: str) -> Any:
        """The tensor on the grid that this kernel reads."""
        source = self.source.get(id(tensor))
        if source is None or spec.bits >= self.wide.bits:
            return tensor
        quantizer = configs.activation_quantizer(spec)
        if source.quantizer == quantizer:
            return tensor
        key = id(tensor), repr(spec)
        if key not in self.narrowed:
            self.narrowed[key] = tensor, self._quantize(tensor, quantizer, f"{name}_input")
        return self.narrowed[key][1]

    def _require_no_negatives(self, call: Call, spec: TensorSpec) -> None:
        cuts = configs.activation_quantizer(spec).cuts_negatives
        if cuts and not never_negative(
            call.inputs[0], self.producer, self._role_of, self.input_range
        ):
            raise RecipeError(
                f"layer {call.layer.name!r} reads a tensor that can be negative, and method "
                f"{spec.method!r} cuts off what is below 0; take 'lsq' or 'lsqplus' for its "
                "activations"
            )

    def _unique(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name
