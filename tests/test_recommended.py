"""train_quantized: what is done to a quantized model, in which order, and with what."""

from __future__ import annotations

import numpy as np
import stripes

import qat
from qat import recommended, train
from qat.settings import TrainSettings


def test_the_steps_and_what_they_get(monkeypatch):
    done = []

    def step(module, name, answer=None):
        def record(*arguments, **options):
            done.append((name, arguments, options))
            return answer

        monkeypatch.setattr(module, name, record)

    step(recommended, "calibrate")
    step(train, "fit", answer=7)
    step(recommended, "settle_biases")
    settings = TrainSettings(learning_rate=0.02, warmup=0.5, distill=True)
    data = stripes.Stripes()
    start = recommended.train_quantized(
        "model",
        "float",
        data,
        settings,
        epochs=3,
        weight_storage="speed",
        target="tflm",
        resume=True,
    )
    assert start == 7
    (first, (model, stream), given), (second, (_, same, config), _), (third, *_, settling) = done
    assert (first, second, third) == ("calibrate", "fit", "settle_biases")
    assert model == "model" and given == {"steps": recommended.CALIBRATION_STEPS}
    np.testing.assert_array_equal(next(iter(stream))[0], next(iter(data.train_stream()))[0])
    assert settling == {"weight_storage": "speed", "target": "tflm"}
    assert same is data
    assert (config.epochs, config.learning_rate, config.teacher) == (3, 0.02, "float")
    assert config.warmup_steps == 3 * data.steps_per_epoch // 2 and config.resume


def test_without_epochs_a_model_is_calibrated_only():
    float_model = stripes.float_model()
    model = qat.quantize_model(float_model, "w8a8")
    data = stripes.Stripes()
    recommended.train_quantized(model, float_model, data, TrainSettings(), epochs=0)
    for name in ("conv", "logits"):
        kernel, *_ = model.get_layer(f"quant_{name}")._weight_vars[0]
        np.testing.assert_array_equal(kernel, float_model.get_layer(name).kernel)
    images, _ = next(iter(data.validation))
    before, after = (each(images).numpy() for each in (float_model, model))
    # A few outliers are clipped; the rest is off by a few steps of 8 bits.
    assert np.median(np.abs(after - before)) < np.abs(before).max() / 100
