"""Which type holds a kernel in the file, and which one its operator reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from qat.export.graph import ExportError, activation_dtype
from qat.export.target import Target
from qat.grid import Grid

WEIGHT_STORAGES = ("size", "speed")
# Narrowest first, with the bits of a code.
_BITS = {"int2": 2, "int4": 4, "int8": 8}


@dataclasses.dataclass(frozen=True)
class Container:
    """How a kernel lies in the file.

    Attributes:
        stored: type of the constant, `stored code = code / divisor`.
        read: type that the operator reads, `read code = stored code · factor`; where it is another,
            a DEQUANTIZE and a QUANTIZE stand between them.
    """

    stored: str
    read: str
    divisor: int = 1
    factor: int = 1

    @property
    def finer(self) -> float:
        """`scale of a code / scale of a read code`."""
        return self.factor / self.divisor

    def rounds_twice(self, operator: str, target: Target) -> bool:
        """Whether the target runs the operator on a kernel that rounds twice (`qat.ties`)."""
        return operator != "FULLY_CONNECTED" and (self.stored != "int8" or target.fixed_point)


def kernel_container(
    codes: np.ndarray,
    *,
    bits: int,
    unit: int,
    operator: str,
    output: Grid,
    storage: str,
    target: Target,
) -> Container:
    """The container of a kernel.

    Args:
        codes: in the file's layout, of `bits` bits but for the signs that negative gammas turned
            around; whole multiples of `unit`.
        operator: that reads the kernel.
        output: grid of its output.
        storage: "size", the fewest bytes; or "speed", the type that the operator is quickest with:
            FULLY_CONNECTED with INT4, all others with int8, which they need not unpack.
        target: the kernels that will run the file.
    """
    bits = max(bits, _width(codes))
    least = bits if unit == 1 else _width(codes // unit)
    reads = target.reads.get((activation_dtype(output), operator), ())
    dense = operator == "FULLY_CONNECTED"
    if storage == "speed":
        types = set(reads) & {"int4"} if dense else ()
    else:
        types = reads if dense or not target.unpacks else _BITS
    stored = _narrowest(least, types, row=codes.shape[-1] if dense else 4)
    divisor = unit if bits > _BITS[stored] else 1
    if stored == "int8" or stored in reads:
        return Container(stored, stored, divisor=divisor)
    most = max(1, int(np.abs(codes).max()) // divisor)
    return Container(stored, "int8", divisor=divisor, factor=127 // most)


def _narrowest(bits: int, types: Iterable[str], row: int = 4) -> str:
    """The narrowest type that holds the codes and whose rows of this many codes fill whole bytes.

    A FULLY_CONNECTED of other rows leaves XNNPACK for a kernel that rounds twice.
    """
    fits = (name for name in types if bits <= _BITS[name] and row * _BITS[name] % 8 == 0)
    return next(fits, "int8")


def _width(codes: np.ndarray) -> int:
    """Bits of the narrowest two's-complement integers that hold the codes."""
    return 1 + max(int(codes.max()), -int(codes.min()) - 1).bit_length()


def require_weight_storage(storage: str) -> None:
    """Raises ExportError unless it is one of WEIGHT_STORAGES."""
    if storage not in WEIGHT_STORAGES:
        legal = ", ".join(WEIGHT_STORAGES)
        raise ExportError(f"unknown weight_storage {storage!r}; legal: {legal}")


def pack(codes: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of whole numbers in INT2 or INT4: two's complement, the first in the lowest bits.

    Returns:
        uint8, the last byte filled up with zeros.
    """
    bits = _BITS[dtype]
    fields = codes.reshape(-1).astype(np.uint8) & (2**bits - 1)
    fields = np.pad(fields, (0, -len(fields) % (8 // bits))).reshape(-1, 8 // bits)
    return np.bitwise_or.reduce(fields << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
