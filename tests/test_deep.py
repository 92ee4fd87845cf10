"""Models deeper than Python's usual limit of calls inside each other."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import small_models
import tf_keras
from small_models import layers

import qat
from qat.deep import deep_models

# Keras takes a call for each layer in a row: enough for these, not for twice as many.
IN_A_ROW = 520


@pytest.mark.slow
def test_a_deep_model_is_quantized_saved_and_exported(tmp_path):
    inputs = x = layers.Input((2,))
    for _ in range(IN_A_ROW):
        x = layers.Average()([x, x])
    network = tf_keras.Model(inputs, layers.Dense(2)(x))
    data = [np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)]
    model = small_models.quantized(network, "w8a8", data)
    assert len(model.layers) > sys.getrecursionlimit()
    qat.save_model(model, tmp_path / "model.keras", recipe="w8a8")
    loaded = qat.load_quantized_model(tmp_path / "model.keras")
    path = qat.export_tflite(loaded, tmp_path / "model.tflite")
    (output,), (expected,) = small_models.run_file(path, data), small_models.run_model(model, data)
    np.testing.assert_array_equal(output, expected)


def test_the_room_is_given_back_whatever_happens():
    before = sys.getrecursionlimit()
    with pytest.raises(ZeroDivisionError), deep_models():
        assert sys.getrecursionlimit() > before
        raise ZeroDivisionError
    assert sys.getrecursionlimit() == before
