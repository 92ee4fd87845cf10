"""report.json for machines and report.md with its figures for people; each appears whole or not."""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from qat.figures import MISSING, figures
from qat.files import write_whole

SCHEMA_VERSION = 1


def write_reports(folder: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes report.json, report.md and, where matplotlib is installed, its figures.

    Args:
        report: the keys of report.json but schema_version; infinite numbers become null.
    """
    folder = pathlib.Path(folder)
    report = _json_able({"schema_version": SCHEMA_VERSION, **report})
    write_whole(folder / "report.json", to_json(report))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qat"), trim_blocks=True, lstrip_blocks=True
    )
    drawn = figures(report)
    for name, content in (drawn or {}).items():
        write_whole(folder / name, content)
    no_figures = MISSING if drawn is None else None
    environment.globals["counted"] = counted
    text = environment.get_template("report.md.j2").render(**report, no_figures=no_figures)
    write_whole(folder / "report.md", text.encode())


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines for the terminal."""
    tflite, told = report["tflite"], []
    for name in ("accuracy", "loss"):
        values = report.get(name, {})
        if values.get("tflite") is not None:
            told.append(
                f"{name} float {values['float']:.4f}, quantized {values['qat']:.4f}, "
                f"file {values['tflite']:.4f}"
            )
    if report["agreement"] is not None:
        told.append(f"same class {report['agreement']:.4f}")
    else:
        ratio = report["output_snr_db"]
        equal = ratio is None or ratio == float("inf")
        told.append("outputs equal" if equal else f"output {ratio:.1f} dB above its difference")
    return (
        f"{report['model']} {report['recipe']} on {report['dataset']}, seed {report['seed']}: "
        f"{'; '.join(told)}; {tflite['bytes']} bytes; integers "
        f"{'match' if report['integers_match'] else 'DIFFER'}; float operators: "
        f"{counted(tflite['float_operators'])}"
    )


def counted(names: Sequence[str]) -> str:
    """How often each name is there, e.g. "2 ADD, 1 MUL"; "none" for no name."""
    found = collections.Counter(names)
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "none"


def to_json(content: dict[str, Any]) -> bytes:
    """Indented JSON that ends in a newline, UTF-8."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _json_able(value: Any) -> Any:
    """The value with infinite and NaN numbers as None, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _json_able(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_able(item) for item in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
