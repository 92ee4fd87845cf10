"""What a training shows while it runs, against what it logs and against NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf
from small_models import everywhere
from stripes import Recorder, Stripes, float_model, quantized_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qat
from qat.callbacks import QuantizationSummaries
from qat.callbacks.progress import duration
from qat.train import TrainConfig, fit

EPOCHS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training with everything watched: its model and its folder."""
    folder = tmp_path_factory.mktemp("run")
    model = quantized_model(recipe=everywhere("w2a2"))
    config = TrainConfig(epochs=EPOCHS, learning_rate=0.02, log_dir=folder)
    fit(model, Stripes(), config)
    return model, folder


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder / "quantization"), size_guidance={"tensors": 0})
    found.Reload()
    return found


def curve(found: EventAccumulator, tag: str) -> dict[int, float]:
    return {e.step: tf.make_ndarray(e.tensor_proto).item() for e in found.Tensors(tag)}


def test_curves_are_written_twice_an_epoch_for_every_quantizer(run):
    model, folder = run
    found = events(folder)
    tags = set(found.Tags()["tensors"])
    for name in ("conv/kernel", "logits/kernel"):
        for key in ("lowest", "highest", "step", "levels_used", "clipped", "flips", "codes"):
            assert f"{name}/{key}" in tags, sorted(tags)
        assert f"{name}/steps" in tags  # one a channel
    for layer in model.layers:
        if isinstance(layer, qat.FakeQuantize):
            assert {
                f"{layer.name}/{key}" for key in ("lowest", "highest", "step", "clipped")
            } <= tags
    assert list(curve(found, "conv/kernel/flips")) == [1, 3, 5, 7]


def test_the_numbers_are_those_of_the_model(run, tmp_path):
    """At rate 0 the model stays as it is, so that NumPy can count on it."""
    model = run[0]
    fit(model, Stripes(), TrainConfig(epochs=1, learning_rate=0.0, log_dir=tmp_path))
    found = events(tmp_path)
    wrapper = model.get_layer("quant_conv")
    ((weight, quantizer, variables),) = wrapper._weight_vars
    w, grid = weight.numpy(), quantizer.grid(variables, tf.convert_to_tensor(weight)).numpy()
    codes = np.clip(np.rint(w / grid.scale), grid.qmin, grid.qmax)
    expected = {
        "lowest": (grid.qmin * grid.scale).min(),
        "highest": (grid.qmax * grid.scale).max(),
        "step": grid.scale.mean(),
        "levels_used": len(set(codes.ravel())) / (grid.qmax - grid.qmin + 1),
        "clipped": (
            (w / grid.scale > grid.qmax + 1e-3) | (w / grid.scale < grid.qmin - 1e-3)
        ).mean(),
        "flips": 0.0,
    }
    for key, value in expected.items():
        last = list(curve(found, f"conv/kernel/{key}").values())[-1]
        assert last == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_a_float_model_has_no_curves_of_quantization(tmp_path):
    fit(float_model(), Stripes(), TrainConfig(epochs=1, learning_rate=0.02, log_dir=tmp_path))
    assert not (tmp_path / "quantization").exists() and (tmp_path / "train").exists()


def test_summaries_at_no_time_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        QuantizationSummaries(tmp_path, Stripes().validation, 0)


def test_an_epoch_is_one_line(capsys):
    recorder = Recorder()
    fit(float_model(), Stripes(), TrainConfig(epochs=3, learning_rate=0.02), callbacks=[recorder])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    for number, (line, (_, logs)) in enumerate(zip(lines, recorder.epochs, strict=True), start=1):
        numbers = ", ".join(f"{name} {logs[name]:.4f}" for name in logs)
        pattern = rf"epoch {number}/3: {re.escape(numbers)}, \d+\.\d s, \d+:\d\d left"
        assert re.fullmatch(pattern, line), line
    assert lines[-1].endswith(" 0:00 left")


@pytest.mark.parametrize(
    ("seconds", "text"), ((0.4, "0:00"), (61, "1:01"), (3599.7, "1:00:00"), (7325, "2:02:05"))
)
def test_durations(seconds, text):
    assert duration(seconds) == text
