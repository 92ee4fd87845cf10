"""The figures of a report: how far apart codes are, layer by layer, and where the bytes are."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from qat.verify.differences import FARTHEST

MISSING = "no plot: matplotlib is not installed; python -m pip install 'qat-tflite[plots]'"
# Containers, darker the more bits they have.
_COLOURS = {
    "bit": "#F0E442",
    "int2": "#E69F00",
    "int4": "#56B4E9",
    "int8": "#0072B2",
    "int32": "#4D4D4D",
    "int64": "#4D4D4D",
    "float32": "#000000",
}
_INCHES_A_ROW, _INCHES_AROUND = 0.2, 1.6


def figures(report: dict[str, Any]) -> dict[str, bytes] | None:
    """{file name: PNG} of what a report has to show; None where matplotlib is missing.

    Args:
        report: as `qat.evidence.with_evidence` returns it; others have none.
    """
    drawn = {name: draw for name, (shows, draw) in _FIGURES.items() if shows(report)}
    if drawn and importlib.util.find_spec("matplotlib") is None:
        return None
    return {name: _drawn(draw, report) for name, draw in drawn.items()}


def png(figure: Any) -> bytes:
    """The bytes of a matplotlib figure."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _drawn(draw: Callable[[Any, dict[str, Any]], None], report: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, report)
    return png(figure)


def _draw_differences(figure: Any, report: dict[str, Any]) -> None:
    """A panel a pair, a row a tensor: the histogram of its differences, as shades; grey where the
    pair has no codes."""
    from matplotlib.colors import LogNorm

    rows = report["comparison"]
    pairs = [pair for pair in report["first_departure"] if any(pair in r["pairs"] for r in rows)]
    figure.set_size_inches(4 + 2.6 * len(pairs), _INCHES_AROUND + _INCHES_A_ROW * len(rows))
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for panel, pair in zip(panels, pairs, strict=True):
        shares = np.full((len(rows), 2 * FARTHEST + 1), np.nan)
        for number, row in enumerate(rows):
            if pair in row["pairs"]:
                counts = np.asarray(row["pairs"][pair]["total"]["histogram"], float)
                shares[number] = counts / counts.sum()
            else:
                panel.axhspan(number - 0.5, number + 0.5, color="0.85")
        shares[shares == 0] = np.nan
        image = panel.imshow(
            shares,
            norm=LogNorm(1e-6, 1),
            cmap="viridis_r",
            aspect="auto",
            interpolation="nearest",
            extent=(-FARTHEST - 0.5, FARTHEST + 0.5, len(rows) - 0.5, -0.5),
        )
        panel.set_title(pair.replace("_", " → "), fontsize=10)
        panel.set_xticks(
            [-FARTHEST, -4, 0, 4, FARTHEST], [f"≤−{FARTHEST}", "−4", "0", "4", f"≥{FARTHEST}"]
        )
        panel.set_xlabel("steps", fontsize=9)
    panels[0].set_yticks(range(len(rows)), [row["tensor"] for row in rows], fontsize=7)
    figure.colorbar(image, ax=panels, label="share of the codes", shrink=0.8)


def _draw_bytes(figure: Any, report: dict[str, Any]) -> None:
    """A bar a layer, its parts coloured by the type that holds them."""
    weights = report["tflite"]["weights"]
    layers = list(report["tflite"]["bytes_by_layer"])
    figure.set_size_inches(9, _INCHES_AROUND + _INCHES_A_ROW * len(layers))
    axes = figure.add_subplot(xlabel="bytes")
    left = np.zeros(len(layers))
    for dtype, colour in _COLOURS.items():
        widths = np.zeros(len(layers))
        for row in weights:
            widths[layers.index(row["layer"])] += row["bytes"] * (row["stored"] == dtype)
        if widths.any():
            axes.barh(range(len(layers)), widths, left=left, color=colour, label=dtype)
        left += widths
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(title="stored in", fontsize=8)


# File name → (whether a report has something to draw, what draws it).
_FIGURES = {
    "differences.png": (lambda report: report.get("comparison"), _draw_differences),
    "bytes.png": (lambda report: report["tflite"].get("weights"), _draw_bytes),
}
NAMES = tuple(_FIGURES)
