"""The programs on Fashion-MNIST as a user runs them: minutes, and only where TFDS has the data."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from qat.data import DataError
from qat.tfds_images import open_dataset

pytestmark = pytest.mark.slow

PROJECT = pathlib.Path(__file__).resolve().parent.parent
DATASET = "fashion_mnist"
FLOAT_EPOCHS, QAT_EPOCHS = 2, 1
WIDTHS = ("w8a8", "w4a8")


def program(name: str, *arguments: str) -> str:
    """Runs a program; its stdout."""
    result = subprocess.run(
        [sys.executable, PROJECT / "scripts" / f"{name}.py", f"--dataset={DATASET}", *arguments],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """runs/w8a8, with the float model, and runs/w4a8 that starts from it."""
    try:
        open_dataset(DATASET).count("test")
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("runs")
    training = ["--model=cnn5", "--batch_size=128", f"--qat_epochs={QAT_EPOCHS}", "--strict"]
    program(
        "train",
        *training,
        f"--output_dir={folder / 'w8a8'}",
        f"--float_epochs={FLOAT_EPOCHS}",
        "--recipe=w8a8",
    )
    program(
        "train",
        *training,
        f"--output_dir={folder / 'w4a8'}",
        f"--float_model={folder / 'w8a8' / 'float_model.keras'}",
        "--recipe=w4a8",
    )
    return folder


def report_of(runs: pathlib.Path, recipe: str) -> dict:
    return json.loads((runs / recipe / "report.json").read_text())


@pytest.mark.parametrize("recipe", WIDTHS)
def test_the_file_is_as_accurate_as_the_float_model(recipe, runs):
    report = report_of(runs, recipe)
    accuracy, count = report["accuracy"], report["num_eval_examples"]
    assert count == 10_000
    # Two epochs of cnn5 reach 0.87 and more; a broken training stays far below.
    assert accuracy["float"] > 0.85
    # Both models see the same examples. Of those, at most 8 % are right for one and wrong for the
    # other, each worth ±1/count: the difference has this standard error; two of them are granted.
    error = math.sqrt(0.08 / count)
    assert accuracy["tflite"] >= accuracy["float"] - 0.003 - 2 * error


@pytest.mark.parametrize("recipe", WIDTHS)
def test_the_file_is_the_model(recipe, runs):
    report = report_of(runs, recipe)
    assert report["integers_match"] and report["tflite"]["float_operators"] == []
    assert report["agreement"] >= 0.995
    assert abs(report["accuracy"]["tflite"] - report["accuracy"]["qat"]) <= 0.005
    assert report["output_snr_db"] is None or report["output_snr_db"] > 20


def test_four_bits_take_half_the_bytes(runs):
    eight, four = (report_of(runs, recipe)["tflite"] for recipe in WIDTHS)
    # The five convolutions but the first have 4 of 8 bits; biases, first and last layer stay.
    assert 0.5 < four["weight_bytes"] / eight["weight_bytes"] < 0.55
    assert eight["weight_bytes"] < 0.27 * eight["float_weight_bytes"]
    assert four["bytes"] < eight["bytes"]


def test_evaluate_finds_the_accuracy_of_the_report(runs, tmp_path):
    file = runs / "w4a8" / "model.tflite"
    program("evaluate", f"--tflite={file}", "--split=test", f"--json={tmp_path / 'found.json'}")
    found = json.loads((tmp_path / "found.json").read_text())
    report = report_of(runs, "w4a8")
    assert found["num_eval_examples"] == report["num_eval_examples"]
    assert found["accuracy"] == pytest.approx(report["accuracy"]["tflite"], abs=1e-9)
    assert found["bytes"] == report["tflite"]["bytes"]
