"""The export suite: its network, what it finds in files, its table, and all pairs of widths."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tf_keras

from qat import data as qat_data
from qat.benchmark import every_operator, export, export_table, pair
from qat.benchmark.export import ALL_PAIRS, ExportPlan
from qat.benchmark.plan import Terms
from qat.errors import UserError
from qat.recipe import WEIGHT_BITS
from qat.tflite_file import read_file

layers = tf_keras.layers
TERMS = Terms(
    dataset="digits",
    model=every_operator.NAME,
    float_epochs=0,
    batch_size=64,
    learning_rate=1e-3,
    qat_learning_rate=3e-4,
)
NARROW = ("depthwise", "pointwise", "strided", "transposed", "hidden")


def plan(folder, **fields) -> ExportPlan:
    given = {"terms": TERMS, "epochs": 0, **fields}
    return ExportPlan(output_dir=pathlib.Path(folder), **given)


def channels_of(path) -> dict[str, list[np.ndarray]]:
    """{layer: the integers of each channel of its kernel, as they lie in the file}."""
    found = {}
    for tensor in read_file(path).tensors:
        layer, _, what = tensor.name.rpartition("/")
        if what == "kernel" and tensor.data is not None:
            rows = tensor.data if layer != "depthwise" else np.moveaxis(tensor.data, -1, 0)
            found[layer] = [row.reshape(-1) for row in rows]
    return found


# ---------------------------------------------------------------- the network and the pairs


def test_the_network_has_every_kind_of_operator():
    model = every_operator.build((16, 16, 3), 7)
    kinds = {type(layer) for layer in model.layers}
    assert {
        layers.Conv2D,
        layers.DepthwiseConv2D,
        layers.Conv2DTranspose,
        layers.Dense,
        layers.Add,
        layers.Concatenate,
        layers.AveragePooling2D,
        layers.GlobalAveragePooling2D,
    } <= kinds
    assert model.output_shape == (None, 7)
    assert every_operator.build((9, 7, 1), 3).output_shape == (None, 3)


def test_all_pairs():
    assert len(set(ALL_PAIRS)) == len(ALL_PAIRS) == 9 * 9
    assert {"w1a1", "wta16", "w8a8", "w2a3"} <= set(ALL_PAIRS)


# ---------------------------------------------------------------- some pairs in earnest


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    terms = dataclasses.replace(TERMS, float_epochs=3)  # untrained, it knows one class alone
    content = export.run(plan(folder, terms=terms, recipes=("w5a16", "w4a4-pact")))
    return folder, {result["method"]: result for result in content["pairs"]}


@pytest.mark.slow
def test_a_pair_is_exported(few):
    folder, results = few
    found = results["w5a16"]
    assert (found["error"], found["refused"], found["problems"]) == ("", "", [])
    assert found["activations"] == ["int16"] and found["containers"] == {"int8": len(NARROW) + 2}
    assert found["codes"] == 10 * pair.COMPARED_IMAGES
    kernels = channels_of(folder / "seed0" / "export_litert_size" / "w5a16+0.tflite")
    distinct = [len(np.unique(row)) for name in NARROW for row in kernels[name]]
    assert found["levels"] == max(distinct) <= 2**5


def test_a_refused_pair_is_none_that_failed(few):
    folder, results = few
    found = results["w4a4-pact"]
    assert found["error"] == "" and "can be negative" in found["refused"]
    text = (folder / "export_litert_size.md").read_text()
    assert "1 exported, 1 refused, 0 FAILED" in text
    assert f"| `w4a4-pact` | refused: {found['refused']} |" in text
    assert "| `w5a16` | exported |" in text
    assert json.loads((folder / "export_litert_size.json").read_text())["suite"] == "export"


# ---------------------------------------------------------------- what counts as a failure


def test_kernels_with_too_many_levels_or_none_are_problems():
    bits = {"first": 8, "middle": 2, "gone": 2}
    assert pair._of_kernels("w2a8", {"first": 256, "middle": 4, "gone": 1}, bits) == []
    found = pair._of_kernels("w2a8", {"first": 257, "middle": 5}, bits)
    assert [problem.partition(":")[0] for problem in found] == ["first", "middle", "gone"]
    assert pair._of_kernels("wta8", {"middle": 4}, {"middle": 2}) == [
        "middle: 4 levels in a channel, 3 are allowed"
    ]


def test_outputs_that_prove_nothing_or_differ_are_problems():
    codes = np.asarray([[1, 0], [2, 3], [4, 5]])
    same = {"model": codes, "reference": codes, "simulator": codes}
    assert pair._of_outputs(same) == []
    (one_class,) = pair._of_outputs({"model": codes + [[0, 9]]})
    assert "one class" in one_class
    (differs,) = pair._of_outputs(same | {"simulator": codes + (codes == 3)})
    assert differs.startswith("1 codes differ")


@pytest.fixture
def attempts(monkeypatch):
    """The recipes that were attempted, in place of training: w2a2 fails, w3a3 raises."""
    found = []

    def outcome(job: pair.Job) -> pair.Outcome:
        found.append(job.recipe)
        if job.recipe == "w3a3":
            raise KeyError("tanh")
        problems = ["operators in float: ADD"] if job.recipe == "w2a2" else []
        return pair.Outcome(problems=problems)

    data = qat_data.load("digits", batch_size=64)
    monkeypatch.setattr(export.qat_data, "load", lambda *_, **__: data)
    monkeypatch.setattr(pair, "outcome", outcome)
    return found


def test_failed_pairs_are_told_and_tried_again_and_no_others(tmp_path, attempts):
    recipes = ("w2a2", "w3a3", "w4a4")
    for _ in range(2):
        with pytest.raises(UserError, match="2 of 3 pairs failed, e.g. w2a2: operators in float"):
            export.run(plan(tmp_path, recipes=recipes))
    assert attempts == [*recipes, "w2a2", "w3a3"]
    text = (tmp_path / "export_litert_size.md").read_text()
    assert "| `w2a2` | FAILED: operators in float: ADD |" in text
    assert "| `w3a3` | FAILED: KeyError: 'tanh' |" in text
    assert "1 exported, 0 refused, 2 FAILED" in text


def test_targets_storages_and_epochs_have_results_of_their_own(tmp_path, attempts):
    whole = plan(tmp_path, recipes=("w4a4",))
    others = [{"weight_storage": "speed"}, {"epochs": 1}, {}]
    found = [export.run(dataclasses.replace(whole, **other)) for other in [{}, *others]]
    assert len(attempts) == 3 and {len(content["pairs"]) for content in found} == {1}
    assert [content["pairs"][0]["epochs"] for content in found] == [0, 0, 1, 0]
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {"terms.json", "export_litert_size.json", "export_litert_speed.json"}


def test_the_row_of_a_pair():
    outcome = pair.Outcome(
        levels=3,
        containers={"int8": 2, "int2": 5},
        activations=["int8"],
        weight_bytes=12345,
        file_bytes=20000,
        model_accuracy=0.5,
        accuracy=0.25,
        agreement=0.999,
        codes=100,
        model_file=[0.01, 2],
        model_reference=[0.02, 3],
        file_reference=[0.0, 0],
    )
    result = {"method": "wta8", "error": "", "seconds": 12.3, **dataclasses.asdict(outcome)}
    lines = export_table.markdown([result], about=[]).splitlines()
    assert lines[4:7] == ["| weights \\ activations | a8 |", "| --- | --- |", "| wt | 99.90 |"]
    assert lines[10] == (
        "| `wta8` | exported | 3 | 5 int2, 2 int8 | int8 | 12,345 | 50.00 / 25.00 | 99.90 | "
        "1.00 (2) | 2.00 (3) | 0.00 (0) | 12 |"
    )


# ---------------------------------------------------------------- all pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("all")


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHT_BITS)
def test_every_pair_of_widths(weights, folder):
    """Nine of the 81 pairs, trained for an epoch."""
    recipes = tuple(name for name in ALL_PAIRS if name.startswith(f"w{weights}a"))
    terms = dataclasses.replace(TERMS, float_epochs=20)
    content = export.run(plan(folder, terms=terms, recipes=recipes, epochs=1))
    assert [result["method"] for result in content["pairs"]] == list(recipes)
    allowed = 3 if weights == "t" else 2**weights
    for result in content["pairs"]:
        assert export_table.verdict(result) == "exported"
        assert result["levels"] <= allowed
        if result["method"].endswith(("a8", "a16")):  # 2-bit codes amplify what kernels round
            assert result["agreement"] >= 0.97
