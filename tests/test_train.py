from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from small_models import everywhere
from stripes import (
    STEPS,
    Recorder,
    Stripes,
    Watcher,
    float_model,
    linear_model,
    quantized_model,
    same_model,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qat
from qat.callbacks import IterativeFreezing
from qat.errors import QatError
from qat.settings import default_epochs
from qat.train import TrainConfig, TrainingError, fit

MODELS = {"float": float_model, "w4a4": quantized_model}


def state(model: tf_keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]


def assert_equal_arrays(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


def assert_same_state(first: tf_keras.Model, second: tf_keras.Model) -> None:
    assert_equal_arrays(state(first), state(second))


def config(epochs: int = 3, learning_rate: float = 0.02, **options) -> TrainConfig:
    return TrainConfig(epochs=epochs, learning_rate=learning_rate, **options)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("kind", "epochs", "accuracy"), [("float", 6, 0.8), ("w4a4", 14, 0.6)])
def test_training_lowers_the_loss(kind, epochs, accuracy):
    """Four channels of 4 bits learn the task more slowly, and less of it."""
    recorder = Recorder()
    assert fit(MODELS[kind](), Stripes(), config(epochs), callbacks=[recorder]) == 0
    assert [epoch for epoch, _ in recorder.epochs] == list(range(epochs))
    losses = [logs["loss"] for _, logs in recorder.epochs]
    # log(3) = 1.1 is the loss of a guess, and 1/3 its accuracy.
    assert losses[-1] < 0.6 * losses[0] and losses[-1] < 0.5
    assert recorder.epochs[-1][1]["val_accuracy"] > accuracy


def test_the_rate_falls_to_0_along_a_cosine():
    recorder, total = Recorder(), 3 * STEPS
    fit(float_model(), Stripes(), config(3, 0.02), callbacks=[recorder])
    expected = [0.01 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    # The schedule computes in float32: a few ulps of a term of size 1.
    np.testing.assert_allclose(recorder.rates, expected, rtol=0, atol=0.02 * 1e-6)


def test_the_rate_warms_up_along_a_line():
    recorder, total, warmup = Recorder(), 3 * STEPS, 4
    fit(linear_model(0), Stripes(), config(3, 0.02, warmup_steps=warmup), callbacks=[recorder])
    rest = [math.cos(math.pi * (step - warmup) / (total - warmup)) for step in range(warmup, total)]
    expected = [0.02 * step / warmup for step in range(warmup)] + [0.01 * (1 + c) for c in rest]
    np.testing.assert_allclose(recorder.rates, expected, rtol=0, atol=0.02 * 1e-6)


def test_no_epoch_leaves_the_model_as_it_was():
    model = float_model()
    before = model.get_weights()
    assert fit(model, Stripes(), config(0)) == 0
    for left, right in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_probabilities_and_logits_train_alike():
    losses = []
    for softmax in (False, True):
        recorder = Recorder()
        settings = config(2, from_logits=not softmax)
        fit(linear_model(0, softmax=softmax), Stripes(), settings, callbacks=[recorder])
        losses.append(recorder.epochs[-1][1]["loss"])
    # Adam divides by the root of a gradient's square: rounding errors of 1e-7 grow over 8 steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_xla_trains_as_without():
    losses = []
    for jit_compile in (False, True):
        recorder = Recorder()
        settings = config(1, jit_compile=jit_compile)
        fit(linear_model(0), Stripes(), settings, callbacks=[recorder])
        losses.append(recorder.epochs[-1][1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_tensorboard_has_the_curves(tmp_path):
    recorder = Recorder()
    fit(float_model(), Stripes(), config(2, log_dir=tmp_path / "log"), callbacks=[recorder])
    for part, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(tmp_path / "log" / part))
        events.Reload()
        found = [tf.make_ndarray(e.tensor_proto).item() for e in events.Tensors("epoch_loss")]
        assert found == [np.float32(logs[f"{prefix}loss"]) for _, logs in recorder.epochs]


def test_the_profiler_writes_a_profile(tmp_path):
    fit(float_model(), Stripes(), config(1, log_dir=tmp_path, profile_steps=(2, 3)))
    assert list(tmp_path.rglob("*.xplane.pb"))


# ---------------------------------------------------------------- distillation


def test_a_teacher_replaces_the_labels():
    student, teacher, recorder = linear_model(1), linear_model(2), Recorder()
    data = Stripes()
    # At rate 0 the loss of an epoch is that of the student as it is.
    settings = config(1, 0.0, teacher=teacher, distill_temperature=2.0, distill_weight=0.75)
    fit(student, data, settings, callbacks=[recorder])
    batches = (data.batch(1000 + step) for step in range(STEPS))
    images, labels = map(np.concatenate, zip(*batches, strict=True))

    def logits(model):
        kernel, bias = (weight.numpy().astype(np.float64) for weight in model.weights)
        return images.reshape(-1, 16) @ kernel + bias

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    soft = -np.exp(log_softmax(logits(teacher) / 2)) * log_softmax(logits(student) / 2)
    hard = -log_softmax(logits(student))[np.arange(len(labels)), labels]
    logs, expected = recorder.epochs[0][1], 0.75 * 4 * soft.sum(-1).mean() + 0.25 * hard.mean()
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    accuracy = (logits(student).argmax(-1) == labels).mean()
    assert logs["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_distillation_leaves_the_teacher_alone():
    student, teacher = float_model(1), float_model(2)
    before = teacher.get_weights()
    fit(student, Stripes(), config(1, teacher=teacher))
    for left, right in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


# ---------------------------------------------------------------- going on


# (steps between checkpoints, cut off after this step, resumed at)
INTERRUPTIONS = {
    "in the first epoch": (2, 3, 2),
    "at an epoch's end": (None, 2 * STEPS, STEPS),
    "in a middle epoch": (None, STEPS + 3, STEPS),
    "between two checkpoints": (3, STEPS + 4, STEPS + 3),
    "in the last epoch": (1, 3 * STEPS - 1, 3 * STEPS - 1),
    "before any checkpoint": (None, 2, 0),
}


@functools.cache
def uninterrupted(kind: str) -> tf_keras.Model:
    model = MODELS[kind]()
    fit(model, Stripes(), config())
    return model


@pytest.mark.parametrize(
    "when, kind",
    [*((when, "float") for when in INTERRUPTIONS), ("between two checkpoints", "w4a4")],
)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(when, kind, tmp_path):
    checkpoint_steps, last, resumed_at = INTERRUPTIONS[when]
    # From another start, where a checkpoint replaces it.
    cut_off, resumed = MODELS[kind](0), MODELS[kind](7 if resumed_at else 0)
    options = {"checkpoint_dir": tmp_path, "checkpoint_steps": checkpoint_steps}
    with pytest.raises(KeyboardInterrupt):
        fit(cut_off, Stripes(), config(**options), callbacks=[Recorder(last)])
    recorder = Recorder()
    start = fit(resumed, Stripes(), config(**options, resume=True), callbacks=[recorder])
    assert start == resumed_at
    assert len(recorder.rates) == 3 * STEPS - resumed_at
    assert [epoch for epoch, _ in recorder.epochs] == list(range(resumed_at // STEPS, 3))
    assert_same_state(uninterrupted(kind), resumed)


# The last change of widths lies after the interruption at step 7 of 12, all others before it.
WITH_STATE = {
    "widths and statistics": (
        {
            "gradual_bits": ((8, 0.25), (4, 0.67)),
            "freeze_batch_norm": 0.5,
            "reestimate_batch_norm": 3,
            "freeze_ranges": 0.5,
            "dampening": 0.1,
        },
        list,
    ),
    "frozen weights": (
        {"reestimate_batch_norm": 3, "quantizer_learning_rate": 0.1, "weight_decay": 0.1},
        # One of the caller's own: what fit is given is part of its checkpoints.
        lambda: [IterativeFreezing(0.3, first_threshold=0.3, momentum=0.5, start=0.0)],
    ),
}


@functools.cache
def other_model() -> tf_keras.Model:
    """As another process would make it; a checkpoint replaces its weights."""
    return quantized_model(7, everywhere("w2a2"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", WITH_STATE)
def test_a_resumed_run_with_settings_ends_as_an_uninterrupted_one(settings, tmp_path):
    options, make = WITH_STATE[settings]
    options, first, second = config(**options, learning_rate=0.05), make(), make()
    model = same_model("w2a2")
    fit(model, Stripes(), options, callbacks=first)
    whole = state(model)
    options = dataclasses.replace(options, checkpoint_dir=tmp_path, checkpoint_steps=3)
    with pytest.raises(KeyboardInterrupt):
        cut_off = [*make(), Recorder(STEPS + 4)]
        fit(same_model("w2a2"), Stripes(), options, callbacks=cut_off)
    options, resumed = dataclasses.replace(options, resume=True), other_model()
    assert fit(resumed, Stripes(), options, callbacks=second) == STEPS + 3
    assert_equal_arrays(whole, state(resumed))
    if first:
        assert 0.0 < first[0].frozen_share == second[0].frozen_share < 1.0
    # A run that was finished before is finished alike.
    again = same_model("w2a2")
    assert fit(again, Stripes(), options, callbacks=make()) == 3 * STEPS
    assert_equal_arrays(whole, state(again))


def test_a_run_cut_off_twice_in_one_epoch_goes_on_twice(tmp_path):
    last = float_model(7)
    options = {"checkpoint_dir": tmp_path, "checkpoint_steps": 1}
    for cut, resume in ((STEPS + 1, False), (STEPS + 3, True)):
        settings = config(**options, resume=resume)
        with pytest.raises(KeyboardInterrupt):
            fit(float_model(), Stripes(), settings, callbacks=[Recorder(cut)])
    assert fit(last, Stripes(), config(**options, resume=True)) == STEPS + 3
    assert_same_state(uninterrupted("float"), last)


def test_a_finished_run_is_not_trained_further(tmp_path):
    first, again = float_model(), float_model(7)
    fit(first, Stripes(), config(checkpoint_dir=tmp_path))
    assert fit(again, Stripes(), config(checkpoint_dir=tmp_path, resume=True)) == 3 * STEPS
    assert_same_state(first, again)


def test_without_resume_an_old_checkpoint_is_not_read(tmp_path):
    fit(float_model(7), Stripes(), config(checkpoint_dir=tmp_path))
    fresh, again = float_model(), float_model()
    fit(fresh, Stripes(), config(1))
    assert fit(again, Stripes(), config(1, checkpoint_dir=tmp_path)) == 0
    assert_same_state(fresh, again)


def test_two_checkpoints_are_kept(tmp_path):
    fit(float_model(), Stripes(), config(checkpoint_dir=tmp_path, checkpoint_steps=1))
    assert sorted(path.name for path in tmp_path.glob("*.index")) == [
        f"ckpt-{3 * STEPS - 1}.index",
        f"ckpt-{3 * STEPS}.index",
    ]


def test_a_checkpoint_of_another_model_is_an_error_of_one_line(tmp_path):
    fit(float_model(), Stripes(), config(1, checkpoint_dir=tmp_path))
    with pytest.raises(QatError) as error:
        fit(linear_model(0), Stripes(), config(2, checkpoint_dir=tmp_path, resume=True))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("checkpoint_steps", (None, 1), ids=("epochs", "steps"))
def test_a_loss_of_nan_ends_training_and_keeps_a_good_checkpoint(checkpoint_steps, tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_steps": checkpoint_steps}
    with pytest.raises(TrainingError, match="epoch 2.*learning rate") as error:
        fit(float_model(), Stripes(nan_from=STEPS + 1), config(**options))
    assert "\n" not in str(error.value)
    saved = float_model(7)
    start = fit(saved, Stripes(), config(**options, resume=True), callbacks=[Recorder()])
    assert STEPS <= start <= STEPS + 1
    assert all(np.isfinite(values).all() for values in state(saved))


def test_a_huge_rate_ends_in_the_error():
    with pytest.raises(TrainingError, match="lower the learning rate"):
        fit(float_model(), Stripes(), config(3, 1e38))


# ---------------------------------------------------------------- settings


def bits_of(model):
    found = [layer.quantizer for layer in model.layers if isinstance(layer, qat.FakeQuantize)]
    found += [v[1] for la in model.layers for v in getattr(la, "_weight_vars", ())]
    return [quantizer.num_bits for quantizer in found]


@pytest.mark.slow
def test_a_training_that_is_cut_off_leaves_no_changed_model():
    model = same_model("w2a2")
    before, seen = bits_of(model), Watcher(lambda: bits_of(model))
    settings = config(
        gradual_bits=((8, 0.9),), freeze_batch_norm=0.0, dampening=0.1, teacher=linear_model(0)
    )
    with pytest.raises(KeyboardInterrupt):
        fit(model, Stripes(), settings, callbacks=[seen, Recorder(2)])
    assert set(seen.seen[-1]) == {8} and bits_of(model) == before and set(before) == {2, 8}
    assert "compute_loss" not in vars(model)
    assert not any("call" in vars(layer) for layer in model.layers)


def test_statistics_are_measured_at_the_end():
    model = same_model("w2a2")
    fit(model, Stripes(), config(1, reestimate_batch_norm=3))
    found = model.get_weights()
    qat.reestimate_batch_norm(model, Stripes().train_stream(), steps=3)
    for left, right in zip(found, model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_optimizer_gets_its_settings():
    model = linear_model(0)
    fit(model, Stripes(), config(1, weight_decay=0.25, quantizer_learning_rate=0.5))
    assert model.optimizer.weight_decay == 0.25
    assert model.optimizer.quantizer_learning_rate == 0.5


def quantized_by_tfmot() -> tf_keras.Model:
    return tfmot.quantization.keras.quantize_model(float_model())


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(float_model, id="float"),
        pytest.param(quantized_by_tfmot, id="tfmot", marks=pytest.mark.slow),
    ],
)
def test_settings_that_do_not_apply_change_nothing(build):
    bare, given = (build() for _ in range(2))
    settings = {"iterative_freezing": 0.01, "dampening": 0.1, "quantizer_learning_rate": 0.1}
    fit(bare, Stripes(), config(1))
    fit(given, Stripes(), config(1, **settings, freeze_ranges=0.5))
    assert_same_state(bare, given)


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(TrainingError, match="iterative_freezing.*gradual_bits"):
        config(iterative_freezing=0.01, gradual_bits=((8, 0.5),))


# ---------------------------------------------------------------- budget


@pytest.mark.parametrize("factor", (1, 3))
@pytest.mark.parametrize("quantized", (False, True))
def test_epochs_fall_with_the_size_of_the_dataset_and_stay_in_bounds(quantized, factor):
    sizes = sorted({round(1.1**power) for power in range(130)})
    epochs = [default_epochs(steps, quantized=quantized, factor=factor) for steps in sizes]
    assert all(left >= right for left, right in itertools.pairwise(epochs))
    assert all(isinstance(count, int) for count in epochs)
    least, most = (2, 30) if quantized else (4, 60)
    assert (epochs[-1], epochs[0]) == (factor * least, factor * most)


def test_the_budget_is_about_the_same_for_all_middle_sizes():
    for quantized, budget, sizes in ((False, 4000, (100, 937)), (True, 2500, (100, 800))):
        for steps in sizes:
            total = steps * default_epochs(steps, quantized=quantized)
            # Epochs are whole: half an epoch more or less.
            assert abs(total - budget) <= steps / 2
