"""Means over seeds, and the table of them."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qat.benchmark.plan import PEERS, SAME_EPOCHS

# What is measured or counted the same way for every seed, and may still differ by a few.
_MEANS = ("weight_bytes", "file_bytes", "seconds", "model_accuracy")

_OF_PEERS = (
    "What the names leave out: at the edges, the first and last layer, our recipes and QKeras have "
    "8 bits, TFMOT's scheme the widths of the name, Larq float. Float and peers are trained with "
    "Adam on the labels alone; ours with the recipe's settings, which measure batch normalization "
    "again and may have weight decay and the float network as a teacher."
)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error `s / sqrt(n)`, s with n - 1); no error for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def methods(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each (method, epochs) of finished runs: means over its seeds.

    `delta` is the mean over seeds of (accuracy - that of the float network given the same epochs
    with the same seed), and `delta_error` the standard error of that mean; None without any seed
    that has both.
    """
    done = [result for result in results if not result["error"]]
    same_epochs = {
        (result["seed"], result["epochs"]): result["accuracy"]
        for result in done
        if result["method"] == SAME_EPOCHS
    }
    groups = collections.defaultdict(list)
    for result in done:
        groups[result["method"], result["epochs"]].append(result)
    return sorted((_row(group, same_epochs) for group in groups.values()), key=_order)


def _row(group: list[dict[str, Any]], same_epochs: dict[tuple[int, int], float]) -> dict[str, Any]:
    first = group[0]
    accuracy, error = mean_and_error([result["accuracy"] for result in group])
    deltas = [
        result["accuracy"] - same_epochs[result["seed"], result["epochs"]]
        for result in group
        if (result["seed"], result["epochs"]) in same_epochs
    ]
    delta, delta_error = mean_and_error(deltas) if deltas else (None, None)
    row = {key: first[key] for key in ("method", "source", "recipe", "epochs")}
    row |= {
        "seeds": sorted(result["seed"] for result in group),
        "accuracy": accuracy,
        "accuracy_error": error,
        "delta": delta,
        "delta_error": delta_error,
        "measured_on": "+".join(sorted({result["measured_on"] for result in group})),
        "weight_bytes_in_theory": any(result["weight_bytes_in_theory"] for result in group),
        "notes": sorted({result["note"] for result in group if result["note"]}),
    }
    for key in _MEANS:
        known = [result[key] for result in group if result[key] is not None]
        row[key] = float(np.mean(known)) if known else None
    return row


def _order(row: dict[str, Any]) -> tuple:
    """Float first, then each recipe's counterparts together, the widest first."""
    if not row["recipe"]:
        return (0, row["epochs"])
    weights, _, activations = row["recipe"].removeprefix("w").partition("a")
    ternary_is_below_two = 1.5
    widths = [
        -float(part) if part.isdecimal() else -ternary_is_below_two
        for part in (activations, weights)
    ]
    return (1, *widths, row["recipe"], row["source"] != "qat", row["method"], row["epochs"])


_COLUMNS = (
    "method",
    "epochs",
    "seeds",
    "accuracy",
    "Δ to F",
    "weight bytes",
    "file bytes",
    "measured on",
    "seconds",
)


def markdown(
    rows: Sequence[dict[str, Any]], *, about: Sequence[str], failed: Sequence[str] = ()
) -> str:
    """The table as Markdown, with what is needed to read it and to make it again.

    Args:
        rows: of `methods`. about: lines to stand above the table. failed: lines to stand below.
    """
    lines = ["# Accuracy", "", *(f"- {line}" for line in about), ""]
    lines += [
        table_row(_COLUMNS),
        table_row(["---"] * len(_COLUMNS)),
        *(table_row(_cells(row)) for row in rows),
    ]
    lines += [
        "",
        "Accuracy in percent: mean ± standard error over the seeds. F is `float_same_epochs`, the "
        "float network given the same extra epochs; Δ is the mean of the differences to F of the "
        "same seed, in points. \\* bytes that packed kernels and biases would take: no file holds "
        "them.",
    ]
    lines += ["", _OF_PEERS] if any(row["source"] in PEERS for row in rows) else []
    notes = [f"- {row['method']}: {note}" for row in rows for note in row["notes"]]
    for title, items in (("Notes", notes), ("Failed", [f"- {line}" for line in failed])):
        lines += ["", f"{title}:", "", *items] if items else []
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"`{row['method']}`",
        str(row["epochs"]),
        ", ".join(map(str, row["seeds"])),
        points(row["accuracy"], row["accuracy_error"]),
        "F" if row["method"] == SAME_EPOCHS else points(row["delta"], row["delta_error"], "+"),
        number(row["weight_bytes"]) + ("\\*" if row["weight_bytes_in_theory"] else ""),
        number(row["file_bytes"]),
        row["measured_on"],
        f"{row['seconds']:.0f}",
    ]


def points(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A share in percent, with its error if it has one."""
    if value is None:
        return "–"
    return f"{100 * value:{sign}.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def number(value: float | None) -> str:
    """With thousands set apart."""
    return "–" if value is None else f"{value:,.0f}"


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
