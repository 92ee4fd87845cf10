"""Training a quantized model as its recipe asks, from first ranges to settled biases."""

from __future__ import annotations

from typing import Any

import tf_keras

from qat import train
from qat.calibrate import calibrate
from qat.settings import TrainSettings
from qat.settle import settle_biases

CALIBRATION_STEPS = 20


def train_quantized(
    model: tf_keras.Model,
    float_model: tf_keras.Model,
    data: train.TrainingData,
    settings: TrainSettings,
    *,
    epochs: int,
    weight_storage: str = "size",
    target: str = "litert",
    **options: Any,
) -> int:
    """Calibrates, trains and settles a quantized model, in place.

    Args:
        model: what `qat.quantize_model` made of the float model, the teacher where the settings ask
            for one.
        data: training stream and validation set.
        settings: e.g. `qat.settings.recommended(recipe)`.
        epochs: 0 = calibrate only.
        weight_storage, target: of the export to come, see `settle_biases`.
        options: fields of `TrainConfig` that are no settings, e.g. checkpoint_dir.

    Returns:
        The step that training started from, as `qat.fit`.

    Raises:
        TrainingError, ValueError: as `qat.fit`.
    """
    calibrate(model, data.train_stream(), steps=CALIBRATION_STEPS)
    config = settings.train_config(
        epochs=epochs, steps_per_epoch=data.steps_per_epoch, float_model=float_model, **options
    )
    start = train.fit(model, data, config)
    settle_biases(model, weight_storage=weight_storage, target=target)
    return start
