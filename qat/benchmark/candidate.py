"""One of our recipes as the benchmark trains it: recommended settings, or others for tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import types
import typing
from typing import Any

from qat.errors import UserError
from qat.recipe import Recipe, load_recipe
from qat.settings import TrainSettings, recommended, width_class


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A recipe, and the settings that differ from the recommended ones.

    Attributes:
        text: as the user wrote it.
        recipe: parsed.
        overrides: {setting: value as text}; "epochs" is one of them.
    """

    text: str
    recipe: Recipe
    overrides: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Reads `RECIPE` or `RECIPE:setting=value;setting=value`, values as in JSON.

        Raises:
            UserError: an override that is not of this form. RecipeError: no recipe.
        """
        name, _, rest = text.partition(":")
        overrides = {}
        for part in filter(None, rest.split(";")):
            key, equals, value = part.partition("=")
            if not (equals and key.isidentifier() and value):
                raise UserError(
                    f"--recipes={text}: {part!r} is no setting; write RECIPE:setting=value;…, "
                    "e.g. w2a2:learning_rate=0.001"
                )
            overrides[key] = value
        return cls(text, load_recipe(name), overrides)

    @property
    def widths(self) -> str:
        """The recipe's name without its method: "w2a2-lsq" is the counterpart of peers' w2a2."""
        match = re.fullmatch(r"(w\w+a\d+)-\w+", self.recipe.name)
        return match[1] if match else self.recipe.name

    def epochs(self, usual: int, binary: int) -> int:
        """The override, else `binary` for a network with signs in it, else `usual`.

        Raises:
            UserError: the override is no whole number.
        """
        given = self.overrides.get("epochs")
        if given is None:
            return binary if width_class(self.recipe) == "binary" else usual
        if not given.isdecimal():
            raise UserError(f"--recipes={self.text}: epochs must be a whole number, got {given!r}")
        return int(given)

    def settings(self) -> TrainSettings:
        """The recommended settings with the overrides.

        Raises:
            UserError: an override that is no setting, or not of its type.
        """
        own = {key: text for key, text in self.overrides.items() if key != "epochs"}
        hints = typing.get_type_hints(TrainSettings)
        for key in own:
            if key not in hints:
                legal = ", ".join(["epochs", *hints])
                raise UserError(f"--recipes={self.text}: unknown setting {key!r}; legal: {legal}")
        values = {key: self._value(key, text, hints[key]) for key, text in own.items()}
        return dataclasses.replace(recommended(self.recipe), **values)

    def trained_with(self) -> dict[str, Any]:
        """Recipe and settings, for JSON: what decides how it is trained, its epochs aside.

        Raises:
            UserError: as `settings`.
        """
        return {**self.settings().to_dict(), "recipe": json.loads(self.recipe.to_json())}

    def _value(self, key: str, text: str, hint: Any) -> Any:
        """A setting's value from JSON's spelling or Python's."""
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [typing.get_origin(kind) or kind for kind in kinds]
        with contextlib.suppress(ValueError):
            value = json.loads({"none": "null"}.get(text.lower(), text.lower()))
            if isinstance(value, list):
                value = tuple(tuple(part) if isinstance(part, list) else part for part in value)
            if type(value) in kinds or (float in kinds and type(value) is int):
                return value
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"--recipes={self.text}: {key} is {names}, got {text!r}")
