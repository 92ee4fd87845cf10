"""The integer simulator on whole exported models: every tensor of the file, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from single_operator import reference
from small_models import branches, data_for, model_of, quantized, residual

import qat
from qat.verify.integer import Simulator

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
    for example in data:
        theirs = reference(path.read_bytes(), example[None], every_tensor=True)
        for name, codes in simulator.tensors(example[None]).items():
            np.testing.assert_array_equal(codes, theirs[name], err_msg=name)
