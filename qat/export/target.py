"""What the kernels that will run a file ask of its operators."""

from __future__ import annotations

import dataclasses

from qat.export.graph import ExportError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Kernels that a file is written for.

    Attributes:
        name: as `--target` spells it.
        dense: operator of a dense layer, FULLY_CONNECTED or CONV_2D (of 1×1).
        packs: types of activations beside which kernels are unpacked from less than 8 bits.
        arena: whether the kernels are tflite-micro's: they must run the file before it gets its
            name, all memory comes out of one arena, and C sources appear beside the file.
    """

    name: str
    dense: str = "FULLY_CONNECTED"
    packs: tuple[str, ...] = ("int8", "int16")
    arena: bool = False


LITERT = Target(name="litert")
# tflite-micro's FULLY_CONNECTED refuses INT4 kernels per channel and gives other codes than the
# reference kernel; its CONV_2D does neither. Beside int16 it unpacks nothing.
TFLM = Target(name="tflm", dense="CONV_2D", packs=("int8",), arena=True)
TARGETS = {target.name: target for target in (LITERT, TFLM)}


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        ExportError: there is none.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; legal: {', '.join(TARGETS)}")
    return TARGETS[name]
