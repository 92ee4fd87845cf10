from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

from qat.benchmark import step_time
from qat.benchmark.step_time_table import ratios, step_time_png, table
from qat.errors import UserError

LENET = step_time.Setting(model="lenet", batch_size=4)


def row(network, seconds, **changes):
    made = {"network": network, "model": "lenet", "batch_size": 4, "mode": "graph", "side": 32}
    made |= {"error": None, "step_seconds": seconds, "peak_bytes": 100}
    made |= {"cpu_seconds": [2 * value for value in sorted(seconds)]}
    made |= {"build_seconds": 1.0, "trace_seconds": 2.0, "export_seconds": None}
    return made | changes


ROWS = [
    row("float", [1.0, 2.0, 1.0]),
    row("w8a8", [1.1, 2.4, 1.3], peak_bytes=120, export_seconds=0.5),
    row("tfmot", [], error="TFMOT rejects it"),
    row("float", [4.0, 4.0, 4.0], batch_size=8),
    row("w8a8", [6.0, 6.0, 6.0], batch_size=8, peak_bytes=None),
]


def test_a_ratio_is_that_of_a_round():
    np.testing.assert_allclose(ratios(ROWS[1], ROWS), [1.1, 1.2, 1.3])
    np.testing.assert_allclose(ratios(ROWS[4], ROWS), 1.5)
    np.testing.assert_allclose(ratios(ROWS[1], ROWS, "cpu_seconds"), [1.1, 1.3, 1.2])
    assert ratios(ROWS[2], ROWS) is None


def test_the_table_has_time_memory_and_failures():
    lines = table(ROWS).splitlines()
    assert "w8a8 | 1300 | 1.200 (1.15-1.25) | 1.200 | 1.20 | 1.0, 2.0, 0.5 |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
    assert "TFMOT rejects it" in lines[4] and "| - |" in lines[6]


def test_the_plot_is_a_picture():
    pytest.importorskip("matplotlib")
    assert step_time_png(ROWS, "on this machine").startswith(b"\x89PNG")


@pytest.mark.slow
def test_networks_take_turns():
    rows = step_time.measure(LENET, ["float", "w4a4-lsq", "tfmot", "w9a9"], rounds=2)
    by_name = {row["network"]: row for row in rows}
    assert "w9a9" in by_name["w9a9"]["error"] and not by_name["w9a9"]["step_seconds"]
    for name in ("float", "w4a4-lsq", "tfmot"):
        assert by_name[name]["error"] is None
        for seconds in ("step_seconds", "cpu_seconds"):
            assert len(by_name[name][seconds]) == 2 and min(by_name[name][seconds]) > 0
    assert by_name["w4a4-lsq"]["export_seconds"] > 0
    assert by_name["float"]["export_seconds"] is None
    assert step_time._rotated(["a", "b", "c"], 4) == ["b", "c", "a"]


def plan(tmp_path, **fields):
    made = {"models": ["lenet"], "recipes": ["w8a8"], "batch_sizes": [4], "modes": ["graph"]}
    made |= {"rounds": 1, "peers": [], "output_dir": tmp_path, "json": None, "command": "it"}
    return step_time.StepTimePlan(**(made | fields))


def test_a_run_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    def instead(function, setting, *rest):
        if function is step_time.measure:
            return [row("float", [1.0]), row("w8a8", [1.5]), row("w1a1", [], error="no")]
        return next(peaks[rest[0]])

    peaks = {"float": iter([100, 90, 900, 110, 80]), "w8a8": iter([200] * 5)}
    monkeypatch.setattr(step_time, "_in_fresh_process", instead)
    with pytest.raises(UserError, match="1 failed: w1a1 of lenet: no"):
        step_time.run(plan(tmp_path))
    written = json.loads((tmp_path / "step_time.json").read_text())
    assert [row["peak_bytes"] for row in written["rows"]] == [100, 200, 100]
    assert "1.500" in (tmp_path / "step_time.md").read_text() and "1.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"models": ["lenet", "alexnet"]}, "model 'alexnet'.*resnet20"),
        ({"modes": ["eager"]}, "mode 'eager'.*xla"),
        ({"peers": ["larq"]}, "peer 'larq'.*tfmot"),
        ({"modes": []}, "nothing to measure.*--modes"),
    ],
)
def test_wrong_names(tmp_path, wrong, named):
    with pytest.raises(UserError, match=named):
        step_time.run(plan(tmp_path / "new", **wrong))
    assert not (tmp_path / "new").exists()


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="lenet with batches of 4 was killed.*--batch_sizes"):
        step_time._in_fresh_process(_die, LENET)


def _die(setting):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_quantized_step_takes_little_more_memory_than_a_float_one():
    """At most 15 % in all, which is the project's own limit."""
    setting = step_time.Setting(model="resnet20", batch_size=128)
    limit = 1.15 * step_time.median_peak(setting, "float")
    assert step_time.median_peak(setting, "w8a8") <= limit
