"""Adam as quantized networks need it: decay on kernels alone, a rate of its own for quantizers."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf
import tf_keras

# TFMOT names a quantizer's variables after the tensor: kernel_gain, output_shift … No layer of
# Keras has trainable variables of such names.
QUANTIZER_VARIABLES = r"(^|[/_])(kernel|output)_\w+(:\d+)?$"
_NOT_KERNELS = r"^(?!.*kernel(:\d+)?$)"


@tf_keras.utils.register_keras_serializable("qat")
class QatAdam(tf_keras.optimizers.Adam):
    """Adam with decoupled weight decay on kernels, and a scaled rate for quantizers' variables.

    `w ← w - lr·decay·w` for kernels alone (as AdamW; never for biases, batch normalization or
    learned steps), then Adam's own step, with `lr·quantizer_learning_rate` in place of lr for
    variables that quantizers made. These are relative (a step is `unit · gain`): Adam's steps of
    about lr change each by that share.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: None or 0 = none.
        quantizer_learning_rate: factor >= 0.
        Others as `tf_keras.optimizers.Adam`.

    Raises:
        ValueError: a factor that is no finite number of at least 0.

    Source: AdamW arXiv 1711.05101; LSQ arXiv 1902.08153 (no decay on steps).
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        *,
        weight_decay: float | None = None,
        quantizer_learning_rate: float = 1.0,
        name: str = "QatAdam",
        **options,
    ):
        if not 0.0 <= quantizer_learning_rate < float("inf"):
            raise ValueError(
                "quantizer_learning_rate is a factor, a finite number of at least 0; got "
                f"{quantizer_learning_rate!r}"
            )
        self._factor = 1.0
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay or None, name=name, **options
        )
        self.quantizer_learning_rate = quantizer_learning_rate
        self.exclude_from_weight_decay(var_names=[_NOT_KERNELS])

    @property
    def learning_rate(self):
        """The current rate; of the variable that is being updated, during an update."""
        rate = super().learning_rate
        return rate if self._factor == 1.0 else rate * self._factor

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        tf_keras.optimizers.Adam.learning_rate.fset(self, learning_rate)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        """Adam's step for one variable, at its rate."""
        self._factor = self.quantizer_learning_rate if belongs_to_quantizer(variable) else 1.0
        try:
            super().update_step(gradient, variable)
        finally:
            self._factor = 1.0

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "quantizer_learning_rate": self.quantizer_learning_rate}


def belongs_to_quantizer(variable: tf.Variable) -> bool:
    """Whether a trainable variable was made by a quantizer, by its name."""
    return re.search(QUANTIZER_VARIABLES, variable.name) is not None


def cosine_schedule(
    learning_rate: float, total_steps: int, warmup_steps: int = 0
) -> tf_keras.optimizers.schedules.LearningRateSchedule:
    """From 0 up along a line in `warmup_steps`, then along a cosine to 0 at `total_steps`."""
    cosine = tf_keras.optimizers.schedules.CosineDecay
    if not warmup_steps:
        return cosine(learning_rate, max(1, total_steps))
    return cosine(
        0.0,
        max(1, total_steps - warmup_steps),
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )
