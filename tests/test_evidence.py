"""The page and the figures of a report's evidence."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import test_report

from qat import figures
from qat.report import write_reports

PAIRS = ("keras_default", "keras_reference", "default_reference", "reference_simulator")
FIGURES = {"differences.png", "bytes.png"}


def apart(codes: int, **counts: int) -> dict:
    """A difference; counts by "minus3", "plus1"…"""
    histogram = [0] * 17
    for name, count in counts.items():
        sign = -1 if name.startswith("minus") else 1
        histogram[8 + sign * int(name.lstrip("minuspl"))] = count
    different = sum(histogram)
    histogram[8] = codes - different
    largest = max((abs(n - 8) for n, count in enumerate(histogram) if count), default=0)
    return {"codes": codes, "different": different, "largest": largest, "histogram": histogram}


def pair(total: dict, own: dict | None) -> dict:
    return {"total": total, "own": own}


SAME = pair(apart(4000), apart(4000))
MEASURED = [
    {"threads": n, "runs": 50, "batch_size": 1}
    | {"median_seconds": 0.0015 * n, "quartile_seconds": [0.001 * n, 0.002 * n]}
    for n in (1, 4)
]
ROWS = [
    {
        "layer": "conv1",
        "tensor": "conv1_relu",
        "dtype": "int8",
        "operator": "CONV_2D",
        "pairs": dict.fromkeys(PAIRS, SAME)
        | {"default_reference": pair(apart(4000, minus3=40, plus1=60), apart(4000, plus1=1))},
    },
    {
        "layer": "pool",
        "tensor": "pool",
        "dtype": "int8",
        "operator": "MAX_POOL_2D",
        "pairs": {"default_reference": pair(apart(100, plus2=3), None)},
    },
]
WEIGHT = {
    "layer": "conv1",
    "tensor": "conv1/kernel",
    "operator": "CONV_2D",
    "stored": "int2",
    "read": "int8",
    "values": 400,
    "bytes": 100,
    "bits": 2,
    "narrowest": "int2",
    "too_wide": False,
}
EVIDENCE = {
    "mismatches": [],
    "comparison": ROWS,
    "comparison_examples": 64,
    "output_comparison": {"logits": {"keras_default": apart(3600, plus1=36)}},
    "first_departure": dict.fromkeys(PAIRS)
    | {
        "default_reference": {"layer": "conv1", "tensor": "conv1_relu", "operator": "CONV_2D"}
        | {"different": 100, "codes": 4000, "largest": 3}
    },
    "beyond_rounding": {name: [] for name in PAIRS} | {"default_reference": ["conv1_relu"]},
    "not_compared": {"keras_reference": "no | kernel", "x_fake_quantize": "it is elsewhere"},
}
TFLITE = {
    "weight_bytes": 400,
    "bytes": 1000,
    "weight_storage": "size",
    "weights": [WEIGHT, WEIGHT | {"tensor": "wide/kernel", "stored": "int8", "too_wide": True}],
    "bytes_by_layer": {"conv1": 300, "wide": 100},
    "latency": {"machine": "Abacus 3000", "interpreter": "LiteRT", "measurements": MEASURED},
    "storages": {
        "size": {"bytes": 1000, "weight_bytes": 400, "latency": MEASURED},
        "speed": {"bytes": 2000, "weight_bytes": 1400, "latency": MEASURED},
    },
}


def report(**changes) -> dict:
    made = test_report.report(**copy.deepcopy(EVIDENCE) | changes)
    made["tflite"] |= copy.deepcopy(TFLITE)
    made["tflite"]["weights"][1]["layer"] = "wide"
    return made


def page(folder, **changes) -> list[str]:
    write_reports(folder, report(**changes))
    return (folder / "report.md").read_text().splitlines()


def test_the_page_names_layers_containers_and_times(tmp_path):
    lines = page(tmp_path)
    for line in (
        "| Keras → default | none | 0 | none |",
        "| Keras → reference | not compared: no / kernel | – | – |",
        "| default → reference | conv1 (CONV_2D) | 2.50 %, ≤ 3 | conv1_relu |",
        "| conv1_relu | conv1 | CONV_2D | 0 | 0 | 2.50 %, ≤ 3 (own 0.03 %, ≤ 1) | 0 |",
        "| pool | pool | MAX_POOL_2D | – | – | 3.00 %, ≤ 2 | – |",
        "- Not compared: x_fake_quantize (it is elsewhere).",
        "- Output logits, Keras → default: of 3600 codes 1.00 % differ, by up to 1.",
        "| conv1/kernel | CONV_2D | int2 | int8 | 400 | 100 | 2 |  |",
        "| wide/kernel | CONV_2D | int8 | same | 400 | 100 | 2 | WIDER THAN int2 |",
        "| conv1 | 300 | 75.0 % |",
        "| scales, operators and names besides | 600 | |",
        "| weight storage | file bytes | weight bytes | 1 thread | 4 threads |",
        "| size, this file | 1000 | 400 | 1.500 (1.000–2.000) | 6.000 (4.000–8.000) |",
        "| speed | 2000 | 1400 | 1.500 (1.000–2.000) | 6.000 (4.000–8.000) |",
        "![Bytes of weights by layer and container](bytes.png)",
    ):
        assert line in lines, line
    text = "\n".join(lines)
    assert "on Abacus 3000" in text and "on 64 examples" in text and "None" not in text


def test_every_table_has_as_many_cells_in_each_row(tmp_path):
    tables, previous = [], ""
    for line in page(tmp_path):
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            tables[-1].append(line.count("|"))
        previous = line
    assert len(tables) == 9
    assert all(len(set(cells)) == 1 and len(cells) > 2 for cells in tables if cells[0] != 3), tables


def test_without_rows_the_page_still_says_why(tmp_path):
    nothing = {"comparison": [], "not_compared": dict.fromkeys(PAIRS, "the reason")}
    lines = page(tmp_path, **nothing)
    assert sum("not compared: the reason" in line for line in lines) == 4
    assert not (tmp_path / "differences.png").exists() and (tmp_path / "bytes.png").exists()


def test_the_figures_are_pictures_of_the_report(tmp_path):
    lines = page(tmp_path)
    for name in FIGURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert any(line.endswith(f"({name})") for line in lines)
    assert set(figures.NAMES) == FIGURES


def test_the_figures_show_the_numbers():
    """What is drawn, by the artists: the share of each difference, the bytes of each layer."""
    from matplotlib.figure import Figure

    figure = Figure()
    figures._draw_differences(figure, report())
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [name.replace("_", " → ") for name in PAIRS]
    shares = np.ma.filled(panels["default → reference"].images[0].get_array(), np.nan)
    expected = np.full((2, 17), np.nan)
    expected[0, [5, 8, 9]] = 0.01, 0.975, 0.015
    expected[1, [8, 10]] = 0.97, 0.03
    np.testing.assert_allclose(shares, expected)
    figure = Figure()
    figures._draw_bytes(figure, report())
    bars = {
        container.get_label(): [bar.get_width() for bar in container]
        for container in figure.axes[0].containers
    }
    assert bars == {"int2": [100, 0], "int8": [0, 100]}


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    lines = page(tmp_path)
    assert sum("matplotlib is not installed" in line for line in lines) == 1
    assert not any(".png" in line for line in lines)
    assert "| conv1 | 300 | 75.0 % |" in lines
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".png"]


@pytest.mark.parametrize("given", [{}, {"comparison": []}])
def test_other_reports_have_no_figures(given):
    assert figures.figures(test_report.report(**given)) == {}
