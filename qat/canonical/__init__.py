"""Bringing a float Keras model to the form that the quantizer works on."""

from qat.canonical.graph import Call, calls, consumers, functional, rebuild
from qat.canonical.passes import canonicalize

__all__ = ["Call", "calls", "canonicalize", "consumers", "functional", "rebuild"]
