from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tf_keras

import models
import qat
from qat import pipeline, strict, train
from qat import recommended as recommended_module
from qat.augmentation import Augmentation
from qat.errors import QatError, UserError
from qat.pipeline import Job
from qat.recipe import Recipe
from qat.saving import load_recipe_of
from qat.settings import TrainSettings, default_epochs, recommended
from qat.tflite_file import read_file
from qat.verify import interpreter

layers = tf_keras.layers
SHAPE, CLASSES = (20, 24, 3), 5
OUTPUTS = {
    "float_model.keras",
    "qat_model.keras",
    "model.tflite",
    "recipe.json",
    "run.json",
    "report.json",
    "report.md",
    "differences.png",
    "bytes.png",
    "tensorboard",
}


class TestTints(tfds.core.GeneratorBasedBuilder):
    """Noisy colour images of five classes, told apart by their mean colour."""

    __test__ = False  # not a test, whatever pytest thinks of the name
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("apple", "brick", "cloud", "daisy", "earth")
        features = {
            "photo": tfds.features.Image(shape=SHAPE, encoding_format="png"),
            "thing": tfds.features.ClassLabel(names=names),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("photo", "thing"),
        )

    def _split_generators(self, dl_manager) -> dict:
        return {
            "train": self._generate_examples(range(80)),
            "test": self._generate_examples(range(80, 120)),
        }

    def _generate_examples(self, numbers: range):
        tints = np.array(
            [[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60], [90, 90, 90]]
        )
        for number in numbers:
            noise = np.random.default_rng(number).integers(-50, 51, SHAPE)
            label = number % CLASSES
            photo = np.clip(tints[label] + noise, 0, 255).astype(np.uint8)
            yield number, {"photo": photo, "thing": label}


@pytest.fixture(scope="module")
def tints(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    """In the place of cnn5: what is tested is the way, not the network."""

    def build(name: str, input_shape: tuple, num_classes: int) -> tf_keras.Model:
        image = x = layers.Input(input_shape, name="image")
        x = layers.Rescaling(1 / 255, name="rescale")(x)
        for index, strides in ((1, 2), (2, 1)):
            x = layers.Conv2D(8, 3, strides=strides, use_bias=False, name=f"conv{index}")(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"bn{index}")(x)
            x = layers.ReLU(name=f"relu{index}")(x)
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        return tf_keras.Model(image, layers.Dense(num_classes, name="logits")(x), name=name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", build)
        # The first run of each file in another process: the files made here are sound.
        patch.setattr(interpreter, "_objection", lambda content, resolver: None)
        yield


def job(tints: str, folder: pathlib.Path, recipe: str = "w8a8", **options) -> Job:
    defaults = {"float_epochs": 1, "qat_epochs": 1, "batch_size": 16, "model": "cnn5"}
    return Job(
        dataset="test_tints",
        recipe=Recipe.from_name(recipe),
        output_dir=folder,
        data_dir=tints,
        **(defaults | options),
    )


@pytest.fixture(scope="module", params=("w8a8", pytest.param("w1a1", marks=pytest.mark.slow)))
def run(request, tints, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A whole run: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("runs") / "below" / request.param
    return folder, pipeline.run(job(tints, folder, request.param, seed=3))


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def report_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "report.json").read_text())


# ---------------------------------------------------------------- a whole run


SCHEMA = {
    "schema_version": int,
    "recipe": str,
    "model": str,
    "dataset": str,
    "seed": int,
    "num_eval_examples": int,
    "accuracy": {"float": float, "qat": float, "tflite": float},
    "agreement": float,
    "output_snr_db": (float, type(None)),
    "integers_match": bool,
    "max_output_difference_lsb": int,
    "tflite": {
        "path": str,
        "bytes": int,
        "float_model_bytes": int,
        "weight_bytes": int,
        "float_weight_bytes": int,
        "operators": dict,
        "float_operators": list,
        "target": str,
        "arena_bytes": type(None),
        "notes": dict,
        "io": str,
        "weight_storage": str,
        "weights": list,
        "bytes_by_layer": dict,
        "latency": {"machine": str, "interpreter": str, "measurements": list},
        "storages": {"size": dict, "speed": dict},
    },
    "mismatches": list,
    "comparison": list,
    "comparison_examples": int,
    "output_comparison": dict,
    "first_departure": dict,
    "beyond_rounding": dict,
    "not_compared": dict,
    "qat_settings": dict,
    "layers": list,
    "seconds": {"float_training": float, "qat_training": float, "export": float, "verify": float},
}
LAYER = {
    "name": str,
    "type": str,
    "weight_bits": (int, type(None)),
    "activation_bits": (int, type(None)),
    "method": str,
    "reason_if_float": (str, type(None)),
}


def assert_follows(content: dict, schema: dict, where: str = "report") -> None:
    for key, kind in schema.items():
        assert key in content, f"{where} has no {key}"
        if isinstance(kind, dict):
            assert_follows(content[key], kind, key)
        else:
            assert isinstance(content[key], kind), f"{where}[{key}] = {content[key]!r}"
            assert kind is not int or type(content[key]) is int, f"{where}[{key}] is a bool"


def test_the_report_follows_its_schema(run):
    report = report_of(run[0])
    assert_follows(report, SCHEMA)
    for row in report["layers"]:
        assert_follows(row, LAYER, row["name"])
    assert all(type(count) is int for count in report["tflite"]["operators"].values())


def test_the_report_says_what_ran(run):
    folder, report = run[0], report_of(run[0])
    assert (report["schema_version"], report["recipe"]) == (1, folder.name)
    assert (report["model"], report["dataset"]) == ("cnn5", "test_tints/1.0.0")
    assert (report["seed"], report["num_eval_examples"]) == (3, 40)
    assert report["integers_match"] is True and report["tflite"]["float_operators"] == []
    assert all(0 <= value <= 1 for value in report["accuracy"].values())
    assert report["seconds"]["float_training"] > 0 and report["seconds"]["qat_training"] > 0
    assert report["qat_settings"] == recommended(folder.name).to_dict()
    parameters = models.build("cnn5", SHAPE, CLASSES).count_params()
    assert report["tflite"]["float_model_bytes"] == 4 * parameters


def test_the_report_has_evidence_that_a_release_can_hang_on(run):
    """Every pair is compared on every layer, and the figures go with the files made here."""
    folder, report = run[0], report_of(run[0])
    assert report["not_compared"] == {} and report["comparison_examples"] == 40
    assert report["mismatches"] == []
    layers = {row["layer"] for row in report["comparison"]}
    assert {"conv1", "conv2", "pool", "logits"} <= layers
    assert report["first_departure"]["reference_simulator"] is None
    tflite = report["tflite"]
    assert sum(row["bytes"] for row in tflite["weights"]) == tflite["weight_bytes"]
    assert sum(tflite["bytes_by_layer"].values()) == tflite["weight_bytes"]
    model = qat.load_quantized_model(folder / "qat_model.keras")
    for storage, figures in tflite["storages"].items():
        path = folder.parent / f"{folder.name}_{storage}.tflite"
        qat.export_tflite(model, path, weight_storage=storage)
        assert figures["bytes"] == path.stat().st_size
        assert figures["weight_bytes"] == read_file(path).weight_bytes()
        for latency in (*figures["latency"], *tflite["latency"]["measurements"]):
            low, high = latency["quartile_seconds"]
            assert 0 < low <= latency["median_seconds"] <= high < 1
    assert {latency["threads"] for latency in tflite["latency"]["measurements"]} >= {1}
    strict.require_strict(report)


def test_the_layers_are_those_of_the_float_model(run):
    model = models.build("cnn5", SHAPE, CLASSES)
    rows = {row["name"]: row for row in report_of(run[0])["layers"]}
    expected = {la.name: type(la).__name__ for la in model.layers}
    del expected["image"]
    assert {name: row["type"] for name, row in rows.items()} == expected
    inner = (8, 8) if run[0].name == "w8a8" else (1, 1)
    for name, bits in (("conv1", (8, 8)), ("conv2", inner), ("logits", (8, 8))):
        assert (rows[name]["weight_bits"], rows[name]["activation_bits"]) == bits


def test_run_returns_what_it_wrote(run):
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    written = report_of(run[0])
    del written["schema_version"]
    returned = {key: value for key, value in run[1].items() if key != "schema_version"}
    assert finite(returned) == written


def test_the_folder_holds_all_outputs_and_no_checkpoints(run):
    assert names(run[0]) == OUTPUTS
    events = {path.parent.parent.name for path in run[0].rglob("events.out.tfevents.*")}
    assert events == {"float", "qat"}


def test_the_outputs_are_one_model(run):
    folder, report = run[0], report_of(run[0])
    assert Recipe.from_json((folder / "recipe.json").read_text()) == Recipe.from_name(folder.name)
    file = read_file(folder / "model.tflite")
    assert file.inputs[0].shape == (1, *SHAPE) and file.outputs[0].shape == (1, CLASSES)
    assert report["tflite"]["bytes"] == (folder / "model.tflite").stat().st_size
    assert report["tflite"]["operators"] == file.operator_counts()
    model = qat.load_quantized_model(folder / "qat_model.keras")
    qat.export_tflite(model, folder.parent / "again.tflite")
    assert (folder.parent / "again.tflite").read_bytes() == (folder / "model.tflite").read_bytes()
    float_model = tf_keras.models.load_model(folder / "float_model.keras", compile=False)
    assert float_model.output_shape == (None, CLASSES)


# ---------------------------------------------------------------- other ways through


@pytest.fixture(scope="module")
def calibrated(tints, tmp_path_factory) -> pathlib.Path:
    """A run without any training."""
    folder = tmp_path_factory.mktemp("calibrated")
    pipeline.run(job(tints, folder, float_epochs=0, qat_epochs=0, io="uint8"))
    return folder


def test_no_epoch_is_calibration_alone(calibrated):
    report = report_of(calibrated)
    assert report["integers_match"] and report["tflite"]["io"] == "uint8"
    file = read_file(calibrated / "model.tflite")
    assert (file.inputs[0].dtype, file.outputs[0].dtype) == ("uint8", "uint8")
    # No step was taken: the kernels are still those of the float model.
    float_model = tf_keras.models.load_model(calibrated / "float_model.keras", compile=False)
    quantized = qat.load_quantized_model(calibrated / "qat_model.keras")
    kernels = [v.numpy() for v in quantized.weights if v.name.endswith("kernel:0")]
    for name, kernel in zip(("conv1", "conv2", "logits"), kernels, strict=True):
        np.testing.assert_array_equal(kernel, float_model.get_layer(name).kernel)


def test_a_given_float_model_is_taken_as_it_is_and_an_old_run_removed(calibrated, tints, tmp_path):
    for name in (*OUTPUTS - {"tensorboard"}, "notes.txt"):
        (tmp_path / name).write_text("old")
    for name in ("checkpoints/float", "tensorboard/qat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "old").touch()
    given = str(calibrated / "float_model.keras")
    options = {"float_model": given, "model": "ignored", "qat_epochs": 0}
    pipeline.run(job(tints, tmp_path, **options))
    assert not list(tmp_path.rglob("old"))
    # The user's own files stay; the float model was given, so there is none of this run.
    assert names(tmp_path) - {"tensorboard"} == OUTPUTS - {"tensorboard", "float_model.keras"} | {
        "notes.txt"
    }
    report = report_of(tmp_path)
    assert report["model"] == given and report["seconds"]["float_training"] == 0
    assert report["accuracy"]["float"] == report_of(calibrated)["accuracy"]["float"]


# ---------------------------------------------------------------- settings


class Enough(Exception):
    pass


@pytest.fixture
def configs(monkeypatch) -> dict[str, train.TrainConfig]:
    """{phase: config} of the trainings that a run asks for; none takes place."""
    found = {}

    def fit(model, data, config):
        phase = config.checkpoint_dir.name
        found[phase] = config
        if phase == "qat":
            raise Enough
        return 0

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(recommended_module, "calibrate", lambda *given, **more: None)
    return found


def asked(tints, folder, configs, recipe, **options) -> train.TrainConfig:
    """The config of the quantized training of a run."""
    with pytest.raises(Enough):
        pipeline.run(job(tints, folder, recipe, **options))
    return configs["qat"]


def test_a_recipe_is_trained_with_its_settings(tints, tmp_path, configs):
    config, best = asked(tints, tmp_path, configs, "w2a2", qat_epochs=None), recommended("w2a2")
    assert best.distill and config.teacher.name == "cnn5"
    assert config.epochs == best.epochs_factor * default_epochs(4, quantized=True)
    for name in ("learning_rate", "weight_decay", "distill_weight", "dampening"):
        assert getattr(config, name) == getattr(best, name), name
    assert config.reestimate_batch_norm == best.reestimate_batch_norm > 0
    assert configs["float"].teacher is None and configs["float"].learning_rate == 1e-3


def test_a_job_chooses_how_images_are_moved(tints, tmp_path):
    own = {"augment_shift": 1, "augment_flip": True}
    moved, default = (pipeline.TrainRun(job(tints, tmp_path, **given)) for given in (own, {}))
    assert moved.data.augmentation == Augmentation(shift=1, flip=True)
    shape, names = default.data.spec.image_shape, default.data.spec.class_names
    assert default.data.augmentation == Augmentation.for_image(shape, names)
    assert default.data.augmentation != moved.data.augmentation


def test_a_float_model_that_is_given_counts_as_converged():
    given = job("", pathlib.Path("unused"), float_model="my.keras").qat_settings()
    assert given == recommended("w8a8", converged=True) != recommended("w8a8")
    assert job("", pathlib.Path("unused")).qat_settings() == recommended("w8a8")


@pytest.mark.slow
def test_flags_override_the_settings(tints, tmp_path, configs):
    options = {"qat_learning_rate": 0.125, "qat_epochs": 7, "distill": False}
    config = asked(tints, tmp_path, configs, "w2a2", **options)
    assert (config.learning_rate, config.epochs, config.teacher) == (0.125, 7, None)
    assert asked(tints, tmp_path, configs, "w8a8", distill=True).teacher is not None


@pytest.mark.slow
def test_a_job_may_bring_its_own_settings(tints, tmp_path, configs):
    own = TrainSettings(learning_rate=0.25, warmup=0.5, gradual_bits=((8, 0.5),))
    config = asked(tints, tmp_path, configs, "w4a4", settings=own, qat_epochs=2)
    assert (config.learning_rate, config.warmup_steps) == (0.25, 4)
    assert config.gradual_bits == ((8, 0.5),) and config.dampening == 0.0


# ---------------------------------------------------------------- going on


class CutOff(Exception):
    pass


def cut_off_in(phase: str, monkeypatch, at_step: int) -> None:
    """Makes the training of a phase end like a machine that is switched off after some steps."""
    fit = train.fit

    class Cut(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == at_step:
                raise CutOff

    def cut(model, data, config):
        callbacks = [Cut()] if config.checkpoint_dir.name == phase else []
        return fit(model, data, config, callbacks=callbacks)

    monkeypatch.setattr(train, "fit", cut)


def weights_of(folder: pathlib.Path) -> list[np.ndarray]:
    return qat.load_quantized_model(folder / "qat_model.keras").get_weights()


@pytest.mark.slow
@pytest.mark.parametrize("run", ["w8a8"], indirect=True)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(run, tints, tmp_path, monkeypatch):
    same = job(tints, tmp_path, seed=3, checkpoint_steps=3)
    with monkeypatch.context() as patch:
        cut_off_in("qat", patch, at_step=4)
        with pytest.raises(CutOff):
            pipeline.run(same)
    assert names(tmp_path) == {
        *("float_model.keras", "checkpoints", "tensorboard", "recipe.json", "run.json")
    }

    monkeypatch.setattr(models, "build", None)  # the float model is there already
    pipeline.run(dataclasses.replace(same, resume=True))
    assert report_of(tmp_path)["resumed_at_step"] == 3
    assert names(tmp_path) == OUTPUTS
    for left, right in zip(weights_of(run[0]), weights_of(tmp_path), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (tmp_path / "model.tflite").read_bytes() == (run[0] / "model.tflite").read_bytes()


@pytest.mark.slow
def test_resuming_a_finished_run_trains_nothing_and_gives_the_same_file(
    calibrated, tints, monkeypatch
):
    before = (calibrated / "model.tflite").read_bytes()
    monkeypatch.setattr(train, "fit", None)
    again = job(tints, calibrated, float_epochs=0, qat_epochs=0, io="uint8", resume=True)
    pipeline.run(again)
    assert (calibrated / "model.tflite").read_bytes() == before


@pytest.mark.parametrize("changed", ({"seed": 1}, {"learning_rate": 0.5}))
def test_resuming_a_finished_run_with_another_flag_is_refused(changed, calibrated, tints):
    asked = job(tints, calibrated, **changed, float_epochs=0, qat_epochs=0, resume=True)
    (name,) = changed
    with pytest.raises(UserError, match=f"--resume: .* was started with --{name}="):
        pipeline.run(asked)


@pytest.mark.parametrize("name", ("float_model.keras", "tensorboard/mine.keras"))
def test_a_model_in_the_way_of_a_runs_files_is_refused_and_stays(name, tints, tmp_path):
    given = tmp_path / "out" / name
    given.parent.mkdir(parents=True)
    given.write_text("a model")
    asked = job(tints, tmp_path / "out", float_model=f"{tmp_path}/./out/{name}")
    with pytest.raises(UserError, match="--float_model=.* is a file that a run with --output_dir"):
        pipeline.run(asked)
    assert given.read_text() == "a model"


@pytest.mark.parametrize("changed", ({"recipe": "w4a8"}, {"model": "lenet"}))
def test_resuming_with_another_recipe_or_model_is_refused_or_heeded(changed, calibrated, tints):
    """Never a report that says one thing over a file that is another."""
    asked = job(tints, calibrated, **changed, float_epochs=0, qat_epochs=0, resume=True)
    try:
        pipeline.run(asked)
    except QatError as error:
        assert "--resume" in str(error) or "resume" in str(error)
        return
    report = report_of(calibrated)
    model = qat.load_quantized_model(calibrated / "qat_model.keras")
    assert (report["recipe"], report["model"]) == (asked.recipe.name, asked.model)
    assert load_recipe_of(calibrated / "qat_model.keras") == asked.recipe
    assert model.name == asked.model


# ---------------------------------------------------------------- failing


@pytest.mark.parametrize(
    "options",
    (
        {"model": "alexnet"},
        {"float_model": "gone.keras"},
        {"dataset": "test_tintz"},
    ),
)
def test_a_run_that_fails_early_leaves_no_folder(options, tints, tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(QatError) as error:
        pipeline.run(dataclasses.replace(job(tints, folder), **options))
    assert "\n" not in str(error.value)
    assert not folder.exists()


def test_a_run_that_fails_early_leaves_an_old_folder_as_it_was(tints, tmp_path):
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(QatError):
        pipeline.run(dataclasses.replace(job(tints, tmp_path), dataset="test_tintz"))
    assert (tmp_path / "report.json").read_text() == "old"


def test_a_recipe_that_does_not_fit_is_found_before_any_training(tints, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *given, **more: pytest.fail("it trains"))
    wrong = qat.Rule(layer="conv9", weights=qat.TensorSpec(bits=4))
    recipe = Recipe.from_name("w8a8").with_rules(wrong)
    with pytest.raises(QatError, match="conv9"):
        pipeline.run(dataclasses.replace(job(tints, tmp_path / "new"), recipe=recipe))
    assert not (tmp_path / "new").exists()
