"""What a release must not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qat.errors import UserError
from qat.report import counted

LEAST_AGREEMENT = 0.99
_WAYS = {
    "keras": "the Keras model",
    "default": "the default kernels",
    "reference": "the reference kernels",
    "simulator": "the integer simulator",
}


def require_strict(report: dict[str, Any]) -> None:
    """Raises UserError, in one line, for all `breaches` of a report."""
    found = list(breaches(report))
    if found:
        raise UserError(f"--strict: {'; '.join(found)}")


def breaches(report: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a file, by its report:

    - integers that differ from the model's, operators in float;
    - another class than the model's on more than 1 % of the examples;
    - a code in which the integer simulator and the reference kernels differ;
    - a layer that, fed with the same codes, computes others than rounding explains, between model,
      default and reference kernels (`qat.verify.layers.LayerRow.beyond_rounding`);
    - any of these comparisons that could not be made, but for the simulator's of Larq's operators;
    - a kernel in a wider container than it needs, unless that was asked for with
      --weight_storage=speed.

    Args:
        report: as `qat.pipeline.run` returns it.
    """
    agreement, tflite = report["agreement"], report["tflite"]
    if not report["integers_match"]:
        yield f"the file's integers differ from the model's: {report['mismatches'][0]}"
    if tflite["float_operators"]:
        yield f"these operators compute in float: {counted(tflite['float_operators'])}"
    if agreement is not None and agreement < LEAST_AGREEMENT:
        yield f"file and model agree on {agreement:.4f}, below {LEAST_AGREEMENT}"
    yield from _departures(report)
    for pair in report["beyond_rounding"]:
        larq = tflite["target"] == "lce" and pair == "reference_simulator"
        if pair in report["not_compared"] and not larq:
            yield f"{_named(pair)} were not compared: {report['not_compared'][pair]}"
    if tflite["weight_storage"] == "size":
        for row in tflite["weights"]:
            if row["too_wide"]:
                yield f"{row['tensor']} lies in {row['stored']}, {row['narrowest']} would hold it"


def _departures(report: dict[str, Any]) -> Iterator[str]:
    """The first layer of each pair that departs by its own doing."""
    rows = {row["tensor"]: row for row in report["comparison"]}
    for pair, tensors in report["beyond_rounding"].items():
        if tensors:
            row = rows[tensors[0]]
            own = row["pairs"][pair]["own"]
            yield (
                f"layer {row['layer']!r} ({row['operator']} of {row['tensor']!r}): {_named(pair)} "
                f"differ in {own['different']} of {own['codes']} codes, by up to {own['largest']}, "
                "given the same input"
            )


def _named(pair: str) -> str:
    first, second = pair.split("_")
    return f"{_WAYS[first]} and {_WAYS[second]}"
