"""Whole runs that are killed, interrupted or starved of disk, as a user would see it."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[1]
SAME = ("float_model.keras", "qat_model.keras", "model.tflite", "recipe.json")
ROUNDS = 5
PATIENCE = 1800  # seconds on a busy machine

pytestmark = pytest.mark.slow


def start(folder: pathlib.Path, *flags: str, limit: int | None = None) -> subprocess.Popen:
    """The training program; `limit` = bytes that a file may have."""
    command = [sys.executable, str(PROJECT / "scripts" / "train.py"), f"--output_dir={folder}"]
    command += ["--dataset=digits", "--model=lenet", "--recipe=w4a4", "--seed=5"]
    command += ["--float_epochs=1", "--qat_epochs=1", "--checkpoint_steps=2", *flags]
    if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code and both outputs."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What a run that nothing happens to leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = finished(start(folder))
    assert code == 0, err
    return contents(folder)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


def report_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "report.json").read_text())


# ---------------------------------------------------------------- kill -9


def checkpoints(folder: pathlib.Path, phase: str) -> int:
    """The step of the phase's last checkpoint."""
    found = (folder / "checkpoints" / phase).glob("ckpt-*.index")
    return max((int(path.stem.removeprefix("ckpt-")) for path in found), default=0)


def in_training(phase: str, step: int) -> Callable[[pathlib.Path], bool]:
    return lambda folder: checkpoints(folder, phase) >= step


def while_saving(phase: str) -> Callable[[pathlib.Path], bool]:
    """A checkpoint is being written: TensorFlow writes it under another name first."""

    def saving(folder: pathlib.Path) -> bool:
        try:
            names = os.listdir(folder / "checkpoints" / phase)
        except FileNotFoundError:
            return False
        return any("temp" in name for name in names)

    return saving


def trained(folder: pathlib.Path) -> bool:
    return (folder / "qat_model.keras").exists()


def killed(folder: pathlib.Path, moment: Callable[[pathlib.Path], bool], delay: float) -> bool:
    """Resumes the run and kills it some seconds after the moment; False if it ended before."""
    process = start(folder, "--resume")
    deadline = time.monotonic() + PATIENCE
    while not moment(folder) and process.poll() is None:
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    return finished(process)[0] == -signal.SIGKILL


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_killed_four_times_ends_bit_for_bit_as_one_that_was_not(number, whole, tmp_path):
    """20 kills over all rounds: in float training, in saving, in quantized training, in export."""
    chance, folder = random.Random(number), tmp_path / "run"
    moments = [
        (in_training("float", chance.randrange(2, 18)), 0.2 * chance.random()),
        (while_saving(chance.choice(("float", "qat"))), 0.01 * chance.random()),
        (in_training("qat", chance.randrange(2, 18)), 0.2 * chance.random()),
        (trained, 3.0 * chance.random()),
    ]
    for moment, delay in moments:
        assert killed(folder, moment, delay), "the run ended before it could be killed"
        assert not (folder / "report.json").exists() or moment is trained
    code, _, err = finished(start(folder, "--resume"))
    assert code == 0, err
    assert contents(folder) == whole
    assert report_of(folder)["resumed_at_step"] == 20  # quantized training was over


def test_the_report_tells_where_a_run_went_on(whole, tmp_path):
    for phase in ("float", "qat"):
        folder = tmp_path / phase
        assert killed(folder, in_training(phase, 8), 0.0)
        saved = checkpoints(folder, phase)
        assert finished(start(folder, "--resume"))[0] == 0
        # Killed in float training, it goes through all of the quantized one. The last checkpoint
        # may have been cut short; then it is the one before, two steps earlier.
        assert report_of(folder)["resumed_at_step"] in (saved, saved - 2)
        assert contents(folder) == whole


def test_resume_in_an_empty_folder_starts_afresh(whole, tmp_path):
    assert finished(start(tmp_path / "new", "--resume"))[0] == 0
    assert report_of(tmp_path / "new")["resumed_at_step"] == 0
    assert contents(tmp_path / "new") == whole


# ---------------------------------------------------------------- one process, one line


@pytest.mark.parametrize(("number", "code"), ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_saves_the_step_and_ends_with_one_line(number, code, whole, tmp_path):
    process = start(tmp_path, "--checkpoint_steps=1000")
    qat = tmp_path / "checkpoints" / "qat"
    while not (tmp_path / "tensorboard" / "qat").exists():  # quantized training has begun
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    ended, _, err = finished(process)
    assert ended == code and "--resume" in last_line(err) and "Traceback" not in err, err
    saved = checkpoints(tmp_path, "qat")
    assert saved > 0 and f"step {saved}" in last_line(err), sorted(qat.iterdir())
    code, _, err = finished(start(tmp_path, "--checkpoint_steps=1000", "--resume"))
    assert code == 0, err
    assert report_of(tmp_path)["resumed_at_step"] == saved
    assert contents(tmp_path) == whole


def test_a_second_process_is_kept_out_of_the_folder(tmp_path):
    first = start(tmp_path)
    while not (tmp_path / "checkpoints" / "float").exists():
        assert first.poll() is None
        time.sleep(0.01)
    code, _, err = finished(start(tmp_path))
    assert code == 2 and "in use by another process" in last_line(err), err
    assert finished(first)[0] == 0 and (tmp_path / "report.json").exists()


def test_a_disk_without_room_ends_with_one_line_and_the_run_goes_on_later(whole, tmp_path):
    code, _, err = finished(start(tmp_path, limit=40 * 1024))
    assert code == 2 and "Traceback" not in err, err
    assert last_line(err).startswith("error: "), err
    assert not list(tmp_path.rglob("*.tflite"))
    code, _, err = finished(start(tmp_path, "--resume"))
    assert code == 0, err
    assert contents(tmp_path) == whole


def test_resuming_with_other_flags_is_refused(tmp_path):
    assert killed(tmp_path, in_training("float", 2), 0.0)
    for flag in ("--batch_size=32", "--seed=6", "--recipe=w4a8"):
        code, _, err = finished(start(tmp_path, "--resume", flag))
        name = flag.split("=")[0]
        assert code == 2 and "--resume" in last_line(err) and name in last_line(err), err
