"""Imports run one way, and modules stay small. Read from the sources; nothing is imported."""

from __future__ import annotations

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Every one of these may import those above it, and nothing else of qat.
ORDER = [
    {"deep", "errors"},
    {"ste", "grid", "histogram", "recipe", "float_only", "prelu"},
    {"ranges"},
    {"quantizers"},
    {"operator_layers", "reactnet"},
    {"configs", "layers", "canonical", "wrapper"},
    {"roles", "loading"},
    {"negatives", "decision"},
    {"placement"},
    {"scheme"},
    {"apply"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path):
    """Dotted names of all that a source file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_of(names):
    """The modules and packages right under qat among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("qat.")}


@pytest.fixture(scope="module")
def graph():
    """{module or package right under qat: those it imports}."""
    found = {}
    for path in sources("qat"):
        part = path.relative_to(ROOT / "qat").parts[0].removesuffix(".py")
        found.setdefault(part, set()).update(parts_of(imported(path)) - {part})
    return found


def test_the_core_imports_downwards(graph):
    assert set(RANK) <= set(graph)
    for part, rank in RANK.items():
        wrong = {other for other in graph[part] if RANK.get(other, len(ORDER)) >= rank}
        assert not wrong, f"qat/{part} must not import {sorted(wrong)}"


def test_no_imports_run_in_a_circle(graph):
    del graph["__init__"]  # collects the public names
    graphlib.TopologicalSorter(graph).prepare()


def test_training_export_and_verification_are_apart(graph):
    siblings = {"train", "export", "verify"}
    assert siblings <= set(graph)
    for part in siblings:
        assert not graph[part] & (siblings - {part})


def test_recipes_and_errors_need_no_framework():
    for name in ("recipe", "errors"):
        roots = {module.split(".")[0] for module in imported(ROOT / "qat" / f"{name}.py")}
        assert not roots & {"tensorflow", "tf_keras", "keras", "tensorflow_model_optimization"}


def test_models_and_quantizer_are_strangers():
    for path in sources("models"):
        assert not {name for name in imported(path) if name.split(".")[0] == "qat"}, path
    for path in sources("qat", "models"):
        assert not {n for n in imported(path) if n.split(".")[0] in ("scripts", "tests")}, path


def test_keras_2_is_imported_by_its_name():
    """`tf.keras` and `keras` are Keras 3."""
    for path in sources("qat", "models", "scripts"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "keras":
                base = node.value
                assert not (isinstance(base, ast.Name) and base.id in ("tf", "tensorflow")), path
        assert not {n for n in imported(path) if n.startswith("tensorflow.keras")}, path


def test_modules_are_short():
    long = {
        str(path.relative_to(ROOT)): length
        for path in sources("qat", "models", "scripts")
        if (length := len(path.read_text().splitlines())) > 300
    }
    assert not long


def test_there_is_something_to_check():
    assert len(sources("qat")) > 20 and len(sources("models")) > 5
    assert not list((ROOT / "qat").rglob("utils.py")) + list((ROOT / "qat").rglob("helpers.py"))
