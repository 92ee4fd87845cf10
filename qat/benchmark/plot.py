"""Accuracy against bytes, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qat.benchmark.plan import SAME_EPOCHS
from qat.figures import png

# Colours that differ in lightness too, after Okabe and Ito.
_COLOURS = {
    "float": "#000000",
    "qat": "#0072B2",
    "tfmot": "#D55E00",
    "qkeras": "#009E73",
    "larq": "#CC79A7",
}


def accuracy_png(rows: Sequence[dict[str, Any]], title: str) -> bytes | None:
    """A PNG of the rows of `table.methods`; None where matplotlib is missing.

    Filled points are measured on files, hollow ones on Keras models. The dotted lines are the float
    network given the same epochs. A peer far below all of ours stands at the lower edge, with its
    accuracy.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xscale="log", xlabel="bytes of weights", ylabel="accuracy, %", title=title
    )
    floor = _floor(rows)
    for source in _COLOURS:
        _draw(axes, [row for row in rows if row["source"] == source], source, floor)
    for row in rows:
        if row["method"] == SAME_EPOCHS:
            axes.axhline(100 * row["accuracy"], color="black", linestyle=":", linewidth=0.8)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    axes.margins(x=0.15)
    return png(figure)


def _floor(rows: Sequence[dict[str, Any]]) -> float:
    """The lowest accuracy that is drawn where it is, in percent: one far below hides the rest."""
    own = [100 * row["accuracy"] for row in rows if row["source"] in ("float", "qat")]
    return min(own) - max(2.0, max(own) - min(own)) if own else 0.0


def _draw(axes: Any, rows: Sequence[dict[str, Any]], source: str, floor: float) -> None:
    colour = _COLOURS[source]
    for index, row in enumerate(rows):
        x, y = row["weight_bytes"], 100 * row["accuracy"]
        name = row["method"].removeprefix(f"{source}-")
        axes.errorbar(
            x,
            max(y, floor),
            yerr=100 * (row["accuracy_error"] or 0.0),
            fmt="o" if y >= floor else "v",
            color=colour,
            markerfacecolor=colour if "file" in row["measured_on"] else "white",
            capsize=3,
            label=source if not index else None,
        )
        axes.annotate(
            name if y >= floor else f"{name}: {y:.1f}",
            (x, max(y, floor)),
            xytext=(-6 if source == "float" else 6, 4 if source == "qat" else -10),
            textcoords="offset points",
            horizontalalignment="right" if source == "float" else "left",
            fontsize=7,
            color=colour,
        )
