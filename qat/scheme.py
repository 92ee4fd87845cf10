"""The glue to TFMOT: a QuantizeScheme whose layout transform applies a recipe to a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType

import tensorflow_model_optimization as tfmot
import tf_keras

from qat import configs
from qat.canonical import calls, canonicalize, functional
from qat.canonical.fold import fold_forward
from qat.decision import NOT_ANNOTATED, Decision
from qat.layers import QuantizedPReLU
from qat.placement import place_quantizers
from qat.recipe import Recipe, RecipeError, Rule, load_recipe
from qat.roles import float_reason, require_a_place
from qat.wrapper import KernelWrapper

_keras = tfmot.quantization.keras
_NONE: Mapping = MappingProxyType({})
# (name, class name) pairs that a rule may mean a layer by, besides its own.
Aliases = tuple[tuple[str, str], ...]


def scheme(
    recipe: str | Recipe, *, input_range: tuple[float, float] | None = None
) -> QuantizeScheme:
    """The TFMOT scheme of a recipe, for `tfmot.quantization.keras.quantize_apply(model, scheme)`.

    Layers that are not annotated stay in float; a `LayerQuantizeConfig` given with an annotation
    goes before the recipe's rules.

    Args:
        recipe: a grammar name such as "w4a8", a JSON file's path, or a `Recipe`.
        input_range: (minimum, maximum) of the inputs, e.g. (0, 255) for image bytes; None =
            observed in training and calibration.

    Raises:
        RecipeError: as `load_recipe`; later, rules that match no layer.
    """
    return QuantizeScheme(load_recipe(recipe), input_range)


class QuantizeScheme(_keras.QuantizeScheme):
    """See `scheme`."""

    def __init__(self, recipe: Recipe, input_range: tuple[float, float] | None = None):
        self.recipe = recipe
        self.input_range = input_range

    def get_layout_transformer(self) -> LayoutTransform:
        return LayoutTransform(self.recipe, self.input_range)

    def get_quantize_registry(self) -> QuantizeRegistry:
        return QuantizeRegistry(self.recipe)


class QuantizeRegistry(_keras.QuantizeRegistry):
    """Gives every layer with a kernel the config of the recipe's rules that need no position."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def supports(self, layer: tf_keras.layers.Layer) -> bool:
        return bool(configs.kernels(layer))

    def get_quantize_config(self, layer: tf_keras.layers.Layer) -> configs.LayerQuantizeConfig:
        return _config(_first_match(self.recipe, _Subject(layer, (), ())))


class LayoutTransform(_keras.QuantizeLayoutTransform):
    """Canonical form, then the recipe's decisions, then the activation quantizers.

    `aliases` are the origins of `qat.canonical.as_layers`.
    """

    def __init__(
        self,
        recipe: Recipe,
        input_range: tuple[float, float] | None,
        aliases: Mapping[str, Aliases] = _NONE,
    ):
        self.recipe = recipe
        self.input_range = input_range
        self.aliases = aliases

    def apply(self, model: tf_keras.Model, layer_quantize_map: dict) -> tuple:
        # 1. One layer per operator.
        model = functional(model)  # a Sequential does not count its input among its layers
        given = {layer.name: layer for layer in model.layers}
        model, origins = canonicalize(model)
        origins = {name: given[origin] for name, origin in origins.items()}
        # 2. What each layer is to become.
        annotated = {
            name: layer_quantize_map[origin.name].get("quantize_config")
            for name, origin in origins.items()
            if origin.name in layer_quantize_map and origin.name not in model.input_names
        }
        decisions = decide(model, self.recipe, annotated, origins, self.aliases)

        def wrap(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
            integer = decisions[layer.name].keep_float is None
            if integer and type(layer) is tf_keras.layers.PReLU:
                return QuantizedPReLU.made_of(layer)
            if layer.name not in annotated or not _needs_wrapper(layer, decisions[layer.name]):
                return layer
            return KernelWrapper(layer, _given_or_made(layer, annotated, decisions))

        # 3. What is affine in front of a kernel.
        model = fold_forward(model, lambda *pair: _may_fold(*(decisions[la.name] for la in pair)))
        # 4. Kernel and activation quantizers, and signs in place of ReLUs.
        model = place_quantizers(model, decisions, input_range=self.input_range, wrap=wrap)
        # 5. quantize_apply has nothing left to wrap.
        return model, {}


def _may_fold(affine: Decision, kernel: Decision) -> bool:
    """Below 8 bits one grid would have to hold what the affine layer evens out."""
    specs = kernel.weights, kernel.activations
    return affine.keep_float is None and all(
        spec is not None and spec.bits in (8, 16) for spec in specs
    )


def _needs_wrapper(layer: tf_keras.layers.Layer, decision: Decision) -> bool:
    return bool(configs.kernels(layer)) or decision.keep_float is not None


def _given_or_made(layer, annotated: dict, decisions: dict[str, Decision]):
    given = annotated[layer.name]
    if given is not None and not isinstance(given, configs.LayerQuantizeConfig):
        return given
    return _config(decisions[layer.name])


def _config(decision: Decision) -> configs.LayerQuantizeConfig:
    return configs.LayerQuantizeConfig(weights=decision.weights, keep_float=decision.keep_float)


def decide(
    model: tf_keras.Model,
    recipe: Recipe,
    annotated: dict[str, object],
    origins: Mapping[str, tf_keras.layers.Layer] = _NONE,
    aliases: Mapping[str, Aliases] = _NONE,
) -> dict[str, Decision]:
    """What the recipe says of every layer of a canonical model.

    Args:
        annotated: by name, the layers to quantize, each with its own config or None.
        origins: by name, the layer that a layer came from; rules may name either.
        aliases: by the origin's name, what else rules may name it by.

    Raises:
        RecipeError: a rule that matches no annotated layer, or layers without any rule.
    """
    order = list(dict.fromkeys(call.layer.name for call in calls(model)))
    by_name = {layer.name: layer for layer in model.layers}
    positions = _positions(model, annotated)
    subjects = {
        name: _subject(by_name[name], origins, aliases, positions.get(name, ())) for name in order
    }
    candidates = [subjects[name] for name in order if name in annotated]
    for rule in recipe.rules:
        if not any(subject.meant_by(rule) for subject in candidates):
            names = ", ".join(f"{s.layer.name} ({type(s.layer).__name__})" for s in candidates[:20])
            raise RecipeError(f"recipe {recipe.name!r}: {rule} matches no layer; layers: {names}")
    for name in order:
        require_a_place(by_name[name])
    return {name: _decision(recipe, subject, annotated) for name, subject in subjects.items()}


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A layer as rules see it."""

    layer: tf_keras.layers.Layer
    aliases: Aliases
    positions: tuple[str, ...]

    def meant_by(self, rule: Rule) -> bool:
        own = self.layer.name, type(self.layer).__name__
        return any(rule.matches(*known, self.positions) for known in (own, *self.aliases))


def _subject(layer: tf_keras.layers.Layer, origins, aliases, positions) -> _Subject:
    origin = origins.get(layer.name, layer)
    known = (origin.name, type(origin).__name__), *aliases.get(origin.name, ())
    return _Subject(layer, known, positions)


def _positions(model: tf_keras.Model, annotated: Collection[str]) -> dict[str, tuple[str, ...]]:
    """By name: "first" for kernels that read an input, "last" for those that no kernel reads from.

    Layers without kernels may lie between. A model of many inputs or outputs has several of each.
    """
    ordered = calls(model)
    kernels = {
        call.layer.name
        for call in ordered
        if call.layer.name in annotated and configs.kernels(call.layer)
    }
    raw, first = set(map(id, model.inputs)), set()
    for call in ordered:
        if raw.isdisjoint(map(id, call.inputs)):
            continue
        if call.layer.name in kernels:
            first.add(call.layer.name)
        else:
            raw.update(map(id, call.outputs))
    read, last = set(), set()
    for call in reversed(ordered):
        behind = not read.isdisjoint(map(id, call.outputs))
        if call.layer.name in kernels and not behind:
            last.add(call.layer.name)
        if call.layer.name in kernels or behind:
            read.update(map(id, call.inputs))
    edges = (("first", first), ("last", last))
    return {name: tuple(edge for edge, names in edges if name in names) for name in kernels}


def _decision(recipe: Recipe, subject: _Subject, annotated: dict) -> Decision:
    name = subject.layer.name
    if name not in annotated:
        return Decision(keep_float=NOT_ANNOTATED)
    chosen = _first_match(recipe, subject)
    if chosen.keep_float is None and float_reason(subject.layer) is not None:
        return Decision(keep_float=float_reason(subject.layer))
    given = annotated[name]
    if isinstance(given, configs.LayerQuantizeConfig):
        return Decision(
            weights=given.weights,
            activations=None if given.keep_float else chosen.activations,
            keep_float=given.keep_float,
        )
    return chosen


def _first_match(recipe: Recipe, subject: _Subject) -> Decision:
    for rule in recipe.rules:
        if subject.meant_by(rule):
            return Decision(rule.weights, rule.activations, rule.keep_float)
    layer = subject.layer
    raise RecipeError(
        f"recipe {recipe.name!r} has no rule for layer {layer.name!r} ({type(layer).__name__}); "
        "end it with a rule that matches everything"
    )
