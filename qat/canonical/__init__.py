"""Bringing a float Keras model to the form that the quantizer works on."""

from qat.canonical.as_layers import as_layers
from qat.canonical.flatten import leaves
from qat.canonical.graph import Call, calls, consumers, functional, rebuild, stand_ins
from qat.canonical.operators import is_operator_call, operator_symbol
from qat.canonical.passes import canonicalize

__all__ = [
    "Call",
    "as_layers",
    "calls",
    "canonicalize",
    "consumers",
    "functional",
    "is_operator_call",
    "leaves",
    "operator_symbol",
    "rebuild",
    "stand_ins",
]
