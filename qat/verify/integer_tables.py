"""Operators that look their answers up: curves as tables of 256 codes, CAST and GATHER.

After tflite/kernels/{activations, exp, gelu, cast, gather}.cc. BUILTIN_REF has no ELU; its codes
here are those of the other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qat.verify.integer_call import Call
from qat.verify.integer_curves import lookup
from qat.verify.reader import ARRAY_TYPES

_HALF_ROOT = np.float32(math.sqrt(0.5))
_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _elu_curve(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.expm1(x.astype(np.float64)).astype(np.float32), x)


def _exp_curve(x: np.ndarray) -> np.ndarray:
    return np.exp(x.astype(np.float64)).astype(np.float32)


def _gelu_curve(x: np.ndarray) -> np.ndarray:
    complement = _erfc((-x * _HALF_ROOT).astype(np.float64)).astype(np.float32)
    return np.float32(0.5) * x * complement


def _table(curve: Callable[[np.ndarray], np.ndarray]) -> Callable[[Call], np.ndarray]:
    def from_table(call: Call) -> np.ndarray:
        """int8 only: the curve of each of the 256 codes."""
        (x,) = call.arguments(1)
        call.require_types("int8", values=(x,))
        return lookup(call, x, curve)

    return from_table


def gelu(call: Call) -> np.ndarray:
    """`x · Φ(x)`, by the error function."""
    call.require(not call.option("approximate"), "is GELU's approximation, which is not simulated")
    return _table(_gelu_curve)(call)


def cast(call: Call) -> np.ndarray:
    """Codes or numbers in another type; grids are not looked at."""
    (x,) = call.arguments(1)
    dtype = call.output.dtype
    call.require(
        x.dtype in ("int8", "int16", "int32", "float32") and dtype in ("int32", "int64"),
        f"casts {x.dtype} to {dtype}, which is not simulated",
    )
    call.require(bool(np.all(np.abs(x.codes.astype(np.float64)) < 2.0**31)), "leaves int32")
    return x.codes.astype(ARRAY_TYPES[dtype])


def gather(call: Call) -> np.ndarray:
    """Rows of a table, by their numbers."""
    table, index = call.arguments(2)
    call.require_types("int8", "int16", "float32", values=(table,))
    call.require(index.dtype in ("int32", "int64"), f"gathers by {index.dtype}")
    plain = call.option("axis") == 0 and call.option("batchDims") == 0 and len(table.shape) > 0
    call.require(plain, "gathers along another axis than the first")
    inside = bool(np.all((index.codes >= 0) & (index.codes < table.shape[0])))
    call.require(inside, f"gathers what is not among {table.shape[0]} rows")
    call.require_size((*index.shape, *table.shape[1:]))
    return table.codes[index.codes]


KERNELS: dict[str, Callable[[Call], np.ndarray]] = {
    "CAST": cast,
    "ELU": _table(_elu_curve),
    "EXP": _table(_exp_curve),
    "GATHER": gather,
    "GELU": gelu,
}
