"""Recommended training settings: whoever names a recipe gets the best known for its widths.

The table is `RECOMMENDED`; what is not in a row is `TrainSettings`' default. BUILD_NOTES has the
evidence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tf_keras

from qat.recipe import TERNARY, Recipe, load_recipe
from qat.train import TrainConfig

# Optimizer steps that train a small network well; epochs follow from the dataset's size.
FLOAT_STEPS, FLOAT_EPOCHS = 4000, (4, 60)
QAT_STEPS, QAT_EPOCHS = 2500, (2, 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train a quantized model; see `qat.TrainConfig` for fields of the same name.

    Attributes:
        epochs_factor: times the epochs that suit the dataset's size.
        warmup: share of the training in which the learning rate rises.
        distill: whether the float model is the teacher.
    """

    epochs_factor: int = 1
    learning_rate: float = 3e-4
    warmup: float = 0.0
    weight_decay: float = 0.0
    quantizer_learning_rate: float = 1.0
    distill: bool = False
    distill_temperature: float = 1.0
    distill_weight: float = 1.0
    freeze_batch_norm: float | None = None
    reestimate_batch_norm: int = 0
    freeze_ranges: float | None = None
    dampening: float = 0.0
    iterative_freezing: float = 0.0
    gradual_bits: tuple[tuple[int, float], ...] = ()

    def epochs(self, steps_per_epoch: int) -> int:
        """Passes over a dataset of this size."""
        return default_epochs(steps_per_epoch, quantized=True, factor=self.epochs_factor)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers, texts and lists."""
        stages = [list(stage) for stage in self.gradual_bits]
        return {**dataclasses.asdict(self), "gradual_bits": stages}

    def train_config(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        float_model: tf_keras.Model | None = None,
        **others: Any,
    ) -> TrainConfig:
        """The config that `qat.fit` takes.

        Args:
            float_model: the teacher, should the settings ask for one.
            others: fields of `TrainConfig` that are no settings, e.g. checkpoint_dir.
        """
        config = {field.name for field in dataclasses.fields(TrainConfig)}
        own = {name: value for name, value in vars(self).items() if name in config}
        return TrainConfig(
            epochs=epochs,
            warmup_steps=round(self.warmup * epochs * steps_per_epoch),
            teacher=float_model if self.distill else None,
            **{**own, **others},
        )


# By the narrowest width of a recipe's kernels and activations. Learning rates were chosen on
# Fashion-MNIST's validation part (BUILD_NOTES has the figures); re-estimation is that of arXiv
# 2203.11086. The teacher's T = 1 is ReActNet's (2003.03488); it stands beside the labels, because
# the float model may be trained too little.
RECOMMENDED: dict[str, TrainSettings] = {
    # Stock networks' moving statistics (momentum 0.999) need thousands of steps to follow weights.
    "8 bits": TrainSettings(learning_rate=4e-3, reestimate_batch_norm=50),
    "4 to 7 bits": TrainSettings(
        learning_rate=4e-3,
        weight_decay=1e-3,
        reestimate_batch_norm=50,
    ),
    "2 and 3 bits": TrainSettings(
        epochs_factor=2,
        learning_rate=4e-3,
        weight_decay=5e-4,
        distill=True,
        distill_weight=0.5,
        reestimate_batch_norm=50,
    ),
    "ternary": TrainSettings(
        epochs_factor=2,
        learning_rate=4e-3,
        weight_decay=5e-4,
        reestimate_batch_norm=50,
    ),
    # A sign in the network has to be learned anew, not fine-tuned.
    "binary": TrainSettings(
        epochs_factor=3,
        learning_rate=3e-3,
        distill=True,
        distill_weight=0.5,
        reestimate_batch_norm=50,
    ),
}


# The first steps at a young model's rate cost a converged one more than rounding does.
CONVERGED_LEARNING_RATE = {
    "8 bits": 1e-4,
    "4 to 7 bits": 5e-4,
    "2 and 3 bits": 2e-3,
    "ternary": 2e-3,
}


def recommended(recipe: str | Recipe, *, converged: bool = False) -> TrainSettings:
    """The settings for a recipe: those of its narrowest kernels or activations.

    Args:
        converged: the float model has been trained as long as it learned, by whoever made it.

    Raises:
        RecipeError: as `qat.recipe.load_recipe`.
    """
    widths = width_class(load_recipe(recipe))
    found = RECOMMENDED[widths]
    if converged and widths in CONVERGED_LEARNING_RATE:
        return dataclasses.replace(found, learning_rate=CONVERGED_LEARNING_RATE[widths])
    return found


def width_class(recipe: Recipe) -> str:
    """The recipe's row of `RECOMMENDED`."""
    specs = [spec for rule in recipe.rules for spec in (rule.weights, rule.activations)]
    # A ternary kernel has more levels than a binary one, and one less than 2 bits.
    widths = [1.5 if spec.bits == TERNARY else spec.bits for spec in specs if spec is not None]
    narrowest = min(widths, default=8)
    if narrowest < 2:
        return "binary" if narrowest == 1 else "ternary"
    if narrowest < 4:
        return "2 and 3 bits"
    return "4 to 7 bits" if narrowest < 8 else "8 bits"


def default_epochs(steps_per_epoch: int, *, quantized: bool, factor: int = 1) -> int:
    """Epochs that give a dataset of this size its step budget, times a factor."""
    steps, (least, most) = (QAT_STEPS, QAT_EPOCHS) if quantized else (FLOAT_STEPS, FLOAT_EPOCHS)
    return factor * min(most, max(least, round(steps / steps_per_epoch)))
