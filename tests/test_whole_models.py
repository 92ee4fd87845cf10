from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter
from whole_models import WHOLE_MODELS

from qat.arrays import load_arrays
from qat.verify.interpreter import Runner

PROJECT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def snr_db(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Signal about its mean over the examples, against the difference; least of all outputs."""
    ratios = []
    for real, other in zip(reference, found, strict=True):
        real = real.astype(np.float64)
        signal = np.square(real - real.mean(0)).sum()
        ratios.append(10 * np.log10(signal / np.square(real - other).sum()))
    return min(ratios)


def post_training_file(model: tf_keras.Model, x: list[np.ndarray]) -> bytes:
    """TensorFlow's own int8 file, calibrated on the same examples."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    names = model.input_names
    converter.representative_dataset = lambda: (
        {name: a[i : i + 1].astype(np.float32) for name, a in zip(names, x, strict=True)}
        for i in range(len(x[0]))
    )
    return converter.convert()


def outputs_of(content: bytes, model: tf_keras.Model, x: list[np.ndarray]) -> list[np.ndarray]:
    """Of a file made by the converter, whose inputs and outputs have an order of their own."""
    interpreter = Interpreter(model_content=content)
    signature = interpreter.get_signature_runner()
    names = list(signature.get_input_details())
    by_size = {tuple(a.shape[1:]): a for a in x}
    found = []
    for index in range(len(x[0])):
        feed = {}
        for name in names:
            shape = tuple(signature.get_input_details()[name]["shape"][1:])
            feed[name] = by_size[shape][index : index + 1].astype(np.float32)
        found.append(signature(**feed))
    joined = [np.concatenate([each[name] for each in found]) for name in found[0]]
    order = []
    for tensor in model.outputs:
        shape = tuple(tensor.shape[1:])
        order.append(next(array for array in joined if array.shape[1:] == shape))
    return order


def fresh_examples(build) -> list[np.ndarray]:
    """1,280 of the same kind, an array for each input; BUILD_NOTES has what 64 say."""
    drawn = [tf.nest.flatten(build(np.random.default_rng(seed))[1]) for seed in range(1, 5)]
    return [np.concatenate(arrays) for arrays in zip(*drawn, strict=True)]


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_the_file_is_as_good_as_tensorflows_own(name, tmp_path):
    """Calibrated alone, and after some training: both as near to the float model, or nearer."""
    build, losses = WHOLE_MODELS[name]
    tf_keras.utils.set_random_seed(0)
    model, x, y = build(np.random.default_rng(0))
    x, y = tf.nest.flatten(x), tf.nest.flatten(y)
    model.compile(tf_keras.optimizers.Adam(3e-3), list(losses))
    model.fit(x if len(x) > 1 else x[0], y if len(y) > 1 else y[0], epochs=12, verbose=0)
    model.save(tmp_path / "model.keras")
    inputs = dict(zip(model.input_names, x, strict=True)) if len(x) > 1 else {"x": x[0]}
    targets = dict(zip(model.output_names, y, strict=True)) if len(y) > 1 else {"y": y[0]}
    np.savez(tmp_path / "data.npz", **inputs, **targets)
    # What quantize.py calibrates with.
    data = load_arrays(f"{tmp_path}/data.npz", model, batch_size=16, seed=0, flag="")
    train = data.order[-data.counts[0] :]
    of_test = fresh_examples(build)
    expected = tf.nest.flatten(model(of_test if len(x) > 1 else of_test[0]))
    expected = [output.numpy() for output in expected]
    theirs = outputs_of(post_training_file(model, [a[train] for a in x]), model, of_test)
    common = [
        sys.executable,
        PROJECT / "scripts" / "quantize.py",
        f"--model_path={tmp_path}/model.keras",
        f"--calibration_data={tmp_path}/data.npz",
        f"--loss={','.join(losses)}",
        "--batch_size=16",
    ]
    ours = {}
    for epochs in (0, 3):
        folder = tmp_path / f"run{epochs}"
        subprocess.run([*common, f"--qat_epochs={epochs}", f"--output_dir={folder}"], check=True)
        report = json.loads((folder / "report.json").read_text())
        assert report["integers_match"] and report["tflite"]["float_operators"] == []
        found = Runner(folder / "model.tflite").run(*of_test)
        ours[epochs] = snr_db(expected, [output.values for output in found])
        if "loss" in report:
            assert report["loss"]["tflite"] < 1.25 * report["loss"]["float"] + 1e-3
        else:
            assert report["accuracy"]["tflite"] >= report["accuracy"]["float"] - 0.02
    print(f"{name}: TensorFlow {snr_db(expected, theirs):.1f} dB, ours {ours[0]:.1f} dB")
    assert ours[0] >= snr_db(expected, theirs) - 1.0
