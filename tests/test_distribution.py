"""Several replicas train the network that one device trains."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qat import devices
from qat.distribution import batch_norm_over_replicas, split
from qat.errors import UserError

TESTS = pathlib.Path(__file__).resolve().parent
PROJECT = TESTS.parent
PATIENCE = 1800  # seconds on a busy machine
RECIPES = ("float", "w8a8", "w4a4")


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join((str(PROJECT), str(TESTS)))
    return {**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3", **more}


def cluster() -> list[dict[str, str]]:
    """The environments of two machines, here processes on this one."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("localhost", 0))
        hosts = [f"localhost:{each.getsockname()[1]}" for each in (one, other)]
    return [
        environment(
            TF_CONFIG=json.dumps(
                {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
            )
        )
        for index in range(2)
    ]


def together(commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """What the processes print; all must end well."""
    processes = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command, env in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in outputs]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("given", (None, "", "{", "[]", '{"cluster": {}}'))
def test_machines_without_a_tf_config_are_refused(given, monkeypatch):
    if given is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", given)
    with pytest.raises(UserError, match="TF_CONFIG.*cluster") as error:
        devices.strategy("multi_worker")
    assert "\n" not in str(error.value)


def test_a_missing_tpu_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setenv("TPU_NAME", "")
    with pytest.raises(UserError, match="no TPU was found") as error:
        devices.strategy("tpu")
    assert "\n" not in str(error.value)


class Two:
    num_replicas_in_sync = 2


def test_what_two_replicas_cannot_do_is_refused_before_training():
    devices.require_legal(Two(), 64, False, "float16")
    with pytest.raises(UserError, match="batch_size=63 .* multiple of 2"):
        devices.require_legal(Two(), 63, False, "float32")
    with pytest.raises(UserError, match="jit_compile.*2 replicas"):
        devices.require_legal(Two(), 64, True, "float32")


# ---------------------------------------------------------------- on one device


def test_one_device_gets_the_data_as_they_are():
    data = tf.data.Dataset.range(3)
    assert split(data, tf.distribute.get_strategy()) is data


def test_batch_normalization_is_changed_for_several_replicas_alone_and_while_they_train():
    layer = tf_keras.layers.BatchNormalization()
    model = tf_keras.Sequential([tf_keras.layers.Input((4, 4, 2)), layer])
    with batch_norm_over_replicas(model, tf.distribute.get_strategy()):
        assert (layer.synchronized, layer.fused) == (False, True)
    with batch_norm_over_replicas(model, Two()):
        assert (layer.synchronized, layer.fused) == (True, False)
    assert (layer.synchronized, layer.fused) == (False, True)


# ---------------------------------------------------------------- on several


def trained(distribution: str, folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    """What each process of a training found."""
    environments = cluster() if distribution == "multi_worker" else [environment()]
    files = [folder / f"{distribution}{index}.npz" for index in range(len(environments))]
    script = str(TESTS / "replica_run.py")
    commands = [[sys.executable, script, distribution, str(file), *RECIPES] for file in files]
    together(commands, environments)
    return [dict(np.load(file)) for file in files]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, np.ndarray]:
    return trained("none", tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ("mirrored", "multi_worker"))
def test_two_replicas_train_as_one_device_does(distribution, alone, tmp_path):
    """Up to the order of sums, and to the factor n / (n - 1) = 128 / 127 of the fused variance."""
    found = trained(distribution, tmp_path)
    for recipe in RECIPES:
        for each in found:
            assert each[f"{recipe}/replicas"] == 2 and each[f"{recipe}/agree"]
            one, two = alone[f"{recipe}/epochs"], each[f"{recipe}/epochs"]
            # Training normalizes with the batch's own variance: only the order of sums differs,
            # by some ulps. Where it moves a value across a rounding threshold of the grid, one code
            # of 15 or 255 changes, in one example of 32.
            np.testing.assert_allclose(
                one[:, 0], two[:, 0], rtol=1e-5 if recipe == "float" else 0.01
            )
            # In validation the moving variances differ by up to 1/128, half of it in the outputs.
            np.testing.assert_allclose(one[:, 2], two[:, 2], rtol=0.02)
        for key in alone:
            name = key.rpartition("_")[2]
            if key.startswith(f"{recipe}/") and name in ("minimum:0", "maximum:0"):
                np.testing.assert_allclose(alone[key], found[0][key], rtol=0.01, atol=1e-6)
    for each in found[1:]:
        for key, value in found[0].items():
            np.testing.assert_array_equal(value, each[key])


@pytest.mark.slow
def test_two_machines_write_one_folder_with_a_verified_file(tmp_path):
    command = [sys.executable, str(PROJECT / "scripts" / "train.py"), "--dataset=digits"]
    command += ["--model=lenet", "--recipe=w8a8", "--float_epochs=1", "--qat_epochs=1"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    (single,) = together([[*command, f"--output_dir={alone}"]], [environment()])
    shared = [*command, "--distribution=multi_worker", f"--output_dir={both}"]
    chief, helper = together([shared, shared], cluster())
    report = json.loads((both / "report.json").read_text())
    assert report["integers_match"] and report["agreement"] >= 0.99
    assert report["devices"]["replicas"] == 2
    assert {path.name for path in both.iterdir()} == {path.name for path in alone.iterdir()}
    assert helper == ""
    losses = [
        [line.split(",")[0] for line in out.splitlines() if "loss" in line]
        for out in (single, chief)
    ]
    values = [[float(line.split()[-1]) for line in lines] for lines in losses]
    np.testing.assert_allclose(values[0], values[1], rtol=0.01)
