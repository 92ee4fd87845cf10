"""What a recipe says of a model's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qat.recipe import RecipeError, TensorSpec

NOT_ANNOTATED = "not annotated for quantization"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the recipe says of one layer: specs, or the reason why it stays in float."""

    weights: TensorSpec | None = None
    activations: TensorSpec | None = None
    keep_float: str | None = None


def wide_spec(decisions: Mapping[str, Decision]) -> TensorSpec:
    """The spec of tensors that no kernel wants narrow: 8 bits, or 16 in a model of 16.

    Raises:
        RecipeError: 16-bit activations mixed with narrower ones.
    """
    bits = {d.activations.bits for d in decisions.values() if d.activations is not None}
    if 16 in bits and bits != {16}:
        raise RecipeError(
            f"16-bit activations cannot be mixed with {sorted(bits - {16})} in one model; "
            "give every layer 16, or none"
        )
    return TensorSpec(bits=16 if bits == {16} else 8)
