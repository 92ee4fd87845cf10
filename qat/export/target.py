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
        arena: whether the kernels are tflite-micro's: they must run the file before it gets its
            name, all memory comes out of one arena, and C sources appear beside the file.
    """

    name: str
    dense: str = "FULLY_CONNECTED"
    arena: bool = False


LITERT = Target(name="litert")
# tflite-micro refuses FULLY_CONNECTED with INT4 kernels per channel, and rounds once where the
# reference kernel rounds twice (16 bits: the other way round). Its CONV_2D does neither.
TFLM = Target(name="tflm", dense="CONV_2D", arena=True)
TARGETS = {target.name: target for target in (LITERT, TFLM)}


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        ExportError: there is none.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; legal: {', '.join(TARGETS)}")
    return TARGETS[name]
