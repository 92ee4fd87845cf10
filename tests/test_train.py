from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qat
from qat.errors import QatError
from qat.train import TrainConfig, TrainingError, default_epochs, fit

layers = tf_keras.layers
BATCH, STEPS, CLASSES = 8, 4, 3


@dataclasses.dataclass
class Stripes:
    """Noisy images whose bright row is their class; from step `nan_from` on they are NaN."""

    nan_from: int = 10**9
    steps_per_epoch: int = STEPS

    def batch(self, seed: int, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, BATCH)
        images = rng.normal(0, 0.3, (BATCH, 4, 4, 1))
        images[np.arange(BATCH), labels] += 1
        return np.where(step < self.nan_from, images, np.nan).astype(np.float32), labels

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        def batches():
            for step in itertools.count(start_step):
                yield self.batch(1000 + step, step)

        return tf.data.Dataset.from_generator(batches, output_signature=SIGNATURE)

    @property
    def validation(self) -> tf.data.Dataset:
        images, labels = zip(*(self.batch(seed) for seed in range(4)), strict=True)
        data = tf.data.Dataset.from_tensor_slices((np.concatenate(images), np.concatenate(labels)))
        return data.batch(BATCH)


SIGNATURE = (
    tf.TensorSpec((BATCH, 4, 4, 1), tf.float32),
    tf.TensorSpec((BATCH,), tf.int64),
)


def float_model(seed: int = 0) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = layers.Input((4, 4, 1), name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn", momentum=0.9)(x))
    return tf_keras.Model(image, layers.Dense(CLASSES, name="logits")(layers.Flatten()(x)))


def quantized_model(seed: int = 0) -> tf_keras.Model:
    return qat.calibrate(qat.quantize_model(float_model(seed), "w4a4"), Stripes().validation)


MODELS = {"float": float_model, "w4a4": quantized_model}


def linear_model(seed: int, *, softmax: bool = False) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(seed)
    image = layers.Input((4, 4, 1))
    logits = layers.Dense(CLASSES, kernel_initializer="he_normal")(layers.Flatten()(image))
    return tf_keras.Model(image, layers.Softmax()(logits) if softmax else logits)


def state(model: tf_keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in (*model.weights, *model.optimizer.variables)]


def assert_same_state(first: tf_keras.Model, second: tf_keras.Model) -> None:
    for left, right in zip(state(first), state(second), strict=True):
        np.testing.assert_array_equal(left, right)


class Recorder(tf_keras.callbacks.Callback):
    """Keeps what each epoch logs and each step's learning rate; is cut off after `last` steps."""

    def __init__(self, last: int | None = None):
        super().__init__()
        self.last, self.epochs, self.rates = last, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))
        if int(self.model.optimizer.iterations) == self.last:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, dict(logs)))


def config(epochs: int = 3, learning_rate: float = 0.02, **options) -> TrainConfig:
    return TrainConfig(epochs=epochs, learning_rate=learning_rate, **options)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", MODELS)
def test_training_lowers_the_loss(kind):
    recorder = Recorder()
    assert fit(MODELS[kind](), Stripes(), config(6), callbacks=[recorder]) == 0
    assert [epoch for epoch, _ in recorder.epochs] == list(range(6))
    losses = [logs["loss"] for _, logs in recorder.epochs]
    # log(3) = 1.1 is the loss of a guess.
    assert losses[-1] < 0.6 * losses[0] and losses[-1] < 0.5
    assert recorder.epochs[-1][1]["val_accuracy"] > 0.8


def test_the_rate_falls_to_0_along_a_cosine():
    recorder, total = Recorder(), 3 * STEPS
    fit(float_model(), Stripes(), config(3, 0.02), callbacks=[recorder])
    expected = [0.01 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    # The schedule computes in float32: a few ulps of a term of size 1.
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


@pytest.mark.parametrize("softmax", (False, True), ids=("logits", "softmax"))
def test_distillation_replaces_the_labels_by_the_teachers_probabilities(softmax):
    student, teacher, recorder = linear_model(1), linear_model(2, softmax=softmax), Recorder()
    data = Stripes()
    # At rate 0 the loss of an epoch is that of the student as it is.
    fit(student, data, config(1, 0.0, teacher=teacher), callbacks=[recorder])
    images = np.concatenate([data.batch(1000 + step)[0] for step in range(STEPS)]).reshape(-1, 16)

    def logits(model):
        kernel, bias = (weight.numpy().astype(np.float64) for weight in model.weights)
        return images @ kernel + bias

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    cross = -np.exp(log_softmax(logits(teacher))) * log_softmax(logits(student))
    logs = recorder.epochs[0][1]
    assert logs["loss"] == pytest.approx(cross.sum(-1).mean(), rel=1e-5)
    agreement = (logits(teacher).argmax(-1) == logits(student).argmax(-1)).mean()
    assert logs["agreement"] == pytest.approx(agreement, abs=1e-6)


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


# ---------------------------------------------------------------- budget


@pytest.mark.parametrize("binary", (False, True))
@pytest.mark.parametrize("quantized", (False, True))
def test_epochs_fall_with_the_size_of_the_dataset_and_stay_in_bounds(quantized, binary):
    sizes = sorted({round(1.1**power) for power in range(130)})
    epochs = [default_epochs(steps, quantized=quantized, binary=binary) for steps in sizes]
    assert all(left >= right for left, right in itertools.pairwise(epochs))
    assert all(isinstance(count, int) for count in epochs)
    least, most = (2, 30) if quantized else (4, 60)
    factor = 3 if binary else 1
    assert (epochs[-1], epochs[0]) == (factor * least, factor * most)


def test_the_budget_is_about_the_same_for_all_middle_sizes():
    for quantized, budget, sizes in ((False, 4000, (100, 937)), (True, 2500, (100, 800))):
        for steps in sizes:
            total = steps * default_epochs(steps, quantized=quantized)
            # Epochs are whole: half an epoch more or less.
            assert abs(total - budget) <= steps / 2
