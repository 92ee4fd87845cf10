"""The accuracy benchmark: its plan, its folder, its means, its peers, and the program itself."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras

import models
import qat
from qat import data as qat_data
from qat.benchmark import accuracy, measure, networks, peers, plot, table, tfmot
from qat.benchmark.candidate import Candidate
from qat.benchmark.plan import FROM_CHECKPOINT, SAME_EPOCHS, Plan, Run, Terms, runs
from qat.benchmark.store import Store
from qat.errors import QatError, UserError
from qat.recipe import Recipe
from qat.settings import RECOMMENDED, recommended
from qat.train import TrainingError
from qat.verify.interpreter import Runner

layers = tf_keras.layers
TESTS = pathlib.Path(__file__).resolve().parent
PROJECT = TESTS.parent
TERMS = Terms(
    dataset="digits",
    model="lenet",
    float_epochs=0,
    batch_size=64,
    learning_rate=1e-3,
    qat_learning_rate=3e-4,
)


def plan(folder="unused", **fields) -> Plan:
    given = {"terms": TERMS, "recipes": ("w8a8", "w4a8"), "epochs": 0, **fields}
    return Plan(output_dir=pathlib.Path(folder), **given)


def one_run(**fields) -> Run:
    given = {"seed": 0, "method": "w4a4", "source": "qat", "recipe": "w4a4", "epochs": 3}
    return Run(**{**given, **fields})


# ---------------------------------------------------------------- candidates


def test_overrides_change_the_recommended_settings():
    text = "w2a2-lsq:distill=false;learning_rate=1e-2;freeze_ranges=None;warmup=0"
    found = Candidate.parse(f"{text};gradual_bits=[[8,0.2],[4,1]]").settings()
    assert found == dataclasses.replace(
        recommended("w2a2-lsq"),
        distill=False,
        learning_rate=0.01,
        freeze_ranges=None,
        warmup=0,
        gradual_bits=((8, 0.2), (4, 1)),
    )
    assert Candidate.parse("w4a4").settings() == recommended("w4a4")


@pytest.mark.parametrize(
    "text, named",
    {
        "w2a2:distill": "'distill' setting=value",
        "w2a2:=1": "'=1' setting=value",
        "w2a2:speed=1": "'speed' epochs learning_rate distill",
        "w2a2:distill=1": "distill bool '1'",
        "w2a2:learning_rate=fast": "learning_rate float 'fast'",
        "w2a2:reestimate_batch_norm=1.5": "reestimate_batch_norm int '1.5'",
        "w9a2:distill=true": "w9a2",
    }.items(),
)
def test_a_wrong_override_says_what_is_right(text, named):
    with pytest.raises(QatError) as caught:
        Candidate.parse(text).settings()
    assert all(word in str(caught.value) for word in named.split()), caught.value


def test_epochs_follow_the_widths_unless_they_are_given():
    found = [Candidate.parse(text).epochs(3, 9) for text in ("w4a4", "w1a1", "w4a1", "wta8")]
    assert found == [3, 9, 9, 3]
    assert Candidate.parse("w1a1:epochs=30").epochs(3, 9) == 30
    with pytest.raises(UserError, match="epochs must be a whole number, got '1.5'"):
        Candidate.parse("w4a4:epochs=1.5").epochs(3, 9)


# ---------------------------------------------------------------- the plan


def test_each_recipe_meets_its_counterparts_after_the_same_epochs():
    recipes = ("w4a4-lsq", "w2a2:epochs=30", "w1a1")
    found = runs(plan(recipes=recipes, peers=("tfmot", "larq"), seeds=(5,), epochs=3))
    assert [(run.method, run.source, run.recipe, run.epochs) for run in found] == [
        ("float", "float", "", 0),
        (SAME_EPOCHS, "float", "", 3),
        (SAME_EPOCHS, "float", "", 9),
        (SAME_EPOCHS, "float", "", 30),
        ("w4a4-lsq", "qat", "w4a4", 3),
        ("w2a2:epochs=30", "qat", "w2a2", 30),
        ("w1a1", "qat", "w1a1", 9),
        ("tfmot-w4a4", "tfmot", "w4a4", 3),
        ("tfmot-w2a2", "tfmot", "w2a2", 30),
        ("larq-w1a1", "larq", "w1a1", 9),
        (f"larq-{FROM_CHECKPOINT}", "larq", "w1a1", 9),
    ]
    assert {run.seed for run in found} == {5}


def test_float_goes_on_at_the_rate_of_the_peers():
    terms = dataclasses.replace(plan().terms, learning_rate=0.5, qat_learning_rate=0.25)
    rates = {source: terms.learning_rate_of(source) for source in ("float", "larq", "tfmot")}
    assert rates == {"float": 0.25, "larq": 0.5, "tfmot": 0.25}


def test_a_run_is_planned_once():
    found = runs(plan(recipes=("w4a4", "w4a4-lsq", "w4a4"), peers=("tfmot",), seeds=(0, 1, 0)))
    assert len(set(found)) == len(found) == 2 * len(("float", "same", "w4a4", "lsq", "tfmot"))


def test_an_unknown_peer_is_an_error():
    with pytest.raises(UserError, match="'torch'; legal: tfmot, qkeras, larq"):
        plan(peers=("torch",))


# ---------------------------------------------------------------- the folder


def test_the_folder_keeps_results_and_forgets_failures(tmp_path):
    store = Store(tmp_path / "new", TERMS, "test")
    assert store.result(one_run()) is None and not (tmp_path / "new").exists()
    store.make()
    good, bad = one_run(), one_run(seed=10)
    for run, error in ((good, ""), (bad, "the loss became nan")):
        with store.claimed(store.path(run), wait=False) as mine:
            assert mine
            store.write(run, {"seed": run.seed, "error": error})
    assert store.result(good) == {"seed": 0, "error": ""}
    assert store.result(bad) is None, "the next call tries it again"
    assert [result["seed"] for result in store.results()] == [0, 10]
    assert Store(tmp_path / "new", TERMS, "validation").results() == []


def test_methods_have_files_of_their_own(tmp_path):
    store = Store(tmp_path, TERMS, "test")
    methods = ("w2a2", "w2a2:warmup=0", "w2a2_warmup=0", "w2a2;warmup=0", "runs/w2a2")
    paths = {store.path(one_run(method=method)) for method in methods}
    paths.add(store.path(one_run(epochs=30)))
    assert len(paths) == len(methods) + 1
    assert {path.parent for path in paths} == {tmp_path / "seed0" / "test"}


def test_runs_under_other_terms_are_refused(tmp_path):
    Store(tmp_path, TERMS, "test").make()
    with pytest.raises(UserError, match="holds runs with --batch_size=64, not 32"):
        Store(tmp_path, dataclasses.replace(TERMS, batch_size=32), "test")


def test_a_damaged_result_is_named(tmp_path):
    store = Store(tmp_path, TERMS, "test")
    with store.claimed(store.path(one_run()), wait=False):
        store.path(one_run()).write_text("{")
    with pytest.raises(UserError, match=r"w4a4\+3.json is damaged; delete it"):
        store.result(one_run())


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    """Two handles of one process exclude each other as two processes do."""
    mine, others = (Store(tmp_path, TERMS, "test") for _ in range(2))
    path = mine.path(one_run())
    with mine.claimed(path, wait=False) as first, others.claimed(path, wait=False) as second:
        assert (first, second) == (True, False)
    with others.claimed(path, wait=False) as free:
        assert free


# ---------------------------------------------------------------- means and the table


def result(method="w4a4", accuracy=0.9, **fields):
    given = {
        **dataclasses.asdict(one_run(method=method)),
        "error": "",
        "note": "",
        "accuracy": accuracy,
        "model_accuracy": accuracy,
        "measured_on": "file",
        "weight_bytes": 1000,
        "weight_bytes_in_theory": False,
        "file_bytes": 2000,
        "seconds": 10.0,
    }
    return {**given, **fields}


def same_epochs(accuracy, **fields):
    given = {"source": "float", "recipe": "", "measured_on": "keras", "weight_bytes": 4000}
    return result(SAME_EPOCHS, accuracy, **{**given, **fields})


def test_means_and_standard_errors():
    values = np.array([0.911, 0.905, 0.918])
    results = [result(accuracy=value, seed=seed) for seed, value in enumerate(values)]
    results += [result(accuracy=0.1, seed=3, error="diverged"), result(accuracy=0.2, epochs=30)]
    first, second = table.methods(results)
    assert first["seeds"] == [0, 1, 2] and second["seeds"] == [0]
    assert first["accuracy"] == pytest.approx(values.mean(), abs=1e-12)
    # s² = Σ(x - mean)² / (n - 1); the error of the mean is s / √n.
    variance = np.square(values - values.mean()).sum() / 2
    assert first["accuracy_error"] == pytest.approx(math.sqrt(variance / 3), rel=1e-12)
    assert second["accuracy_error"] is None, "one seed says nothing about its error"
    assert first["delta"] is None, "there is no F"


def test_the_difference_to_f_is_paired_by_seed_and_epochs():
    """Seeds that move both alike leave no error in the difference."""
    floats, ours = np.array([0.92, 0.90, 0.94]), np.array([0.915, 0.896, 0.934])
    results = [same_epochs(value, seed=seed) for seed, value in enumerate(floats)]
    results += [same_epochs(0.99, seed=0, epochs=9)]
    results += [result(accuracy=value, seed=seed) for seed, value in enumerate(ours)]
    results += [result(accuracy=0.5, seed=7)]  # without an F of its seed
    row = next(row for row in table.methods(results) if row["method"] == "w4a4")
    differences = ours - floats
    assert row["delta"] == pytest.approx(differences.mean(), abs=1e-12)
    assert row["delta_error"] == pytest.approx(differences.std(ddof=1) / math.sqrt(3), rel=1e-9)
    assert row["delta_error"] < row["accuracy_error"] / 10


def test_rows_go_from_wide_to_narrow_and_ours_before_peers():
    names = ("w2a2", "tfmot-w4a4", "w1a1", "w8a8", "wta8", "w4a4", "w2a8", "w4a8")
    results = [
        result(name, source=name.split("-")[0] if "-" in name else "qat", recipe=name[-4:])
        for name in names
    ]
    found = [row["method"] for row in table.methods([*results, same_epochs(0.9)])]
    ordered = ["w8a8", "w4a8", "w2a8", "wta8", "w4a4", "tfmot-w4a4", "w2a2", "w1a1"]
    assert found == [SAME_EPOCHS, *ordered]


def test_the_table_says_what_was_measured_on_what():
    results = [
        same_epochs(0.92, file_bytes=None, weight_bytes=400000, weight_bytes_in_theory=True),
        result(accuracy=0.9151, seed=0),
        result(accuracy=0.9149, seed=1, file_bytes=2100),
        result(
            "tfmot-w4a4", 0.8, source="tfmot", measured_on="keras", file_bytes=None, note="no file"
        ),
    ]
    text = table.markdown(table.methods(results), about=["on digits"], failed=["seed 5: NaN"])
    assert f"| `{SAME_EPOCHS}` | 3 | 0 | 92.00 | F | 400,000\\* | – | keras | 10 |" in text
    assert "| `w4a4` | 3 | 0, 1 | 91.50 ± 0.01 | -0.49 | 1,000 | 2,050 | file | 10 |" in text
    assert "| `tfmot-w4a4` | 3 | 0 | 80.00 | -12.00 | 1,000 | – | keras | 10 |" in text
    assert all(f"- {line}" in text for line in ("on digits", "tfmot-w4a4: no file", "seed 5: NaN"))


def test_the_plot_is_a_picture_or_nothing(monkeypatch):
    far_below = result("tfmot-w2a2", 0.2, source="tfmot", weight_bytes=600)
    rows = table.methods([same_epochs(0.92), result(seed=0), result(seed=1), far_below])
    assert plot.accuracy_png(rows, "a title").startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.accuracy_png(rows, "a title") is None


# ---------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(Keras model, file, batches (x, y)) of a small classifier of 8x8 images."""
    model = small_models.model_of(
        lambda x: layers.Dense(10)(layers.Flatten()(layers.Conv2D(4, 3, activation=None)(x))),
        (8, 8, 1),
    )
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, (1030, 8, 8, 1)).astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices((images, np.arange(1030) % 10)).batch(64)
    quantized = qat.quantize_model(model, "w8a8")
    qat.calibrate(quantized, batches, steps=2)
    path = tmp_path_factory.mktemp("file") / "model.tflite"
    return quantized, qat.export_tflite(quantized, path), batches


def test_many_interpreters_find_what_one_finds(quantized, monkeypatch):
    model, path, batches = quantized
    images = np.concatenate([x for x, _ in batches])
    monkeypatch.setattr(measure, "_cores", lambda: 31)  # the last 30 images give one no work
    expected = Runner(path, threads=1).run(images)[0].values.argmax(1)
    np.testing.assert_array_equal(measure.file_classes(path, batches), expected)
    np.testing.assert_array_equal(measure.labels_of(batches), np.arange(1030) % 10)
    found = measure.model_classes(model, batches)
    np.testing.assert_array_equal(found, model.predict(images, verbose=0).argmax(1))


def test_bytes_of_weights_in_theory():
    """lenet for 8x8 grey: kernels 5·5·6, 5·5·6·16, 64·120, 120·84, 84·10; biases of int32."""
    model = models.build("lenet", (8, 8, 1), 10)
    inner, edges = 5 * 5 * 6 * 16 + 64 * 120 + 120 * 84, 5 * 5 * 6 + 84 * 10
    biases = 4 * (6 + 16 + 120 + 84 + 10)
    found = {
        bits: measure.packed_weight_bytes(model, lambda layer, bits=bits: bits) for bits in (1, 4)
    }
    assert found[4] == (inner + edges) // 2 + biases
    assert found[1] == inner // 8 + -(-150 // 8) + 840 // 8 + biases
    of_qkeras = peers.weight_bytes(one_run(source="qkeras", recipe="wta8"), model)
    assert of_qkeras == inner // 4 + edges + biases
    of_larq = peers.weight_bytes(one_run(source="larq", recipe="w1a1"), model)
    assert of_larq == inner // 8 + 4 * edges + biases


# ---------------------------------------------------------------- peers


def test_tfmot_gets_the_same_network_without_what_it_rejects():
    model = models.build("lenet", (8, 8, 1), 10)
    bare, scale, offset = tfmot.without_rescaling(model)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(bare(pixels * scale + offset), model(pixels), rtol=1e-5, atol=1e-5)
    kinds = [type(layer) for layer in bare.layers]
    assert layers.Rescaling not in kinds
    assert kinds.count(layers.ReLU) == 2, "those behind batch normalization stay"
    assert bare.get_layer("dense1").activation is tf_keras.activations.relu
    assert model.get_layer("dense1").activation is tf_keras.activations.linear


@pytest.mark.slow
def test_tfmot_quantizes_every_kernel_at_the_width_asked_for():
    bare, *_ = tfmot.without_rescaling(models.build("lenet", (8, 8, 1), 10))
    for recipe, bits in (("w8a8", 8), ("w2a8", 2)):
        wrappers = [
            layer for layer in tfmot.quantized(bare, recipe).layers if hasattr(layer, "layer")
        ]
        found = [
            quantizer.num_bits
            for wrapper in wrappers
            for _, quantizer in wrapper.quantize_config.get_weights_and_quantizers(wrapper.layer)
        ]
        assert found == [bits] * 5


@pytest.mark.slow
def test_tfmot_is_measured_on_its_file_if_there_is_one(digits, tmp_path):
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, use_bias=False)(layers.Rescaling(1 / 255)(image))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    model = tf_keras.Model(image, layers.Dense(10)(layers.Flatten()(x)))
    found = {}
    for recipe in ("w4a8", "w4a4"):
        job = networks.Job(
            run=one_run(method=f"tfmot-{recipe}", source="tfmot", recipe=recipe, epochs=1),
            float_model=model,
            data=digits,
            images=digits.test,
            learning_rate=1e-2,
            peer_python=None,
            path=tmp_path / f"{recipe}.json",
        )
        found[recipe] = networks.outcome(job)
        assert found[recipe].num_eval_examples == 360
    file, keras = found["w4a8"], found["w4a4"]
    assert file.accuracy > 0.25, "20 steps from random weights; guessing gives 0.1"
    assert (file.measured_on, keras.measured_on) == ("file", "keras")
    assert file.agreement > networks.LEAST_AGREEMENT
    assert file.file_bytes == (tmp_path / "w4a8.tflite").stat().st_size
    packed = 3 * 3 * 4 // 2 + 6 * 6 * 4 * 10 // 2 + 4 * (4 + 10)
    assert file.weight_bytes == keras.weight_bytes == packed
    assert keras.weight_bytes_in_theory and not file.weight_bytes_in_theory
    assert "4-bit activations" in keras.note and keras.file_bytes is None


def test_peers_of_other_environments_are_asked_for_with_the_command_that_makes_one():
    peers.require_environment(("tfmot",), None)
    for python, said in (
        (None, "--peer_python is not given"),
        ("/gone/python", "/gone/python is no program"),
        (sys.executable, "has no larq"),
    ):
        with pytest.raises(UserError) as caught:
            peers.require_environment(("tfmot", "larq"), python)
        assert said in str(caught.value)
        assert "-m pip install" in str(caught.value) and "qkeras" in str(caught.value)


def test_the_peers_script_knows_nothing_of_this_project():
    nodes = list(ast.walk(ast.parse(peers.SCRIPT.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert roots == {"numpy", "tensorflow", "tf_keras", "qkeras", "larq"}


PEER = """
import json, pathlib, shutil, sys
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
if job["seed"]:
    sys.exit("no such layer")
shutil.copytree(folder, pathlib.Path(__file__).with_name("seen"))
(folder / "result.json").write_text(json.dumps({"accuracy": 0.5}))
"""


def test_a_peers_process_gets_the_very_batches_that_ours_train_on(digits, tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(peers, "SCRIPT", tmp_path / "peer.py")
    model = models.build("lenet", (8, 8, 1), 10)

    def call(seed):
        run = one_run(source="qkeras", method="qkeras-wta8", recipe="wta8", epochs=2, seed=seed)
        given = {"learning_rate": 0.1, "log": tmp_path / "peer.log"}
        return peers.run_peer(run, sys.executable, model, digits, digits.test, **given)

    assert call(seed=0) == {"accuracy": 0.5}
    seen = tmp_path / "seen"
    job = json.loads((seen / "job.json").read_text())
    assert (job["widths"], job["from_checkpoint"]) == (["t", "8"], True)
    assert (job["epochs"], job["steps_per_epoch"]) == (2, digits.steps_per_epoch)
    tf_keras.models.model_from_json(job["model"])
    batches = list(digits.train_stream().take(2 * digits.steps_per_epoch))
    images = np.fromfile(seen / "train" / "images.raw", np.uint8).reshape(-1, 8, 8, 1)
    np.testing.assert_array_equal(images, np.concatenate([x for x, _ in batches]))
    labels = np.fromfile(seen / "train" / "labels.raw", np.int32)
    np.testing.assert_array_equal(labels, np.concatenate([y for _, y in batches]))
    with pytest.raises(tfmot.PeerError, match="qkeras failed: no such layer; all of it: .*log"):
        call(seed=1)
    assert not list(tmp_path.glob(".peer.*"))


@pytest.mark.slow
@pytest.mark.parametrize("peer, recipe", (("qkeras", "w4a4"), ("qkeras", "wta8"), ("larq", "w1a1")))
def test_peers_of_another_environment_train(peer, recipe, tmp_path):
    python = os.environ.get("QAT_PEER_PYTHON")
    if python is None:
        pytest.skip("set QAT_PEER_PYTHON to a Python that has qkeras and larq")
    # Larq's kernels of ±1 have no scale of their own: batch normalization must give them one.
    model = "cnn5:width=0.5" if peer == "larq" else "lenet"
    terms = dataclasses.replace(TERMS, float_epochs=5, model=model)
    given = {"recipes": (recipe,), "peers": (peer,), "peer_python": python, "binary_epochs": 10}
    content = accuracy.run(plan(tmp_path, terms=terms, epochs=3, **given))
    found = [row for row in content["methods"] if row["source"] == peer]
    assert found and all(row["measured_on"] == "keras" for row in found)
    assert max(row["accuracy"] for row in found) > 0.5


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def digits():
    return qat_data.load("digits", batch_size=64)


@pytest.fixture
def attempts(monkeypatch, digits):
    """(seed, method) of the runs that were attempted; what takes time is left out."""
    found = []

    def outcome(job: networks.Job) -> networks.Outcome:
        found.append((job.run.seed, job.run.method))
        if job.run.method == "w4a8:warmup=0":
            raise TrainingError("the loss became nan in epoch 1; lower the learning rate")
        return networks.Outcome(
            accuracy=0.5,
            measured_on="file",
            model_accuracy=0.5,
            agreement=1.0,
            num_eval_examples=360,
            weight_bytes=1000 if job.run.recipe else 4000,
            weight_bytes_in_theory=False,
            file_bytes=2000,
            seconds=1.0,
            settings=Candidate.parse(job.run.method).trained_with() if job.run.recipe else {},
        )

    monkeypatch.setattr(networks, "outcome", outcome)
    monkeypatch.setattr(accuracy, "quantize_model", lambda *_, **__: None)
    monkeypatch.setattr(accuracy, "load_float_model", lambda *_: None)
    monkeypatch.setattr(accuracy.qat_data, "load", lambda *_, **__: digits)
    return found


def test_a_benchmark_goes_on_where_it_was_cut_off(tmp_path, attempts, monkeypatch):
    whole = plan(tmp_path, recipes=("w8a8",), seeds=(0, 1))
    finished = networks.outcome

    def interrupted(job):
        if len(attempts) == 4:
            raise KeyboardInterrupt
        return finished(job)

    monkeypatch.setattr(networks, "outcome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(whole)
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed*/*.keras")}
    assert len(checkpoints) == 2 and not (tmp_path / "accuracy.md").exists()
    monkeypatch.setattr(networks, "outcome", finished)
    content = accuracy.run(whole)
    assert len(attempts) == len(set(attempts)) == 6
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints
    rows = {row["method"]: row["seeds"] for row in content["methods"]}
    assert rows == {"float": [0, 1], SAME_EPOCHS: [0, 1], "w8a8": [0, 1]}
    accuracy.run(whole)
    assert len(attempts) == 6


def test_results_of_other_settings_are_no_results(tmp_path, attempts, monkeypatch):
    """A recipe's file was changed, or what its name stands for: seeds cannot be averaged."""
    recipe = tmp_path / "mine.json"
    recipe.write_text(Recipe.from_name("w4a8").to_json())
    whole = plan(tmp_path / "out", recipes=(str(recipe), "w8a8"))
    accuracy.run(whole)
    accuracy.run(whole)
    assert len(attempts) == 4
    recipe.write_text(Recipe.from_name("w5a8").to_json())
    with pytest.raises(UserError, match=r"mine.json of seed 0, trained with recipe .* now "):
        accuracy.run(whole)
    eight = plan(tmp_path / "out", recipes=("w8a8",), seeds=(0, 1))
    accuracy.run(eight)  # is as it was
    slower = dataclasses.replace(RECOMMENDED["8 bits"], learning_rate=1e-5)
    monkeypatch.setitem(RECOMMENDED, "8 bits", slower)
    with pytest.raises(UserError, match=r"w8a8 of seed 0, trained with learning_rate .*1e-05.*del"):
        accuracy.run(eight)


def test_what_fails_is_said_when_the_rest_is_done(tmp_path, attempts):
    with pytest.raises(UserError, match="1 of 4 runs failed, e.g. seed 0, w4a8:warmup=0.*nan"):
        accuracy.run(plan(tmp_path, recipes=("w4a8:warmup=0", "w8a8")))
    text = (tmp_path / "accuracy.md").read_text()
    assert "| `w8a8` |" in text and "the loss became nan" in text
    content = accuracy.run(plan(tmp_path, recipes=("w8a8",)))
    assert len(content["runs"]) == 4, "the failed one is another plan's"


def test_another_split_has_results_of_its_own(tmp_path, attempts):
    for split in ("validation", "test"):
        accuracy.run(plan(tmp_path, recipes=("w8a8",), split=split))
    assert len(attempts) == 6 and len(list(tmp_path.glob("seed0/*.keras"))) == 1
    content = json.loads((tmp_path / "accuracy_validation.json").read_text())
    assert {found["split"] for found in content["runs"]} == {"validation"}


# The right one goes first: it is the one that may wait for C++ libraries to say hello.
CALLS = {
    "right": (
        "--output_dir=new --model=lenet --seeds=0 --float_epochs=0 --epochs=1 --batch_size=128 "
        "--recipes=w8a8 --peers= --json=result.json",
        0,
        "lenet digits",
    ),
    "help": ("--help", 0, "--peer_python"),
    "no folder": ("", 2, "output_dir"),
    "unknown suite": ("--output_dir=new --suite=speed", 2, "suite accuracy"),
    "unknown recipe": ("--output_dir=new --recipes=w9a8", 2, "'w9a8'"),
    "unknown setting": ("--output_dir=new --recipes=w4a8:speed=1", 2, "'speed' learning_rate"),
    "unknown model": ("--output_dir=new --model=alexnet", 2, "'alexnet' cnn5"),
    "unknown dataset": ("--output_dir=new --dataset=digitz", 2, "'digitz' digits"),
    "unknown peer": ("--output_dir=new --peers=torch", 2, "'torch' qkeras"),
    "peer without Python": ("--output_dir=new --peers=larq", 2, "peer_python install"),
    "seeds": ("--output_dir=new --seeds=a,b", 2, "seeds 0,1,2"),
    "json folder missing": ("--output_dir=new --json=gone/a.json", 2, "gone/a.json"),
    "another suite's flag": ("--output_dir=new --target=tflm", 2, "--target --suite=accuracy"),
    "export, peers": ("--output_dir=new --suite=export --peers=tfmot", 2, "--peers --suite=export"),
    "export, seeds": ("--output_dir=new --suite=export --seeds=0,1", 2, "--seeds=0,1 one"),
    "export, target": ("--output_dir=new --suite=export --target=edgetpu", 2, "target litert"),
    "export, recipe": ("--output_dir=new --suite=export --recipes=w9a9", 2, "'w9a9'"),
    "export, model": ("--output_dir=new --suite=export --model=x", 2, "'x' every_operator cnn5"),
    "output_dir is a file": ("--output_dir=text.txt --recipes=", 2, "text.txt"),
}


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """What each of the calls did, run in one process."""
    folder = tmp_path_factory.mktemp("calls")
    work = folder / "work"
    work.mkdir()
    (work / "text.txt").write_text("text")
    calls = [["benchmark", *arguments.split()] for arguments, *_ in CALLS.values()]
    (folder / "calls.json").write_text(json.dumps(calls))
    own = {"PYTHONPATH": str(PROJECT), "TFDS_DATA_DIR": str(folder / "tfds")}
    subprocess.run(
        [sys.executable, TESTS / "program_calls.py", folder / "calls.json", folder / "out.json"],
        cwd=work,
        env=os.environ | own,
        check=True,
        timeout=300,
    )
    return dict(zip(CALLS, json.loads((folder / "out.json").read_text()), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_calls_end_as_they_should(name, called):
    found, (_, code, named) = called[name], CALLS[name]
    assert found["code"] == code, found["stderr"][-3000:]
    if code:
        lines = found["stderr"].splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), found["stderr"]
        assert found["changes"] == []
    missing = [word for word in named.split() if word not in found["stderr"] + found["stdout"]]
    assert not missing, f"{missing} not in: {found}"


def test_a_right_call_leaves_table_plot_and_files(called):
    changes = called["right"]["changes"]
    expected = ("accuracy.md", "accuracy.png", "seed0/float_model.keras", "terms.json")
    assert "result.json" in changes and {f"new/{name}" for name in expected} <= set(changes)
    assert [path for path in changes if path.endswith(".tflite")] == [
        "new/seed0/test/w8a8+1.tflite"
    ]
    text = called["right"]["stdout"]
    for method, measured_on in (("w8a8", "file"), (SAME_EPOCHS, "keras")):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{method}`")]
        assert f"| {measured_on} |" in row
