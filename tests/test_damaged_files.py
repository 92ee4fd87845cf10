"""Damaged and foreign .tflite files run or are refused in one line: no crash, no hang, no bug.

Whatever the interpreter does not survive would end this very process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import damaged_files
import numpy as np
import other_files
import pytest
import small_models
import tensorflow_datasets as tfds
from small_models import layers

import qat
import qat.digits  # noqa: F401  registers the dataset
from qat.errors import QatError
from qat.integers import integer_mismatches
from qat.tflite_file import FileError, read_file
from qat.verify import interpreter, trial
from qat.verify.evaluate import evaluate_tflite
from qat.verify.integer import Simulator
from qat.verify.interpreter import Runner
from qat.verify.reader import ARRAY_TYPES

TESTS = pathlib.Path(__file__).resolve().parent
RECIPES = ("w8a8", "w4a4", "w1a1")
FAST, SLOW = 14, 240  # mutants of each file


def convnet(x):
    x = layers.Rescaling(1 / 255)(x)
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.Conv2D(6, 3, activation="relu", name="conv_2")(layers.MaxPooling2D(2)(x))
    return layers.Dense(10, name="logits")(layers.Flatten()(x))


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (4, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def models(pixels):
    """{recipe: quantized model}"""

    def made(recipe):
        net = small_models.model_of(convnet, (8, 8, 1))
        return small_models.quantized(net, recipe, [pixels], input_range=(0, 255))

    return {recipe: made(recipe) for recipe in RECIPES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has the prepared digits in digits/."""
    folder = tmp_path_factory.mktemp("damaged")
    tfds.builder("digits", data_dir=folder / "digits").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def whole(models, folder):
    """{recipe: content of the exported file}"""
    paths = {name: qat.export_tflite(m, folder / f"{name}.tflite") for name, m in models.items()}
    return {name: path.read_bytes() for name, path in paths.items()}


def write(folder, content: bytes) -> pathlib.Path:
    path = folder / "damaged.tflite"
    path.write_bytes(content)
    return path


@pytest.fixture
def attempt(folder, pixels, monkeypatch):
    """attempt(content, model) → [what simulator, verify and evaluate made of the file]."""
    monkeypatch.setattr(interpreter, "TRIAL_SECONDS", 10)
    dataset = small_models.batches([pixels])

    def simulate(path, model):
        simulator = Simulator(path)
        simulator.run(*(np.zeros(t.shape, ARRAY_TYPES[t.dtype]) for t in simulator.inputs))

    def verify(path, model):
        qat.verify_tflite(path, model, dataset)

    def evaluate(path, model):
        evaluate_tflite(path, "digits", split="test[:8]", data_dir=folder / "digits", threads=1)

    def attempt(content, model):
        path = write(folder, content)
        return [outcome(way, path, model) for way in (simulate, verify, evaluate)]

    return attempt


def outcome(way, path, model) -> str:
    """ "runs" or "refused", in one line; any other exception is a bug."""
    try:
        way(path, model)
    except QatError as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    return "runs"


@pytest.mark.slow
def test_whole_files_run(attempt, whole, models):
    for recipe in RECIPES:
        assert attempt(whole[recipe], models[recipe]) == ["runs"] * 3


def check_mutants(attempt, content, model, count: int, seed: int) -> None:
    refused = np.zeros(3, int)
    for name, damaged in damaged_files.mutants(content, count, seed):
        started = time.monotonic()
        refused += np.equal(attempt(damaged, model), "refused")
        assert time.monotonic() - started < 60, name
    # Most mutants are beyond use; a flipped weight or name harms nothing.
    assert np.all((refused > count / 2) & (refused < count))


@pytest.mark.parametrize("recipe", ["w1a1"])
@pytest.mark.slow
def test_some_mutants(attempt, whole, models, recipe):
    check_mutants(attempt, whole[recipe], models[recipe], FAST, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_many_mutants(attempt, whole, models, recipe):
    assert SLOW * len(RECIPES) >= 200
    check_mutants(attempt, whole[recipe], models[recipe], SLOW, seed=2)


def test_a_file_without_a_bias_is_reported(folder, whole, models):
    """What integers are compared with may be missing altogether."""
    file = read_file(write(folder, whole["w8a8"]))
    bare = [dataclasses.replace(op, inputs=op.inputs[:2]) for op in file.operators]
    found = integer_mismatches(models["w8a8"], dataclasses.replace(file, operators=tuple(bare)))
    assert len([line for line in found if "built otherwise (StopIteration" in line]) == 4


@pytest.mark.parametrize("kind", damaged_files.foreign())
def test_foreign_files_are_refused(attempt, models, kind):
    assert attempt(damaged_files.foreign()[kind], models["w8a8"]) == ["refused"] * 3


OTHERS = other_files.others()
RUN = {
    "images of 1000 × 1000": ["runs", "refused", "runs"],
    "7 images at once": ["refused", "runs", "runs"],
    "huge steps": ["refused", "runs", "runs"],
    "booleans": ["runs", "refused", "refused"],
    "64 classes": ["runs", "refused", "refused"],
    "an output for no image": ["runs", "refused", "refused"],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_networks_are_refused_or_run(attempt, models, kind):
    assert attempt(OTHERS[kind], models["w8a8"]) == RUN.get(kind, ["refused"] * 3)


# What the trial run says.


def refusal(folder, content) -> str:
    path = write(folder, content)
    with pytest.raises(FileError) as error:
        Runner(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_a_crash_is_named(folder):
    assert "crashes on it (SIG" in refusal(folder, OTHERS["steps of 0"])


def test_a_file_that_takes_too_long(folder, whole, monkeypatch):
    monkeypatch.setattr(interpreter, "TRIAL_SECONDS", 0.01)
    interpreter._objection.cache_clear()
    assert "does not finish a first run in 0.01 seconds" in refusal(folder, whole["w8a8"])


def test_a_file_that_asks_for_too_much_memory(folder):
    assert "refuses it, given 2 GiB of memory" in refusal(folder, other_files.large(2**29))
    Runner(write(folder, other_files.large(2**20)))


def test_a_trial_that_cannot_start_is_no_fault_of_the_file(folder, whole, monkeypatch):
    monkeypatch.setattr(trial, "__file__", "missing.py")
    interpreter._objection.cache_clear()
    with pytest.raises(subprocess.CalledProcessError):
        Runner(write(folder, whole["w8a8"]))


@pytest.mark.slow
def test_the_program_exits_with_2_and_one_line(folder, whole):
    """In one process: TensorFlow's import takes seconds."""
    contents = {
        "foreign": damaged_files.foreign()["zip"],
        "truncated": whole["w8a8"][:2000],
        "crashes": OTHERS["steps of 0"],
        "two outputs": OTHERS["two outputs"],
        "NaN": OTHERS["NaN"],
    }
    work = folder / "work"
    work.mkdir()
    calls = []
    for name, content in contents.items():
        (work / f"{name}.tflite").write_bytes(content)
        calls.append(["evaluate", f"--tflite={name}.tflite", f"--data_dir={folder / 'digits'}"])
    (folder / "calls.json").write_text(json.dumps(calls))
    script, results = TESTS / "program_calls.py", folder / "results.json"
    subprocess.run(
        [sys.executable, script, folder / "calls.json", results],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=True,
        timeout=300,
    )
    for name, result in zip(contents, json.loads(results.read_text()), strict=True):
        assert result["code"] == 2, result["stderr"][-3000:]
        # LiteRT's own log, of files that it runs.
        lines = [x for x in result["stderr"].splitlines() if not x.startswith("INFO: Created")]
        assert len(lines) == 1 and lines[0].startswith("error: "), result["stderr"]
        assert f"{name}.tflite" in lines[0] and result["stdout"] == ""
