"""The integer simulator on whole exported models: every tensor of the file, bit for bit."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import tensorflow as tf
from single_operator import reference
from small_models import branches, data_for, model_of, quantized, residual

import models
import qat
from qat.tflite_file import read_file
from qat.verify.integer import Simulator, simulate

EXAMPLES = 4


@pytest.mark.parametrize(
    ("build", "recipe", "io"),
    [
        (branches, "w8a8", "uint8"),
        (branches, "w8a16", "float32"),
        (residual, "w1a1", "int8"),
        pytest.param(branches, "w4a6", "float32", marks=pytest.mark.slow),
        pytest.param(residual, "w2a2", "float32", marks=pytest.mark.slow),
    ],
)
def test_every_tensor_of_an_exported_model(build, recipe, io, tmp_path):
    model = quantized(model_of(build, (11, 10, 3)), recipe)
    path = qat.export_tflite(model, tmp_path / "model.tflite", io=io)
    simulator = Simulator(path)
    (data,) = data_for(model, EXAMPLES)
    if io != "float32":
        (boundary,) = simulator.inputs
        low, high = (0, 255) if io == "uint8" else (-128, 127)
        codes = np.rint(data / boundary.scale) + boundary.zero_point
        data = np.clip(codes, low, high).astype(io)
    assert_every_tensor_equals(path, data)


def assert_every_tensor_equals(path, data):
    """All that an operator writes, simulated and by BUILTIN_REF, one example at a time."""
    simulator, file = Simulator(path), read_file(path)
    written = {tensor.name for operator in file.operators for tensor in operator.outputs}
    for example in data:
        ours = simulator.tensors(example[None])
        theirs = reference(path.read_bytes(), example[None], every_tensor=True)
        assert written <= set(ours)
        for name, codes in ours.items():
            np.testing.assert_array_equal(codes, theirs[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w1a1", "w8a16"])
@pytest.mark.parametrize("name", models.MODELS)
def test_every_tensor_of_every_architecture(name, recipe, tmp_path):
    """Untrained, a quarter as wide where that is an option, with the data's statistics."""
    parameters = inspect.signature(importlib.import_module(f"models.{name}").build).parameters
    options = {"width": 0.25} if "width" in parameters else {}
    network = models.build(name, (8, 8, 1), 5, **options)
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.float32)
    qat.reestimate_batch_norm(network, tf.data.Dataset.from_tensors(x), fewest=16)
    model = quantized(network, recipe, [x], input_range=(0, 255))
    path = qat.export_tflite(model, tmp_path / "model.tflite")
    assert_every_tensor_equals(path, x[:EXAMPLES])
    assert len(np.unique(simulate(path, x)[0], axis=0)) > 1, "the logits ignore the image"
