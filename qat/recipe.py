"""Recipes: which tensor gets how many bits by which method. Pure data; imports no TensorFlow.

Names follow one grammar, `w<W>a<A>[-<method>]`: W in 1, t (ternary), 2…8, A in 1…8 or 16, method in
`METHODS`; no method means the best known for that width. A method that makes only weights or only
activations leaves the other to the best known. `w8a8` is the default.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from qat.errors import QatError

TERNARY = "t"
WEIGHT_BITS = (1, TERNARY, 2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@dataclasses.dataclass(frozen=True)
class Method:
    """The widths that a method makes, of weights and of activations."""

    weights: tuple[int | str, ...] = ()
    activations: tuple[int, ...] = ()


_UP_TO_8 = (2, 3, 4, 5, 6, 7, 8)
METHODS: dict[str, Method] = {
    "minmax": Method(weights=_UP_TO_8, activations=(*_UP_TO_8, 16)),
    "lsq": Method(weights=(TERNARY, *_UP_TO_8), activations=_UP_TO_8),
    "lsqplus": Method(activations=_UP_TO_8),
    "pact": Method(activations=_UP_TO_8),
    "ewgs": Method(weights=(TERNARY, *_UP_TO_8), activations=_UP_TO_8),
    "dsq": Method(weights=(TERNARY, *_UP_TO_8), activations=_UP_TO_8),
    # Codes are odd integers up to ±(2^W - 1): at 8 bits they would need 9.
    "dorefa": Method(weights=(1, 2, 3, 4, 5, 6, 7), activations=_UP_TO_8),
    "statsq": Method(weights=(2, 3, 4, 5, 6, 7)),
    "twn": Method(weights=(TERNARY,)),
    "ttq": Method(weights=(TERNARY,)),
    "xnor": Method(weights=(1,)),
    "bwn": Method(weights=(1,)),
    "binary": Method(weights=(1,), activations=(1,)),
    "reactnet": Method(weights=(1,), activations=(1,)),
}
# The best known method for a width; BUILD_NOTES has the evidence.
BEST_FOR_WEIGHTS: dict[int | str, str] = {
    **dict.fromkeys(WEIGHT_BITS, "minmax"),
    **dict.fromkeys((2, 3, 4), "lsq"),
    TERNARY: "twn",
    1: "binary",
}
BEST_FOR_ACTIVATIONS: dict[int, str] = {
    **dict.fromkeys(ACTIVATION_BITS, "lsq"),
    **dict.fromkeys((8, 16), "minmax"),
    1: "binary",
}
POSITIONS = ("first", "last")
DEFAULT_RECIPE = "w8a8"
GRAMMAR = "w<W>a<A>[-<method>], W in 1, t, 2…8, A in 1…8 or 16, method in " + ", ".join(METHODS)
SCHEMA_VERSION = 1


class RecipeError(QatError):
    """A recipe that cannot be read, is illegal, or does not fit the model. One line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one kind of tensor is quantized.

    Attributes:
        bits: 1 to 8, 16 (activations), or "t" (ternary weights).
        method: a name of METHODS; None = the best known for the width, weights or activations.
        per_channel: weights only: one scale per output channel, else one per tensor.
        options: keyword arguments of the quantizer, e.g. {"decay": 0.9} or {"surrogate": "swish"}.
    """

    bits: int | str = 8
    method: str | None = None
    per_channel: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        legal = (*ACTIVATION_BITS, TERNARY)
        if type(self.bits) not in (int, str) or self.bits not in legal:
            raise RecipeError(f"bits must be one of {legal}, got {self.bits!r}")
        if self.method is not None and self.method not in tuple(METHODS):  # lists have no hash
            raise RecipeError(f"unknown method {self.method!r}; legal: {', '.join(METHODS)}")
        if not isinstance(self.options, dict):
            raise RecipeError(f"options must be a mapping, got {self.options!r}")
        if not isinstance(self.per_channel, bool):
            raise RecipeError(f"per_channel must be true or false, got {self.per_channel!r}")

    def resolved(self, role: str) -> TensorSpec:
        """The spec for "weights" or "activations", its method named.

        Raises:
            RecipeError: a width or method that the role does not have.
        """
        best = BEST_FOR_WEIGHTS if role == "weights" else BEST_FOR_ACTIVATIONS
        if self.bits not in best:
            raise RecipeError(f"{role} have one of {tuple(best)} bits, got {self.bits!r}")
        method = self.method or best[self.bits]
        if self.bits not in getattr(METHODS[method], role):
            able = [name for name, made in METHODS.items() if self.bits in getattr(made, role)]
            raise RecipeError(
                f"method {method!r} makes no {self.bits}-bit {role}; those that do: "
                f"{', '.join(able)}"
            )
        return dataclasses.replace(self, method=method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What it matches (all given conditions together), then what it does.

    Attributes:
        layer: shell pattern on the layer's name, e.g. "block_1_*".
        type: the layer's class name, e.g. "DepthwiseConv2D"; shell patterns too.
        position: of a layer with quantized weights: "first" where it reads an input of the model,
            "last" where no other one follows; a model may have several of each.
        weights, activations: specs for the layer's kernel and for the tensor it reads.
        keep_float: the reason why the layer stays in float32; excludes specs.
    """

    layer: str | None = None
    type: str | None = None
    position: str | None = None
    weights: TensorSpec | None = None
    activations: TensorSpec | None = None
    keep_float: str | None = None

    def __post_init__(self):
        for key in ("layer", "type", "keep_float"):
            if not isinstance(getattr(self, key), str | None):
                raise RecipeError(f"{key} must be text, got {getattr(self, key)!r}")
        if self.position is not None and self.position not in POSITIONS:
            raise RecipeError(f"position must be one of {POSITIONS}, got {self.position!r}")
        if self.keep_float is not None and not str(self.keep_float).strip():
            raise RecipeError(f"{self}: keep_float needs a reason, e.g. 'sensitive'")
        if (self.weights is None and self.activations is None) == (self.keep_float is None):
            raise RecipeError(f"{self}: give either weights/activations or keep_float, not both")
        for role in ("weights", "activations"):
            if getattr(self, role) is not None:
                object.__setattr__(self, role, getattr(self, role).resolved(role))

    def matches(self, name: str, type_name: str, positions: Iterable[str]) -> bool:
        """Whether a layer of this name, class name and positions is meant."""
        return (
            (self.layer is None or fnmatch.fnmatchcase(name, self.layer))
            and (self.type is None or fnmatch.fnmatchcase(type_name, self.type))
            and (self.position is None or self.position in positions)
        )

    def __str__(self) -> str:
        given = {k: v for k, v in vars(self).items() if k in _MATCHERS and v is not None}
        return "Rule(" + ", ".join(f"{k}={v!r}" for k, v in given.items()) + ")"


_MATCHERS = ("layer", "type", "position")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A name and ordered rules; for each layer the first rule that matches decides.

    Attributes:
        name: a name of the grammar, or the user's own.
        rules: tried in order; each must match some layer of the model it is applied to.
    """

    name: str
    rules: tuple[Rule, ...]

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise RecipeError(f"a recipe's name must be text, got {self.name!r}")
        object.__setattr__(self, "rules", tuple(self.rules))
        if not self.rules:
            raise RecipeError(f"recipe {self.name!r} has no rules")

    @classmethod
    def from_name(cls, name: str) -> Recipe:
        """The recipe of a grammar name; below w8 the first and last layers keep 8 bits."""
        match = re.fullmatch(r"w([1-9]\d*|t)a([1-9]\d*)(?:-(\w+))?", name, re.ASCII)
        if not match:
            raise RecipeError(f"unknown recipe {name!r}; names read {GRAMMAR}, e.g. w8a8, w4a8")
        weight_bits = match[1] if match[1] == TERNARY else int(match[1])
        activation_bits, method = int(match[2]), match[3]
        if weight_bits not in WEIGHT_BITS or activation_bits not in ACTIVATION_BITS:
            raise RecipeError(f"recipe {name!r} has an illegal width; names read {GRAMMAR}")
        if method is not None and method not in METHODS:
            raise RecipeError(f"recipe {name!r}: unknown method {method!r}; names read {GRAMMAR}")
        made = METHODS.get(method, Method())
        weights = TensorSpec(bits=weight_bits, method=method if made.weights else None)
        activations = TensorSpec(bits=activation_bits, method=method if made.activations else None)
        edge = Rule(position="first", weights=TensorSpec(), activations=_wide(activations))
        rules = [Rule(weights=weights, activations=activations)]
        if weight_bits != 8 or activation_bits < 8:
            rules = [edge, dataclasses.replace(edge, position="last"), *rules]
        return cls(name=name, rules=tuple(rules))

    def with_rules(self, *rules: Rule) -> Recipe:
        """The recipe with these rules tried before its own."""
        return dataclasses.replace(self, rules=(*rules, *self.rules))

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal recipe."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        content["rules"] = [
            {key: value for key, value in rule.items() if value is not None}
            for rule in content["rules"]
        ]
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads `to_json`'s text; unknown keys are errors."""
        try:
            content = dict(json.loads(text))
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise RecipeError(f"schema_version {version!r} is unknown, 1 is read here")
            rules = [_rule_from_dict(rule) for rule in content.pop("rules")]
            recipe = cls(rules=tuple(rules), **content)
        except QatError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise RecipeError(f"not a recipe file: {error}") from error
        return recipe


def _wide(activations: TensorSpec) -> TensorSpec:
    return activations if activations.bits >= 8 else TensorSpec()


def _rule_from_dict(content: dict[str, Any]) -> Rule:
    specs = {
        key: TensorSpec(**content.pop(key)) for key in ("weights", "activations") if key in content
    }
    return Rule(**content, **specs)


def load_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe from a grammar name, the path of a JSON file, or itself.

    Raises:
        RecipeError: unknown name, unreadable or illegal file.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not str(recipe).endswith(".json"):
        return Recipe.from_name(str(recipe))
    try:
        return Recipe.from_json(pathlib.Path(recipe).read_text())
    except OSError as error:
        raise RecipeError(f"recipe file {recipe}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe file {recipe} is not UTF-8 text") from error
    except RecipeError as error:
        raise RecipeError(f"recipe file {recipe}: {error}") from error
