"""The table and the plot of `qat.benchmark.step_time`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qat.benchmark.table import table_row
from qat.figures import png

_KEYS = ("model", "batch_size", "mode")


def ratios(
    row: dict[str, Any], rows: Sequence[dict[str, Any]], seconds: str = "step_seconds"
) -> np.ndarray | None:
    """Of each round, the network's step over the float step beside it; None where one failed."""
    base = _float_beside(row, rows)
    if not row[seconds] or not base[seconds]:
        return None
    return np.divide(row[seconds], base[seconds])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row for each network."""
    lines = [
        table_row(
            ["model", "batch", "mode", "network", "step, ms", "× float (quartiles)"]
            + ["CPU time × float", "peak memory × float", "seconds: build, trace, export"]
        ),
        table_row(["---"] * 9),
    ]
    for row in rows:
        named = [row["model"], str(row["batch_size"]), row["mode"], row["network"]]
        found = ratios(row, rows)
        if found is None:
            lines.append(table_row([*named, "", "", "", "", row["error"] or "no float step"]))
            continue
        low, middle, high = np.percentile(found, [25, 50, 75])
        measured = [
            f"{1e3 * np.median(row['step_seconds']):.0f}",
            f"{middle:.3f} ({low:.2f}-{high:.2f})",
            f"{np.median(ratios(row, rows, 'cpu_seconds')):.3f}",
            _memory(row, rows),
            f"{row['build_seconds']}, {row['trace_seconds']}, {row['export_seconds'] or '-'}",
        ]
        lines.append(table_row([*named, *measured]))
    return "\n".join(lines) + "\n"


def _float_beside(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    beside = [r for r in rows if all(r[key] == row[key] for key in _KEYS)]
    return next(r for r in beside if r["network"] == "float")


def _memory(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    base = _float_beside(row, rows)
    if row["peak_bytes"] is None or base["peak_bytes"] is None:
        return "-"
    return f"{row['peak_bytes'] / base['peak_bytes']:.2f}"


def step_time_png(rows: Sequence[dict[str, Any]], title: str) -> bytes | None:
    """A PNG, ratios to float with their quartiles; None where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn = [(row, found) for row in rows if (found := ratios(row, rows)) is not None]
    figure = Figure(figsize=(9, 1 + 0.3 * len(drawn)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="training step, × float")
    for place, (row, found) in enumerate(drawn):
        low, middle, high = np.percentile(found, [25, 50, 75])
        colour = {"float": "#000000", "tfmot": "#D55E00"}.get(row["network"], "#0072B2")
        spread = [[middle - low], [high - middle]]
        axes.errorbar(middle, place, xerr=spread, fmt="o", color=colour, capsize=3)
    labels = [f"{r['model']}, {r['batch_size']}, {r['mode']}: {r['network']}" for r, _ in drawn]
    axes.set_yticks(range(len(drawn)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linestyle=":", linewidth=0.8)
    axes.set_title(title, fontsize=7, wrap=True)
    axes.grid(alpha=0.3)
    return png(figure)
