"""--strict: a report as it should be, and each breach on its own."""

from __future__ import annotations

import copy

import pytest

from qat.errors import UserError
from qat.strict import breaches, require_strict

NONE = {"codes": 100, "different": 0, "largest": 0, "histogram": []}
SOME = {"codes": 100, "different": 7, "largest": 3, "histogram": []}
PAIRS = ("keras_default", "keras_reference", "default_reference", "reference_simulator")


def row(tensor: str) -> dict:
    return {
        "layer": tensor.removesuffix("_relu"),
        "tensor": tensor,
        "operator": "CONV_2D",
        "pairs": {pair: {"total": SOME, "own": SOME} for pair in PAIRS},
    }


REPORT = {
    "agreement": 0.995,
    "integers_match": True,
    "mismatches": [],
    "comparison": [row("conv1_relu"), row("conv2_relu")],
    "beyond_rounding": {pair: [] for pair in PAIRS},
    "not_compared": {},
    "tflite": {
        "float_operators": [],
        "target": "litert",
        "weight_storage": "size",
        "weights": [
            {"tensor": "conv1/kernel", "stored": "int8", "narrowest": "int4", "too_wide": False}
        ],
    },
}


def report(**changes) -> dict:
    made = copy.deepcopy(REPORT) | changes
    return made


def tflite(**changes) -> dict:
    return {"tflite": copy.deepcopy(REPORT["tflite"]) | changes}


WIDE = [{"tensor": "conv1/kernel", "stored": "int8", "narrowest": "int4", "too_wide": True}]
NOT_SIMULATED = {"reference_simulator": "simulator: LceQuantize is not simulated"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"agreement": None},
        {"agreement": 0.99},
        tflite(weights=WIDE, weight_storage="speed"),
        tflite(target="lce") | {"not_compared": NOT_SIMULATED},
        {"not_compared": {"image_fake_quantize": "the file takes its codes as they are"}},
    ],
)
def test_what_is_no_breach(changes):
    assert list(breaches(report(**changes))) == []
    require_strict(report(**changes))


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"integers_match": False, "mismatches": ["conv2/kernel: 3 of 9 integers differ"]},
            ["integers", "conv2/kernel: 3 of 9"],
        ),
        (tflite(float_operators=["EXP", "ADD", "EXP"]), ["float", "1 ADD, 2 EXP"]),
        ({"agreement": 0.9}, ["0.9000", "0.99"]),
        (tflite(weights=WIDE), ["conv1/kernel", "int8", "int4"]),
        (
            {"not_compared": NOT_SIMULATED},
            ["reference kernels", "integer simulator", "not compared", "LceQuantize"],
        ),
        (
            tflite(target="lce") | {"not_compared": {"keras_reference": "no such kernel"}},
            ["Keras", "reference kernels", "no such kernel"],
        ),
    ],
)
def test_each_breach_is_named(changes, named):
    (breach,) = breaches(report(**changes))
    assert all(part in breach for part in named), breach


@pytest.mark.parametrize("pair", PAIRS)
def test_the_first_layer_that_departs_by_its_own_doing_is_named(pair):
    beyond = REPORT["beyond_rounding"] | {pair: ["conv2_relu", "later"]}
    (breach,) = breaches(report(beyond_rounding=beyond))
    assert "'conv2'" in breach and "CONV_2D" in breach
    assert "7 of 100" in breach and "by up to 3" in breach


def test_all_breaches_stand_in_one_line():
    with pytest.raises(UserError) as error:
        require_strict(report(agreement=0.5, **tflite(weights=WIDE)))
    message = str(error.value)
    assert message.startswith("--strict: ") and "\n" not in message
    assert "0.5000" in message and "conv1/kernel" in message
