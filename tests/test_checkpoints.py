"""What a training survives; `test_survive.py` does the same to whole runs."""

from __future__ import annotations

import os
import pathlib
import resource
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from stripes import CLASSES, STEPS, Recorder, Stripes, linear_model

import qat
from qat.callbacks import Checkpoints, Interrupted
from qat.callbacks.guards import one_line_errors
from qat.checkpoints import CheckpointFolder
from qat.errors import QatError, UserError
from qat.output import begin, locked, output_folder
from qat.train import TrainConfig, TrainingError, fit

layers = tf_keras.layers
EPOCHS = 3


class Act(tf_keras.callbacks.Callback):
    """Calls `act` after a step; is cut off after it if asked."""

    def __init__(self, step: int, act, cut: bool = False):
        super().__init__()
        self.step, self.act, self.cut = step, act, cut

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.step:
            self.act()
            if self.cut:
                raise KeyboardInterrupt


def config(folder: pathlib.Path, **options) -> TrainConfig:
    defaults = {"checkpoint_dir": folder, "checkpoint_steps": 1}
    return TrainConfig(epochs=EPOCHS, learning_rate=0.02, **(defaults | options))


def resumed(model: tf_keras.Model, folder: pathlib.Path, **options) -> int:
    return fit(model, Stripes(), config(folder, resume=True, **options))


def assert_same(first: tf_keras.Model, second: tf_keras.Model) -> None:
    for left, right in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.fixture(scope="module")
def whole() -> tf_keras.Model:
    model = linear_model(0)
    fit(model, Stripes(), TrainConfig(epochs=EPOCHS, learning_rate=0.02))
    return model


@pytest.fixture(scope="module")
def left_over(tmp_path_factory) -> pathlib.Path:
    """The checkpoints of a training that was cut off in step 7; those of 6 and 5 are left."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.raises(KeyboardInterrupt):
        fit(linear_model(0), Stripes(), config(folder), callbacks=[Recorder(STEPS + 2)])
    assert {path.stem for path in folder.glob("*.index")} == {"ckpt-5", "ckpt-6"}
    return folder


@pytest.fixture
def cut_off(left_over, tmp_path) -> pathlib.Path:
    return shutil.copytree(left_over, tmp_path / "checkpoints")


# ---------------------------------------------------------------- damage


def shorten(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def of_values(folder: pathlib.Path, values: list[float], **options):
    """A folder of one variable, and that variable."""
    variable = tf.Variable(values)
    return CheckpointFolder(folder, {"values": variable}, **options), variable


@pytest.mark.parametrize("suffix", ("data-00000-of-00001", "index"))
@pytest.mark.parametrize("damage", (shorten, flip_a_bit, empty, pathlib.Path.unlink))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, suffix, tmp_path, caplog):
    folder, variable = of_values(tmp_path, [0.0] * 1000, resume=False)
    for step in (1, 2, 3):
        variable.assign([float(step)] * 1000)
        folder.save(step)
    damage(tmp_path / f"ckpt-3.{suffix}")
    again, found = of_values(tmp_path, [0.0] * 1000, resume=True)
    assert again.restore() == 2 and set(found.numpy()) == {2.0}
    if (tmp_path / "ckpt-3.index").exists():  # else it was never finished
        assert "step 3 cannot be read" in caplog.text and "step 2" in caplog.text
    again.save(3)  # in the place of the damaged one
    last, found = of_values(tmp_path, [0.0] * 1000, resume=True)
    assert last.restore() == 3 and set(found.numpy()) == {2.0}


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(cut_off, whole):
    shorten(cut_off / "ckpt-6.data-00000-of-00001")
    (cut_off / "checkpoint").write_bytes(b"\0garbage")  # TensorFlow's list of checkpoints
    model = linear_model(7)
    assert resumed(model, cut_off) == 5
    assert_same(model, whole)


@pytest.mark.slow
def test_damage_to_all_checkpoints_is_an_error_of_one_line(cut_off):
    for path in cut_off.glob("*.data*"):
        shorten(path)
    with pytest.raises(TrainingError, match="damaged") as error:
        resumed(linear_model(7), cut_off)
    assert "\n" not in str(error.value) and str(cut_off) in str(error.value)


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_refused(cut_off):
    """They hold no state of the callbacks that are asked for now."""
    with pytest.raises(TrainingError, match="other settings"):
        resumed(linear_model(0), cut_off, gradual_bits=((8, 0.5),))


def test_a_training_that_starts_anew_leaves_no_old_checkpoint_to_resume(cut_off):
    of_values(cut_off, [0.0], resume=False)
    again, _ = of_values(cut_off, [0.0], resume=True)
    assert again.restore() == 0 and not list(cut_off.glob("ckpt-*"))


# ---------------------------------------------------------------- no room


def test_a_checkpoint_that_finds_no_room_leaves_the_last_one(tmp_path, whole):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))

    try:
        with pytest.raises(
            TrainingError, match="step 6 cannot be written.*step 5 is kept"
        ) as error:
            fit(linear_model(0), Stripes(), config(tmp_path), callbacks=[Act(5, fill_the_disk)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*6*"))
    model = linear_model(7)
    assert resumed(model, tmp_path) == 5
    assert_same(model, whole)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "number", (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow))
)
def test_a_signal_saves_the_step_that_runs(number, tmp_path, whole):
    before = signal.getsignal(number)
    ask = Act(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as interrupt:
        fit(linear_model(0), Stripes(), config(tmp_path, checkpoint_steps=None), callbacks=[ask])
    assert interrupt.value.number == number
    assert signal.getsignal(number) is before
    model = linear_model(7)
    assert resumed(model, tmp_path, checkpoint_steps=None) in (6, 7)
    assert_same(model, whole)


@pytest.fixture
def pythons_sigint():
    """Python's handler, also where a shell started the tests in the background: SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_without_checkpoints_ctrl_c_is_pythons(pythons_sigint):
    ask = Act(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        fit(linear_model(0), Stripes(), TrainConfig(epochs=9, learning_rate=0.02), callbacks=[ask])
    assert not isinstance(interrupt.value, Interrupted)


# ---------------------------------------------------------------- divergence


def test_weights_that_are_nan_are_not_saved():
    """The loss of the step that broke them was still a number."""
    model, saved = linear_model(0), []
    model.weights[0].assign(np.full((16, CLASSES), np.nan))
    guard = Checkpoints(SimpleNamespace(save=saved.append), None)
    guard.set_model(model)
    with pytest.raises(TrainingError, match="kernel.*epoch 2.*learning rate"):
        guard.on_epoch_begin(1)
        guard.on_epoch_end(1, {"loss": 0.5})
    assert not saved


# ---------------------------------------------------------------- TensorFlow's pages


def test_a_kernel_without_a_deterministic_version_is_named_in_one_line():
    page = (
        "Graph execution error:\nat node x\nA deterministic GPU implementation of Y is missing.\nz"
    )
    with pytest.raises(TrainingError, match="implementation of Y.*--deterministic") as error:
        with one_line_errors():
            raise tf.errors.UnimplementedError(None, None, page)
    assert "\n" not in str(error.value)


def test_used_up_memory_is_one_line_and_other_errors_stay():
    with pytest.raises(TrainingError, match="OOM.*batch_size"), one_line_errors():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\nmore")
    with pytest.raises(tf.errors.UnimplementedError), one_line_errors():
        raise tf.errors.UnimplementedError(None, None, "something else")


# ---------------------------------------------------------------- random layers


def random_model() -> tf_keras.Model:
    """Dropout is called twice; the pictures are flipped and made noisy."""
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((4, 4, 1))
    drop = layers.Dropout(0.3, name="drop")
    x = layers.GaussianNoise(0.1, name="noise")(layers.RandomFlip("vertical")(image))
    x = drop(layers.Flatten()(x))
    x = layers.AlphaDropout(0.2)(drop(layers.Dense(8, name="hidden")(x)))
    return tf_keras.Model(image, layers.Dense(CLASSES, name="logits")(x))


def test_a_resumed_training_with_dropout_draws_what_it_would_have_drawn(tmp_path):
    model, again = random_model(), random_model()
    fit(model, Stripes(), TrainConfig(epochs=EPOCHS, learning_rate=0.02))
    with pytest.raises(KeyboardInterrupt):
        fit(random_model(), Stripes(), config(tmp_path), callbacks=[Recorder(STEPS + 2)])
    assert resumed(again, tmp_path) == STEPS + 2
    assert_same(model, again)


def test_random_layers_differ_by_step_call_and_seed_and_keep_their_rate():
    drawn = []
    probe = layers.Input((4, 4, 1))
    drop = layers.Dropout(0.25, name="drop")
    both = layers.Concatenate()([drop(probe), drop(probe)])
    model = tf_keras.Model(probe, both)
    model.compile(tf_keras.optimizers.SGD(0.0), "mse")

    class Look(tf_keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            drawn.append(self.model(np.ones((64, 4, 4, 1), np.float32), training=True).numpy())

    data = np.zeros((3, 4, 4, 1), np.float32)
    for seed in (0, 0, 1):
        model.optimizer.iterations.assign(0)
        random = qat.callbacks.RandomByStep(seed)
        model.fit(data, np.zeros((3, 4, 4, 2)), 1, callbacks=[random, Look()], verbose=0)
    first, again, other = drawn[:3], drawn[3:6], drawn[6:]
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left, right)
        assert set(np.unique(left)) == {0.0, np.float32(1 / 0.75)}
        # 2048 draws of probability 0.25: five standard errors.
        assert abs((left == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2048)
    different = [*first, other[0]]
    for i, left in enumerate(different):
        assert not np.array_equal(left[..., 0], left[..., 1])
        for right in different[:i]:
            assert not np.array_equal(left, right)
    assert type(drop._random_generator).__name__ == "RandomGenerator"


# ---------------------------------------------------------------- the folder


def test_a_folder_is_one_runs(tmp_path):
    with output_folder(tmp_path), locked(tmp_path):
        with pytest.raises(UserError, match="another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_resumed_run_must_have_the_flags_it_was_started_with(tmp_path):
    begin(tmp_path, {"seed": 1, "recipe": ["w4a4", (1, 2)]}, resume=True)
    begin(tmp_path, {"seed": 1, "recipe": ["w4a4", (1, 2)]}, resume=True)
    with pytest.raises(QatError, match="--seed=1, not 2"):
        begin(tmp_path, {"seed": 2, "recipe": ["w4a4", (1, 2)]}, resume=True)
    begin(tmp_path, {"seed": 2, "recipe": []}, resume=False)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["checkpoints/mine.h5", "float_model.keras", "model.h"])
def test_files_that_are_no_runs_stay(name, resume, tmp_path):
    """The project's own folder is a likely --output_dir."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name.split('/')[0]}.*no run.json.*another folder"):
        begin(tmp_path, {}, resume=resume)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_runs_own_files_are_replaced(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")  # where it is to be read from
    begin(tmp_path, {}, resume=False)
    for name in ("model.tflite", "checkpoints", "notes.txt"):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("")
    begin(tmp_path, {}, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "notes.txt"}
