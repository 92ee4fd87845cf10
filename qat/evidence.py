"""What a report says of a file beyond accuracy: every layer, every weight's container, speed."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import tf_keras

from qat.export.containers import WEIGHT_STORAGES
from qat.export.tflite import unchecked
from qat.larq_file import runs_on_larq
from qat.machine import machine
from qat.tflite_file import FileModel, read_file
from qat.verify.compare import Verification
from qat.verify.latency import Latency, latencies
from qat.verify.layers import PAIR_NAMES, LayerComparison
from qat.verify.weights import bytes_by_layer, weight_rows


def with_evidence(
    report: dict[str, Any],
    found: Verification,
    model: tf_keras.Model,
    path: str | os.PathLike,
    *,
    weight_storage: str,
) -> dict[str, Any]:
    """A report with what verification found of layers and weights, and both weight storages.

    Args:
        report: with the target and io under "tflite".
        found: by verification. model: that the file was made from. path: of the file.
        weight_storage: of the file; one with the other is made, measured and thrown away.

    Returns:
        The report with "mismatches", "comparison" (a row for each tensor), "comparison_examples",
        "output_comparison", "first_departure", "beyond_rounding" and "not_compared", and under
        "tflite" with "weights", "bytes_by_layer", "latency", "weight_storage" and "storages".

    Raises:
        ExportError, FileError, UserError.
    """
    tflite, file = report["tflite"], read_file(path)
    weights = weight_rows(file, model, tflite["target"])
    options = {"target": tflite["target"], "io": tflite["io"]}
    tflite = tflite | {
        "weight_storage": weight_storage,
        "weights": [dataclasses.asdict(row) | {"too_wide": row.too_wide} for row in weights],
        "bytes_by_layer": bytes_by_layer(weights),
        "latency": _latency(file, found.latency),
        "storages": {
            storage: _storage(file, path, found.latency)
            if storage == weight_storage
            else _other_storage(model, path, found.latency, options | {"weight_storage": storage})
            for storage in WEIGHT_STORAGES
        },
    }
    return report | _comparison(found) | {"tflite": tflite}


def _comparison(found: Verification) -> dict[str, Any]:
    layers = found.layers
    return {
        "mismatches": found.mismatches,
        "comparison": [dataclasses.asdict(row) for row in layers.rows],
        "comparison_examples": layers.examples,
        "output_comparison": {
            name: {pair: dataclasses.asdict(apart) for pair, apart in pairs.items()}
            for name, pairs in found.outputs.items()
        },
        "first_departure": {pair: _departure(layers, pair) for pair in PAIR_NAMES},
        "beyond_rounding": {
            pair: [row.tensor for row in layers.rows if row.beyond_rounding(pair)]
            for pair in PAIR_NAMES
        },
        "not_compared": layers.not_compared,
    }


def _departure(layers: LayerComparison, pair: str) -> dict[str, Any] | None:
    row = layers.first_departure(pair)
    if row is None:
        return None
    total = row.pairs[pair].total
    return {
        "layer": row.layer,
        "tensor": row.tensor,
        "operator": row.operator,
        "different": total.different,
        "codes": total.codes,
        "largest": total.largest,
    }


def _latency(file: FileModel, measured: list[Latency]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "interpreter": _interpreter(file),
        "measurements": [dataclasses.asdict(latency) for latency in measured],
    }


def _interpreter(file: FileModel) -> str:
    if runs_on_larq(file):
        return "Larq Compute Engine"
    return "LiteRT without XNNPACK" if file.target == "tflm" else "LiteRT"


def _storage(file: FileModel, path: str | os.PathLike, measured: list[Latency]) -> dict[str, Any]:
    return {
        "bytes": os.path.getsize(path),
        "weight_bytes": file.weight_bytes(),
        "latency": [dataclasses.asdict(latency) for latency in measured],
    }


def _other_storage(
    model: tf_keras.Model,
    path: str | os.PathLike,
    measured: list[Latency],
    options: dict[str, str],
) -> dict[str, Any]:
    """Of a file that is not kept, and so not checked: its size and speed do not depend on biases,
    which training has put on the other file's grid. An equal file is not measured again."""
    _, content = unchecked(model, **options)
    with tempfile.TemporaryDirectory() as folder:
        other = pathlib.Path(folder, "other.tflite")
        other.write_bytes(content)
        if content != pathlib.Path(path).read_bytes():
            measured = latencies(other)
        return _storage(read_file(other), other, measured)
