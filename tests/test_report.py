from __future__ import annotations

import copy
import json
import math
import os
import stat

import pytest

from qat import report as qat_report
from qat.report import to_json, write_reports

LAYER = {
    "name": "conv1",
    "type": "Conv2D",
    "weight_bits": 4,
    "activation_bits": 8,
    "method": "minmax",
    "fused_into": "",
    "reason_if_float": None,
}
REPORT = {
    "recipe": "w4a8",
    "model": "cnn5",
    "dataset": "digits/1.0.0",
    "seed": 3,
    "num_eval_examples": 360,
    "accuracy": {"float": 0.9875, "qat": 0.98, "tflite": 0.9775},
    "agreement": 0.995,
    "output_snr_db": 41.25,
    "integers_match": True,
    "max_output_difference_lsb": 1,
    "resumed_at_step": 0,
    "tflite": {
        "path": "model.tflite",
        "bytes": 81234,
        "float_model_bytes": 564392,
        "weight_bytes": 70123,
        "float_weight_bytes": 561000,
        "operators": {"CONV_2D": 5, "FULLY_CONNECTED": 1},
        "float_operators": [],
        "target": "litert",
        "arena_bytes": None,
        "notes": {},
        "io": "float32",
    },
    "layers": [
        LAYER,
        LAYER | {"name": "bn1", "type": "BatchNormalization", "fused_into": "conv1"},
        LAYER | {"name": "head", "weight_bits": None, "reason_if_float": "sensitive"},
    ],
    "seconds": {"float_training": 61.25, "qat_training": 30.0, "export": 0.5, "verify": 1.25},
}


def report(**changes) -> dict:
    return copy.deepcopy(REPORT) | changes


def written(folder, **changes) -> tuple[dict, str]:
    write_reports(folder, report(**changes))
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def test_the_json_is_the_report_and_its_version(tmp_path):
    content, _ = written(tmp_path)
    assert content == {"schema_version": 1, **REPORT}
    assert list(content)[0] == "schema_version"
    assert (tmp_path / "report.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
def test_numbers_that_json_lacks_become_null(value, tmp_path):
    nested = {"float": value, "qat": 0.5, "tflite": 0.5}
    content, text = written(tmp_path, output_snr_db=value, accuracy=nested)
    assert content["output_snr_db"] is None
    assert content["accuracy"] == {"float": None, "qat": 0.5, "tflite": 0.5}
    assert "inf" not in text and "nan" not in text


def test_the_report_given_is_not_changed(tmp_path):
    given = report(output_snr_db=math.inf)
    write_reports(tmp_path, given)
    assert given == report(output_snr_db=math.inf)


def test_to_json_refuses_what_json_lacks():
    with pytest.raises(ValueError):
        to_json({"x": math.inf})


def test_the_page_says_it_all(tmp_path):
    _, text = written(tmp_path)
    lines = text.splitlines()
    assert lines[0] == "# cnn5 on digits/1.0.0, w4a8"
    assert "| 360 examples | 98.75 % | 98.00 % | 97.75 % |" in lines
    assert "| integers equal | yes |" in lines
    assert "| same class | 99.50 % |" in lines
    assert "| output signal to difference | 41.2 dB |" in lines
    assert "| model.tflite | 81234 | 70123 | 561000 |" in lines
    assert "CONV_2D × 5, FULLY_CONNECTED × 1." in text
    rows = [line for line in lines if line.startswith(("| conv1 ", "| bn1 ", "| head "))]
    assert len(rows) == 3
    assert [cell.strip() for cell in rows[2].split("|")[1:-1]][-1] == "sensitive"
    assert "Resumed" not in text


def test_every_table_of_the_page_has_as_many_cells_in_each_row(tmp_path):
    tables, previous = [], ""
    for line in written(tmp_path)[1].splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            tables[-1].append(line.count("|"))
        previous = line
    assert len(tables) == 4
    assert all(len(set(cells)) == 1 for cells in tables), tables


def test_the_page_renders_without_what_may_be_missing(tmp_path):
    nothing = {"float": None, "qat": None, "tflite": None}
    _, text = written(
        tmp_path,
        accuracy=nothing,
        agreement=None,
        output_snr_db=math.inf,
        max_output_difference_lsb=None,
        integers_match=False,
        resumed_at_step=17,
    )
    assert "None" not in text
    assert "| integers equal | NO |" in text
    assert "| 360 examples | – | – | – |" in text
    assert "Resumed at step 17." in text


def test_float_operators_are_on_the_page(tmp_path):
    tflite = REPORT["tflite"] | {"float_operators": ["EXP", "ADD", "EXP"]}
    assert "| operators in float | 1 ADD, 2 EXP |" in written(tmp_path, tflite=tflite)[1]


def test_a_later_report_replaces_the_earlier_and_nothing_else_is_left(tmp_path):
    written(tmp_path)
    content, text = written(tmp_path, seed=4)
    assert content["seed"] == 4 and "Seed 4." in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    written(tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(TypeError):
        write_reports(tmp_path, report(seed=object()))
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


@pytest.mark.parametrize("mask, mode", ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)))
def test_the_umask_decides_who_may_read(mask, mode, tmp_path):
    old = os.umask(mask)
    try:
        written(tmp_path)
    finally:
        os.umask(old)
    for name in ("report.json", "report.md"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


# ---------------------------------------------------------------- summary


def test_the_summary_has_the_three_accuracies(tmp_path):
    text = qat_report.summary(report())
    for part in ("cnn5 w4a8 on digits/1.0.0", "0.9875", "0.9800", "0.9775", "0.9950", "81234"):
        assert part in text
    assert "integers match" in text and "float operators: none" in text
    assert "DIFFER" in qat_report.summary(report(integers_match=False))


def test_losses_stand_where_accuracy_says_nothing(tmp_path):
    none = {"float": None, "qat": None, "tflite": None}
    loss = {"float": 0.25, "qat": 0.31249, "tflite": 12.5}
    _, text = written(tmp_path, accuracy=none, loss=loss)
    assert "| loss | 0.2500 | 0.3125 | 12.5000 |" in text
    _, text = written(tmp_path)
    assert "loss" not in text
