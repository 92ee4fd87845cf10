"""What a program that quantizes is told."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import tensorflow as tf

from qat.files import sha256_of
from qat.recipe import Recipe
from qat.settings import TrainSettings, recommended

# What a resumed run may change: fields of a job that no trained weight depends on.
_FREE = "output_dir data_dir resume io target weight_storage strategy".split()
_FREE += ["checkpoint_steps", "profile_steps", "custom_objects", "allow_unsafe_deserialization"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatJob:
    """What every program that quantizes is told; see `qat-train --help` for each field's meaning.

    settings: of the quantized training; None = `qat.settings.recommended(recipe)`. qat_epochs,
    qat_learning_rate and distill override them.
    """

    recipe: Recipe
    output_dir: pathlib.Path
    data_dir: str | None = None
    qat_epochs: int | None = None
    batch_size: int = 64
    qat_learning_rate: float | None = None
    seed: int = 0
    resume: bool = False
    distill: bool | None = None
    augment_shift: int | None = None
    augment_flip: bool | None = None
    settings: TrainSettings | None = None
    jit_compile: bool = False
    mixed_precision: str = "float32"
    target: str = "litert"
    io: str = "float32"
    weight_storage: str = "size"
    checkpoint_steps: int | None = None
    profile_steps: tuple[int, int] | None = None
    strategy: tf.distribute.Strategy = dataclasses.field(default_factory=tf.distribute.get_strategy)

    def flags(self) -> dict[str, str]:
        """All that the trained weights depend on, by the names of the program's flags."""
        found = {name: str(value) for name, value in vars(self).items() if name not in _FREE}
        contents = {f"{flag[2:]}'s SHA-256": sha256_of(path) for flag, path in self.given_files()}
        return found | contents

    def given_files(self) -> list[tuple[str, str]]:
        """(flag, path) of all files that the trained weights depend on."""
        return [given] if (given := self.given_model()) is not None else []

    def image_options(self) -> dict[str, Any]:
        """What `qat.data.load` is told beside the dataset's name."""
        return {
            "data_dir": self.data_dir,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shift": self.augment_shift,
            "flip": self.augment_flip,
        }

    def qat_settings(self) -> TrainSettings:
        """How the quantized model is trained."""
        overrides = {"learning_rate": self.qat_learning_rate, "distill": self.distill}
        given = {name: value for name, value in overrides.items() if value is not None}
        best = recommended(self.recipe, converged=self.given_model() is not None)
        return dataclasses.replace(self.settings or best, **given)

    def given_model(self) -> tuple[str, str] | None:
        """(flag, path) of the float model's file; None if this job trains it."""
        raise NotImplementedError

    def has_bits(self, bits: int) -> bool:
        """Whether the recipe gives some kernel or tensor this width."""
        specs = [spec for rule in self.recipe.rules for spec in (rule.weights, rule.activations)]
        return any(spec is not None and spec.bits == bits for spec in specs)
