from __future__ import annotations

import json

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras

from qat import existing
from qat.errors import QatError
from qat.existing import QuantizeJob
from qat.recipe import Recipe
from qat.report import summary
from qat.settings import recommended
from qat.verify.interpreter import Runner

layers = tf_keras.layers


def segmentation_model(activation: str = "softmax") -> tf_keras.Model:
    """A small U-Net for images of any size: a class for every pixel."""
    inputs = layers.Input((None, None, 3), name="image")
    wide = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    deep = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D()(wide))
    up = layers.Conv2DTranspose(8, 2, strides=2)(deep)
    joined = layers.Concatenate()([wide, up])
    return tf_keras.Model(inputs, layers.Conv2D(3, 1, activation=activation)(joined))


def regression_model() -> tf_keras.Model:
    """Two inputs of other ranks, two outputs."""
    first, second = layers.Input((8,), name="first"), layers.Input((6, 4), name="second")
    moved = layers.Conv1D(4, 3, activation="relu")(second)
    joined = layers.Concatenate()([layers.Dense(8, "relu")(first), layers.Flatten()(moved)])
    outputs = [
        layers.Dense(2, name="size")(joined),
        layers.Dense(3, "softmax", name="kind")(joined),
    ]
    return tf_keras.Model([first, second], outputs)


def binary_model() -> tf_keras.Model:
    inputs = layers.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, activation="relu")(inputs)
    return tf_keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.Flatten()(x)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    tf_keras.utils.set_random_seed(0)
    segmentation_model().save(folder / "segmentation.keras")
    regression_model().save(folder / "regression.keras")
    binary_model().save(folder / "binary.keras")
    images = rng.random((40, 8, 8, 3), np.float32)
    np.savez(folder / "segmentation.npz", x=images, y=images.argmax(-1).astype(np.uint8))
    np.savez(folder / "bytes.npz", x=(images * 255).astype(np.uint8))
    first = rng.normal(size=(40, 8)).astype(np.float32)
    second = rng.normal(size=(40, 6, 4)).astype(np.float32)
    np.savez(folder / "inputs.npz", first=first, second=second)
    kinds = (first[:, 0] > 0).astype(int) + (first[:, 1] > 0)
    np.savez(folder / "regression.npz", first=first, second=second, size=first[:, :2], kind=kinds)
    return folder


def run(files, tmp_path, model: str, data: str, **fields):
    job = QuantizeJob(
        **{"qat_epochs": 2, "batch_size": 8, "recipe": Recipe.from_name("w8a8")} | fields,
        model_path=str(files / model),
        calibration_data=str(files / data),
        output_dir=tmp_path / "run",
    )
    report = existing.run(job)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["layers"]
    assert report["integers_match"] and report["tflite"]["float_operators"] == []
    return report


@pytest.mark.parametrize(
    "given, gently", (({"qat_learning_rate": None}, True), ({"qat_learning_rate": 0.5}, False))
)
def test_a_model_that_exists_is_trained_gently_unless_told(given, gently, tmp_path):
    fields = {"recipe": Recipe.from_name("w8a8"), "output_dir": tmp_path, "model_path": "a.keras"}
    settings = QuantizeJob(**fields, **given).qat_settings()
    assert settings.learning_rate == (
        recommended("w8a8", converged=True).learning_rate if gently else 0.5
    )


@pytest.mark.slow
def test_segmentation_on_images_of_the_datas_size(files, tmp_path):
    report = run(files, tmp_path, "segmentation.keras", "segmentation.npz")
    assert report["num_eval_examples"] == 8
    assert report["accuracy"] == {"float": None, "qat": None, "tflite": None}
    assert report["loss"]["qat"] < report["loss"]["float"], "training did not lower the loss"
    assert report["loss"]["tflite"] == pytest.approx(report["loss"]["qat"], rel=0.02)
    assert tuple(Runner(tmp_path / "run" / "model.tflite").inputs[0]["shape"]) == (1, 8, 8, 3)


@pytest.mark.slow
def test_the_reported_loss_is_that_of_the_held_out_part(files, tmp_path):
    report = run(files, tmp_path, "segmentation.keras", "segmentation.npz", qat_epochs=0)
    with np.load(files / "segmentation.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    held_out = np.random.default_rng(0).permutation(40)[:8]
    outputs = tf_keras.models.load_model(files / "segmentation.keras")(x[held_out]).numpy()
    chosen = np.take_along_axis(outputs, y[held_out][..., None].astype(int), -1)
    assert report["loss"]["float"] == pytest.approx(-np.log(chosen).mean(), rel=1e-4)


@pytest.mark.slow
def test_two_inputs_two_outputs_two_losses(files, tmp_path):
    losses = ("mean_squared_error", "sparse_categorical_crossentropy")
    report = run(files, tmp_path, "regression.keras", "regression.npz", loss=losses)
    assert report["loss"]["tflite"] == pytest.approx(report["loss"]["qat"], rel=0.02)


@pytest.mark.parametrize("as_dictionary", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_classifier_of_several_inputs(as_dictionary, files, tmp_path):
    first, second = layers.Input((8,), name="first"), layers.Input((6, 4), name="second")
    joined = layers.Concatenate()([layers.Dense(8, "relu")(first), layers.Flatten()(second)])
    inputs = {"second": second, "first": first} if as_dictionary else [first, second]
    model = tf_keras.Model(inputs, layers.Dense(3, "softmax", name="kind")(joined))
    model.save(tmp_path / "model.keras")
    with np.load(files / "regression.npz") as data:
        arrays = {"first": data["first"], "second": data["second"], "y": data["kind"]}
    np.savez(tmp_path / "data.npz", **arrays)
    report = run(tmp_path, tmp_path, "model.keras", "data.npz", qat_epochs=0)
    held_out = np.random.default_rng(0).permutation(40)[:8]
    labels = arrays.pop("y")[held_out]
    picked = model({name: x[held_out] for name, x in arrays.items()}).numpy().argmax(-1)
    expected = (picked == labels).mean()
    assert report["accuracy"]["float"] == pytest.approx(expected)


def vectors(folder, target):
    """A network of four numbers for an image, and its data; target: a function of the images."""
    inputs = layers.Input((8, 8, 3))
    outputs = layers.Dense(4)(layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(inputs)))
    tf_keras.Model(inputs, outputs).save(folder / "vectors.keras")
    images = np.random.default_rng(0).random((40, 8, 8, 3), np.float32)
    y = {} if target is None else {"y": target(images)}
    np.savez(folder / "vectors.npz", x=images, **y)


def test_four_numbers_are_no_classes(tmp_path):
    vectors(tmp_path, lambda images: images.mean((1, 2))[:, [0, 1, 2, 0]])
    names = ("vectors.keras", "vectors.npz")
    report = run(tmp_path, tmp_path, *names, qat_epochs=1, loss=("mean_squared_error",))
    assert report["agreement"] is None and set(report["accuracy"].values()) == {None}
    assert "; same class" not in summary(report)


def test_one_hot_targets_are_classes(tmp_path):
    vectors(tmp_path, lambda images: np.eye(4)[np.arange(len(images)) % 4])
    names = ("vectors.keras", "vectors.npz")
    losses = ("categorical_crossentropy",)
    report = run(tmp_path, tmp_path, *names, qat_epochs=0, loss=losses)
    held_out = np.random.default_rng(0).permutation(40)[:8]
    with np.load(tmp_path / "vectors.npz") as data:
        picked = tf_keras.models.load_model(tmp_path / "vectors.keras")(data["x"][held_out])
        expected = (picked.numpy().argmax(-1) == data["y"][held_out].argmax(-1)).mean()
    assert report["accuracy"]["float"] == pytest.approx(expected)
    assert report["loss"]["qat"] > 0


def test_what_the_float_model_gives_is_no_target_to_judge_by(tmp_path):
    vectors(tmp_path, None)
    report = run(tmp_path, tmp_path, "vectors.keras", "vectors.npz", qat_epochs=1)
    assert report["agreement"] is not None and report["accuracy"]["tflite"] is None
    assert report["loss"]["tflite"] > 0


@pytest.mark.slow
def test_without_targets_it_is_calibrated_alone(files, tmp_path):
    report = run(files, tmp_path, "regression.keras", "inputs.npz", qat_epochs=None)
    assert "loss" not in report and report["output_snr_db"] > 30
    assert not list((tmp_path / "run").glob("tensorboard/*/*"))


@pytest.mark.slow
def test_without_targets_it_learns_what_the_float_model_gives(files, tmp_path):
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(400, 8)), rng.normal(size=(400, 6, 4))
    np.savez(files / "more.npz", first=first, second=second)
    names, recipe = ("regression.keras", "more.npz"), small_models.everywhere("w2a8")
    distance = []
    for rate in (1e-9, 3e-3):
        folder, fields = tmp_path / str(rate), {"recipe": recipe, "qat_learning_rate": rate}
        loss = run(files, folder, *names, **fields, qat_epochs=1)["loss"]
        distance.append(loss["qat"] - loss["float"])
    # Measured: 0.73 to 0.75 after 1, 3 and 15 epochs; 1 if nothing is learned.
    assert 0 < distance[1] < 0.85 * distance[0]


def test_bytes_in_the_file_are_bytes_in_the_model(files, tmp_path):
    run(files, tmp_path, "segmentation.keras", "bytes.npz", qat_epochs=0, io="uint8")
    (detail,) = Runner(tmp_path / "run" / "model.tflite").inputs
    assert detail["dtype"] == np.uint8 and detail["quantization"] == (1.0, 0)


def labels_as(kind, path):
    """An untrained classifier of vectors, and labels; what it learns must be classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    classes, activation = (3, "softmax") if kind.startswith("three") else (1, "sigmoid")
    inputs = layers.Input((6,))
    tf_keras.Model(inputs, layers.Dense(classes, activation)(inputs)).save(path / "m.keras")
    y = {
        "three, float": rng.integers(0, 3, 40).astype(np.float32),
        "three, column": rng.integers(0, 3, (40, 1)).astype(np.float64),
        "two": rng.integers(0, 2, 40),
        "two, bool": rng.integers(0, 2, 40) > 0,
        "two, column": rng.integers(0, 2, (40, 1)).astype(np.float32),
    }[kind]
    np.savez(path / "d.npz", x=x, y=y)


@pytest.mark.parametrize(
    "kind", ["three, float", "three, column", "two", "two, bool", "two, column"]
)
def test_labels_come_in_many_types(kind, tmp_path):
    labels_as(kind, tmp_path)
    report = run(tmp_path, tmp_path, "m.keras", "d.npz", qat_epochs=1)
    if kind.startswith("three"):
        assert report["accuracy"]["tflite"] is not None
    else:
        assert report["loss"]["tflite"] == pytest.approx(report["loss"]["qat"], rel=0.05)


def test_targets_beyond_a_probability_are_refused(tmp_path):
    labels_as("two", tmp_path)
    np.savez(tmp_path / "d.npz", x=np.zeros((9, 6)), y=np.full(9, 255))
    with pytest.raises(QatError, match="binary_crossentropy.* targets of 0 to 1; got 255"):
        run(tmp_path, tmp_path, "m.keras", "d.npz", loss=("binary_crossentropy",))


def test_losses_of_saturated_outputs_are_of_the_numbers(tmp_path):
    """Float model, quantized model and file by one rule: Keras clips a probability at 1e-7."""
    inputs = layers.Input((2,))
    model = tf_keras.Model(inputs, layers.Dense(1, "sigmoid")(inputs))
    model.layers[-1].set_weights([np.full((2, 1), 40.0), np.zeros(1)])
    model.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).uniform(0.9, 1, (40, 2)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(40, int))
    report = run(tmp_path, tmp_path, "m.keras", "d.npz", qat_epochs=0)
    # 1 in float32 is clipped to 1 - 1.2e-7, and 1e-7 is added; 255/256 is the grid's largest.
    assert report["loss"]["float"] == pytest.approx(-np.log(2.2e-7), rel=0.01)
    for name in ("qat", "tflite"):
        assert report["loss"][name] == pytest.approx(np.log(256), rel=0.01)


@pytest.mark.parametrize("changed", ["m.keras", "d.npz"])
def test_a_resumed_run_sees_that_a_file_has_changed(changed, tmp_path):
    labels_as("two", tmp_path)
    run(tmp_path, tmp_path, "m.keras", "d.npz", qat_epochs=1)
    run(tmp_path, tmp_path, "m.keras", "d.npz", qat_epochs=1, resume=True)
    kept = {name: (tmp_path / name).read_bytes() for name in ("m.keras", "d.npz")}
    labels_as("two, column", tmp_path)
    for name in kept.keys() - {changed}:
        (tmp_path / name).write_bytes(kept[name])
    if changed == "m.keras":
        model = tf_keras.models.load_model(tmp_path / changed)
        model.layers[-1].set_weights([np.ones((6, 1)), np.zeros(1)])
        model.save(tmp_path / changed)
    with pytest.raises(QatError, match="SHA-256.*use the same flags"):
        run(tmp_path, tmp_path, "m.keras", "d.npz", qat_epochs=1, resume=True)


def test_targets_without_a_loss_are_refused_before_anything_is_written(files, tmp_path):
    with pytest.raises(QatError, match="say what to learn, e.g. --loss=mean_squared_error"):
        run(files, tmp_path, "regression.keras", "regression.npz")
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_for_classes(files, tmp_path):
    with pytest.raises(QatError, match="--distill teaches"):
        run(files, tmp_path, "segmentation.keras", "segmentation.npz", distill=True)


def test_images_are_moved_as_the_job_says(tmp_path):
    layers = [tf_keras.layers.Flatten(input_shape=(6, 6, 1)), tf_keras.layers.Dense(10, "softmax")]
    tf_keras.Sequential(layers).save(tmp_path / "model.keras")
    job = QuantizeJob(
        model_path=str(tmp_path / "model.keras"),
        dataset="digits",
        recipe=Recipe.from_name("w8a8"),
        output_dir=tmp_path / "run",
        augment_shift=0,
        augment_flip=True,
    )
    moved = existing.QuantizeRun(job).data.images.augmentation
    assert moved == existing.qat_data.Augmentation(shift=0, flip=True)


@pytest.mark.slow
def test_images_of_a_dataset_for_two_classes(files, tmp_path, monkeypatch):
    """A sigmoid's one output, grey images for three channels, another size and range."""
    images = existing.qat_data.load("digits", batch_size=64, image_size=6)
    spec = existing.qat_data.DatasetSpec(
        name="two", image_shape=(6, 6, 1), class_names=("0", "1"), splits={}, num_examples={}
    )
    two = existing.ModelImages(
        existing.dataclasses.replace(images, spec=spec),
        tf_keras.models.load_model(files / "binary.keras"),
        (-1.0, 1.0),
    )
    x, y = next(iter(two.test))
    assert x.shape[1:] == (6, 6, 3) and y.shape[1:] == (1,) and y.dtype == tf.float32
    assert float(tf.reduce_min(x)) == -1.0 and float(tf.reduce_max(x)) <= 1.0
    assert [output.name for output in two.objective.outputs] == ["binary_crossentropy"]
    with pytest.raises(QatError, match="needs a number for each class"):
        existing.dataclasses.replace(two, loss=("sparse_categorical_crossentropy",))
