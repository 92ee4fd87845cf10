"""The export suite's table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qat.benchmark.table import number, points, table_row

_PAIR = re.compile(r"w([1-8t])a(\d+)")
_COLUMNS = (
    "pair",
    "result",
    "levels",
    "kernels in",
    "activations in",
    "weight bytes",
    "accuracy",
    "same class",
    "Keras ≠ file",
    "Keras ≠ reference",
    "file ≠ reference",
    "seconds",
)
_LEGEND = (
    "Levels: the most distinct integers in a channel of a kernel of the pair's width. Kernels in: "
    "how many lie in which type (below w8 the first and the last one keep 8 bits). Accuracy: of "
    "Keras model and file, percent. Same class: of the images, percent. ≠: share of output codes "
    "that differ, percent, and the largest difference in codes, between the Keras model, the file "
    "on the target's default kernels and the file on its reference kernels."
)


def verdict(result: dict[str, Any]) -> str:
    """ "exported", "refused: why" or "FAILED: why"."""
    if result["error"]:
        return f"FAILED: {result['error']}"
    return f"refused: {result['refused']}" if result["refused"] else "exported"


def markdown(pairs: Sequence[dict[str, Any]], *, about: Sequence[str]) -> str:
    """The table as Markdown, with what is needed to read it and to make it again.

    Args:
        pairs: results, in order. about: lines to stand above the table.
    """
    counts = {word: 0 for word in ("exported", "refused", "FAILED")}
    for result in pairs:
        counts[verdict(result).partition(":")[0]] += 1
    summary = ", ".join(f"{count} {word}" for word, count in counts.items())
    lines = ["# Export", "", *(f"- {text}" for text in [*about, summary]), ""]
    lines += [*overview(pairs), "", table_row(_COLUMNS), table_row(["---"] * len(_COLUMNS))]
    lines += [table_row(_cells(result)) for result in pairs]
    return "\n".join([*lines, "", _LEGEND]) + "\n"


def overview(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Weights by activations: of the images, the percent that file and Keras model class alike."""
    cells: dict[str, dict[str, str]] = {}
    for result in pairs:
        found = _PAIR.fullmatch(result["method"])
        if found:
            told = verdict(result).partition(":")[0]
            cell = points(result["agreement"]) if told == "exported" else told
            cells.setdefault(found[1], {})[found[2]] = cell
    columns = sorted({a for row in cells.values() for a in row}, key=int)
    header = ["weights \\ activations", *(f"a{a}" for a in columns)]
    rows = [[f"w{w}", *(row.get(a, "") for a in columns)] for w, row in cells.items()]
    return [table_row(cells) for cells in (header, ["---"] * len(header), *rows)]


def _cells(result: dict[str, Any]) -> list[str]:
    start = [f"`{result['method']}`", verdict(result).replace("|", "\\|")]
    if result.get("codes") is None:
        return [*start, *["–"] * (len(_COLUMNS) - 3), f"{result['seconds']:.0f}"]
    differences = ("model_file", "model_reference", "file_reference")
    return [
        *start,
        str(result["levels"]),
        ", ".join(f"{count} {name}" for name, count in sorted(result["containers"].items())),
        ", ".join(result["activations"]),
        number(result["weight_bytes"]),
        f"{points(result['model_accuracy'])} / {points(result['accuracy'])}",
        points(result["agreement"]),
        *(f"{points(result[key][0])} ({result[key][1]})" for key in differences),
        f"{result['seconds']:.0f}",
    ]
