"""Stock architectures that have learned something: quantized through `scripts/quantize.py`.

The classes of an untrained network mean nothing: one of each family is trained here.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import qat
from qat import data as qat_data
from qat.benchmark.architectures import constructors, smallest
from qat.objective import objective

PROJECT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = 10
pytestmark = pytest.mark.slow

# {one of each family: (epochs, learning rate)} on digits, in its smallest input.
FAMILIES = {
    "tf_keras.ConvNeXtTiny": (6, 3e-4),
    "tf_keras.DenseNet121": (4, 1e-3),
    "tf_keras.EfficientNetB0": (20, 2e-3),
    "tf_keras.EfficientNetV2B0": (40, 2e-3),
    "tf_keras.InceptionResNetV2": (4, 1e-3),
    "tf_keras.InceptionV3": (4, 1e-3),
    "tf_keras.MobileNet": (8, 1e-3),
    "tf_keras.MobileNetV2": (8, 1e-3),
    "tf_keras.MobileNetV3Small": (10, 1e-3),
    "tf_keras.NASNetMobile": (6, 1e-3),
    "tf_keras.RegNetX002": (16, 3e-3),
    "tf_keras.RegNetY002": (16, 3e-3),
    "tf_keras.ResNet50": (4, 1e-3),
    "tf_keras.ResNet50V2": (4, 1e-3),
    "tf_keras.ResNetRS50": (4, 1e-3),
    "tf_keras.VGG16": (12, 1e-4),
    "tf_keras.Xception": (4, 1e-3),
    "keras.MobileNetV2": (8, 1e-3),
    "keras.EfficientNetB0": (20, 2e-3),
}
# {network: (pixels of a side, training steps)} on Fashion-MNIST.
ON_CLOTHES = {
    "MobileNetV2": (96, 500),
    "ResNet50V2": (64, 300),
    "EfficientNetB0": (96, 500),
    "MobileNetV3Small": (96, 800),
    "DenseNet121": (64, 300),
}


def input_range(network: tf_keras.Model) -> tuple[float, float]:
    """What pixels 0 and 255 become for it: unless it scales them itself, -1 and 1."""
    kinds = {type(layer).__name__ for layer in network.layers}
    return (0.0, 255.0) if kinds & {"Rescaling", "Normalization"} else (-1.0, 1.0)


def train(network: tf_keras.Model, stream: tf.data.Dataset, steps: int, rate: float) -> None:
    """Trains in place; batch normalization gets whole averages, since few steps move the EMA's."""
    low, high = input_range(network)

    def prepared(images, labels):
        grey = images.shape[-1] == 1
        images = tf.image.grayscale_to_rgb(images) if grey else images
        return images / 255.0 * (high - low) + low, labels

    stream = stream.map(prepared)
    schedule = tf_keras.optimizers.schedules.CosineDecay(rate, steps)
    # RegNets end in logits, whatever they are asked for.
    loss = objective(network, ["sparse_categorical_crossentropy"]).losses()
    network.compile(tf_keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])
    network.fit(stream, steps_per_epoch=steps, epochs=1, verbose=2)
    qat.reestimate_batch_norm(network, stream, steps=20)


def quantized(network: tf_keras.Model, output_dir: pathlib.Path, *flags: str) -> dict:
    """The report of the program on a model file."""
    path = output_dir.with_suffix(".keras")
    network.save(path)
    program = PROJECT / "scripts" / "quantize.py"
    command = [sys.executable, program, f"--model_path={path}", f"--output_dir={output_dir}"]
    subprocess.run([*command, "--recipe=w8a8", *flags], check=True)
    return json.loads((output_dir / "report.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_family(name, tmp_path):
    """Calibrated alone, the file is within 2 points of float and chooses the model's classes."""
    epochs, rate = FAMILIES[name]
    tf_keras.utils.set_random_seed(0)
    made, side = smallest(constructors()[name])
    network = qat.load_model(made)
    data = qat_data.load("digits", batch_size=32, image_size=side)
    train(network, data.train_stream(), epochs * data.steps_per_epoch, rate)
    pixels = "--input_range={},{}".format(*input_range(network))
    report = quantized(network, tmp_path / "run", "--dataset=digits", "--qat_epochs=0", pixels)
    accuracy = report["accuracy"]
    print(f"{name}: {accuracy}, same class {report['agreement']:.4f}")
    assert accuracy["float"] > 0.6  # it has learned something; chance is 0.1
    assert accuracy["tflite"] >= accuracy["float"] - 0.02
    assert report["agreement"] >= 0.98
    assert report["integers_match"]
    normalized = "ConvNeXt" in name  # layer normalization stays in float, with its reason
    assert bool(report["tflite"]["float_operators"]) == normalized


@pytest.mark.parametrize("name", ON_CLOTHES)
def test_calibration_loses_a_point_at_most_and_training_wins_it_back(name, fashion_mnist, tmp_path):
    """On 1,000 images that nothing was trained on."""
    side, steps = ON_CLOTHES[name]
    tf_keras.utils.set_random_seed(0)
    made = getattr(tf_keras.applications, name)(
        weights=None, input_shape=(side, side, 3), classes=CLASSES
    )
    network = qat.load_model(made)
    low, high = input_range(network)

    def resized(example):
        image = tf.cast(example["image"], tf.float32)
        return tf.image.resize(image, (side, side)), example["label"]

    seen = (
        fashion_mnist.as_dataset(split="train[:50000]").map(resized).repeat().shuffle(2000, seed=0)
    )
    train(network, seen.batch(32), steps, 1e-3)
    others = fashion_mnist.as_dataset(split="train[50000:55000]").map(resized)
    x, y = next(iter(others.batch(5000)))
    x = (tf.image.grayscale_to_rgb(x) / 255.0 * (high - low) + low).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=y.numpy())
    source, accuracy = f"--calibration_data={tmp_path}/data.npz", {}
    for epochs in (0, 3):
        report = quantized(network, tmp_path / f"run{epochs}", source, f"--qat_epochs={epochs}")
        assert report["integers_match"] and report["tflite"]["float_operators"] == []
        assert report["num_eval_examples"] == 1000
        accuracy[epochs] = report["accuracy"]
    print(f"{name}: calibrated {accuracy[0]}, trained {accuracy[3]}")
    assert accuracy[0]["float"] > 0.7
    assert accuracy[0]["tflite"] >= accuracy[0]["float"] - 0.01
    assert accuracy[3]["tflite"] >= accuracy[0]["float"]
