"""What a training shows while it runs, against what it logs and against NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_models import everywhere
from stripes import STEPS, Recorder, Stripes, float_model, quantized_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qat
from qat.callbacks import QuantizationSummaries
from qat.callbacks.progress import duration
from qat.grid import Grid
from qat.train import TrainConfig, fit

KERNEL = "conv/kernel"


def kernel_of(model: tf_keras.Model) -> tuple[np.ndarray, Grid]:
    ((weight, quantizer, variables),) = model.get_layer("quant_conv")._weight_vars
    return weight.numpy(), quantizer.grid(variables, tf.convert_to_tensor(weight)).numpy()


def codes_of(model: tf_keras.Model) -> np.ndarray:
    weight, grid = kernel_of(model)
    return np.clip(np.rint(weight / grid.scale), grid.qmin, grid.qmax)


class Flips(tf_keras.callbacks.Callback):
    """The share of the kernel's integers that each step changes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before = codes_of(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.found.append((self.before != codes_of(self.model)).mean())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training whose every step is written: its model, the events, the flips."""
    folder, flips = tmp_path_factory.mktemp("run"), Flips()
    model = quantized_model(recipe=everywhere("w2a2"))
    summaries = QuantizationSummaries(folder, Stripes().validation, STEPS, least_steps=1)
    fit(model, Stripes(), TrainConfig(epochs=1, learning_rate=0.05), callbacks=[summaries, flips])
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return model, events, flips.found


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {e.step: tf.make_ndarray(e.tensor_proto).item() for e in events.Tensors(tag)}


def test_every_quantizer_has_its_curves(run):
    model, events, _ = run
    tags = set(events.Tags()["tensors"])
    keys = ("lowest", "highest", "step", "levels_used", "clipped", "codes")
    for name in (KERNEL, "logits/kernel"):
        assert {f"{name}/{key}" for key in (*keys, "flips", "steps")} <= tags, sorted(tags)
    sites = [layer.name for layer in model.layers if isinstance(layer, qat.FakeQuantize)]
    assert len(sites) == 4
    for name in sites:
        assert {f"{name}/{key}" for key in keys} <= tags, sorted(tags)


def test_flips_are_those_of_each_step(run):
    _, events, flips = run
    assert curve(events, f"{KERNEL}/flips") == pytest.approx(dict(enumerate(flips, start=1)))
    assert max(flips) > 0


def test_the_last_numbers_are_those_of_the_trained_model(run):
    model, events, _ = run
    weight, grid = kernel_of(model)
    v = weight / grid.scale
    expected = {
        "lowest": (grid.qmin * grid.scale).min(),
        "highest": (grid.qmax * grid.scale).max(),
        "step": grid.scale.mean(),
        "levels_used": len(set(codes_of(model).ravel())) / (grid.qmax - grid.qmin + 1),
        "clipped": ((v > grid.qmax + 1e-3) | (v < grid.qmin - 1e-3)).mean(),
    }
    for key, value in expected.items():
        assert curve(events, f"{KERNEL}/{key}")[STEPS] == pytest.approx(value, rel=1e-5), key


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
