"""Containers, bits and bytes of a file's weights, against codes and bytes read here."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
from small_models import layers

import qat
from qat.tflite_file import read_file
from qat.verify.weights import bytes_by_layer, weight_rows


def network(x):
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    return layers.Dense(5, name="dense")(layers.Flatten()(layers.ReLU()(x)))


def exported(how, tmp_path, **options):
    model = small_models.quantized(small_models.model_of(network, (6, 6, 3)), how)
    return model, read_file(qat.export_tflite(model, tmp_path / "model.tflite", **options))


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory):
    """(model, {storage: file}), all layers of 2 bits, with gammas of both signs."""
    model = small_models.model_of(network, (6, 6, 3))
    model = small_models.quantized(model, small_models.everywhere("w2a8"))
    folder = tmp_path_factory.mktemp("weights")
    return model, {
        storage: read_file(
            qat.export_tflite(model, folder / f"{storage}.tflite", weight_storage=storage)
        )
        for storage in ("size", "speed")
    }


def kernels(rows):
    return {row.layer: row for row in rows if row.tensor.endswith("kernel")}


def test_rows_are_the_weights_of_the_file(two_bits):
    model, files = two_bits
    for file in files.values():
        rows = weight_rows(file, model, "litert")
        assert sum(row.bytes for row in rows) == file.weight_bytes()
        by_layer = bytes_by_layer(rows)
        assert list(by_layer) == ["conv", "depthwise", "dense"]
        constants = {tensor.name: tensor for tensor in file.tensors}
        for layer, total in by_layer.items():
            parts = (constants[f"{layer}/kernel"], constants[f"{layer}/bias"])
            assert total == sum(tensor.bytes for tensor in parts)
        for row in rows:
            assert row.stored == constants[row.tensor].dtype
            assert row.values == np.prod(constants[row.tensor].shape)
        assert {row.bits for row in rows if row.tensor.endswith("bias")} == {None}


def test_bits_and_containers(two_bits):
    model, files = two_bits
    small = kernels(weight_rows(files["size"], model, "litert"))
    assert (small["depthwise"].stored, small["depthwise"].read) == ("int2", "int8")
    assert (small["depthwise"].bits, small["depthwise"].narrowest) == (2, "int2")
    # A negative gamma has made 2 of -2.
    codes = next(t.data for t in files["size"].tensors if t.name == "conv/kernel")
    assert codes.max() == 2
    assert (small["conv"].bits, small["conv"].stored, small["conv"].narrowest) == (
        3,
        "int4",
        "int4",
    )
    # Rows of 4·6 = 24 codes fill whole bytes.
    assert (small["dense"].stored, small["dense"].read) == ("int2", "int2")
    assert not any(row.too_wide for row in small.values())


def test_speed_takes_more_than_is_needed(two_bits):
    model, files = two_bits
    fast = kernels(weight_rows(files["speed"], model, "litert"))
    assert {layer: row.stored for layer, row in fast.items()} == {
        "conv": "int8",
        "depthwise": "int8",
        "dense": "int4",
    }
    assert {layer: row.narrowest for layer, row in fast.items()} == {
        "conv": "int4",
        "depthwise": "int2",
        "dense": "int2",
    }
    assert all(row.too_wide for row in fast.values())


def test_other_targets_read_less(two_bits):
    model, files = two_bits
    narrowest = {
        target: {
            layer: row.narrowest
            for layer, row in kernels(weight_rows(files["speed"], model, target)).items()
        }
        for target in ("tflm", "lce")
    }
    for target in narrowest:
        assert narrowest[target] == {"conv": "int4", "depthwise": "int4", "dense": "int8"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["litert", "tflm", "lce"])
@pytest.mark.parametrize(
    "how", ["w8a8", "w4a8", "w3a8", "wta8", "wta8-ttq", "w3a4-dorefa", "w1a8", "w1a1", "w4a16"]
)
def test_what_the_export_chooses_is_never_too_wide(how, target, tmp_path):
    model, file = exported(how, tmp_path, target=target)
    rows = weight_rows(file, model, target)
    assert len(kernels(rows)) == 3
    assert [row.tensor for row in rows if row.too_wide] == []
