"""Any functional model as plain layers: what rules name, and TFMOT can annotate."""

from __future__ import annotations

import tf_keras

from qat.canonical.affines import join_affines
from qat.canonical.flatten import flatten
from qat.canonical.graph import functional
from qat.canonical.made import Origins
from qat.canonical.operators import is_rewritten, operators_to_layers
from qat.operator_layers import Affine


def as_layers(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, Origins]]:
    """The model without nested models, operator calls and helper layers; itself if it has none.

    Returns:
        (model, origins): origins holds, by name, the (name, class name) pairs of the user's layers
        that a layer stands for or lay in, for layers where that is not itself.

    Raises:
        ModelError: a model that is not functional, or an operator call that no layer does.
    """
    model, origins = functional(model), {}
    if any(isinstance(layer, tf_keras.Model) for layer in model.layers):
        model, origins = flatten(model)
    if any(is_rewritten(layer) for layer in model.layers):
        model, found = operators_to_layers(model)
        origins = _composed(origins, found)
        if any(isinstance(layer, Affine) for layer in model.layers):
            model, found = join_affines(model)
            origins = _composed(origins, found)
    return model, origins


def _composed(before: dict[str, Origins], after: dict[str, Origins]) -> dict[str, Origins]:
    """The origins of layers whose own origins had origins."""
    composed = {
        name: tuple(
            dict.fromkeys(known for pair in pairs for known in before.get(pair[0], (pair,)))
        )
        for name, pairs in after.items()
    }
    return {**before, **composed}
