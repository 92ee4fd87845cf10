from __future__ import annotations

import json

import pytest

from qat.benchmark import architectures
from qat.errors import UserError

# One of each family; its smallest member that fits into minutes.
FAMILIES = (
    "tf_keras.DenseNet121",
    "tf_keras.EfficientNetB0",
    "tf_keras.EfficientNetV2B0",
    "tf_keras.MobileNet",
    "tf_keras.MobileNetV2",
    "tf_keras.MobileNetV3Small",
    "tf_keras.NASNetMobile",
    "tf_keras.RegNetX002",
    "tf_keras.RegNetY002",
    "tf_keras.ResNet50",
    "tf_keras.ResNet50V2",
    "tf_keras.ResNetRS50",
    "tf_keras.VGG16",
    "tf_keras.Xception",
    "tf_keras.InceptionV3",
    "keras.MobileNetV2",
    "keras.MobileNetV3Small",
    "keras.EfficientNetB0",
    "keras.ResNet50V2",
)


def row(name: str, **changes) -> dict:
    made = {
        "name": name,
        "error": None,
        "side": 32,
        "parameters": 1234567,
        "integers_match": True,
        "float_operators": [],
        "output_snr_db": 31.4,
        "bytes": 2500000,
        "seconds": {"quantize": 3.0, "export": 4.0},
    }
    return made | changes


@pytest.fixture
def measured(monkeypatch):
    """The names that were measured; VGG16 fails."""
    found = []

    def measure(names, paths, recipe, seed):
        for name in names:
            found.append(name)
            failed = {"error": "too big"} if name.endswith("VGG16") else {}
            paths[name].write_text(json.dumps(row(name, **failed)))
        return []

    monkeypatch.setattr(architectures, "_measure_in_processes", measure)
    return found


def test_all_stock_architectures_are_known():
    packages = [name.split(".")[0] for name in architectures.constructors()]
    assert (packages.count("tf_keras"), packages.count("keras")) == (71, 40)


def test_what_is_measured_is_not_measured_again(measured, tmp_path):
    for names in (["tf_keras.ResNet50"], ["tf_keras.ResNet50", "keras.Xception"]):
        architectures.run(tmp_path, names, "w8a8", 0)
    assert measured == ["tf_keras.ResNet50", "keras.Xception"]
    text = (tmp_path / "architectures.md").read_text()
    assert "| keras.Xception | 32 | 1,234,567 | match | none | 31 | 2.5 | 3, 7 |" in text
    assert [
        each["name"] for each in json.loads((tmp_path / "architectures.json").read_text())["rows"]
    ] == [
        "keras.Xception",
        "tf_keras.ResNet50",
    ]


def test_failures_are_told_and_tried_again(measured, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 1 failed: tf_keras.VGG16"):
            architectures.run(tmp_path, ["tf_keras.VGG16"], "w8a8", 0)
    assert measured == ["tf_keras.VGG16"] * 2
    assert "too big" in (tmp_path / "architectures.md").read_text()


def test_unknown_names_are_refused(measured, tmp_path):
    with pytest.raises(UserError, match="unknown architectures: AlexNet"):
        architectures.run(tmp_path, ["AlexNet"], "w8a8", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_family(name):
    found = architectures.measure(name, "w8a8", 0)
    assert found["error"] is None
    assert found["integers_match"] and found["float_operators"] == []


@pytest.mark.slow
def test_convnext_has_its_normalization_in_float():
    found = architectures.measure("tf_keras.ConvNeXtTiny", "w8a8", 0)
    assert found["error"] is None and found["integers_match"] and found["float_operators"]
