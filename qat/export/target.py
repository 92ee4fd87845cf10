"""What the kernels that will run a file ask of its operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qat.export.graph import ExportError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Kernels that a file is written for.

    Attributes:
        name: as `--target` spells it.
        dense: operator of a dense layer, FULLY_CONNECTED or CONV_2D (of 1×1).
        reads: for the activations' type and an operator, the packed types of kernels that it reads;
            all read int8.
        unpacks: whether DEQUANTIZE and QUANTIZE make int8 kernels of packed constants.
        fixed_point: whether convolutions with int8 kernels, too, round twice (`qat.ties`), not
            only those with packed ones.
        arena: whether the kernels are tflite-micro's: they must run the file before it gets its
            name, all memory comes out of one arena, and C sources appear beside the file.
    """

    name: str
    dense: str = "FULLY_CONNECTED"
    reads: Mapping[tuple[str, str], tuple[str, ...]]
    unpacks: bool = True
    fixed_point: bool = False
    arena: bool = False


# DEPTHWISE_CONV_2D accepts INT4 beside int16 activations, and computes garbage.
LITERT = Target(
    name="litert",
    reads={
        ("int8", "CONV_2D"): ("int4",),
        ("int8", "DEPTHWISE_CONV_2D"): ("int4",),
        ("int8", "FULLY_CONNECTED"): ("int2", "int4"),
        ("int16", "CONV_2D"): ("int4",),
        ("int16", "FULLY_CONNECTED"): ("int4",),
    },
)
# tflite-micro's FULLY_CONNECTED refuses INT4 kernels per channel and gives other codes than the
# reference kernel; its CONV_2D does neither. Beside int16 it unpacks nothing.
TFLM = Target(
    name="tflm",
    dense="CONV_2D",
    reads={("int8", "CONV_2D"): ("int4",), ("int8", "DEPTHWISE_CONV_2D"): ("int4",)},
    unpacks=False,
    fixed_point=True,
    arena=True,
)
# The TensorFlow Lite 2.16 in Larq Compute Engine 0.16 knows no INT2, and no dense INT4 kernels.
LCE = Target(
    name="lce",
    reads={("int8", "CONV_2D"): ("int4",), ("int8", "DEPTHWISE_CONV_2D"): ("int4",)},
    unpacks=False,
)
TARGETS = {target.name: target for target in (LITERT, TFLM, LCE)}


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        ExportError: there is none.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; legal: {', '.join(TARGETS)}")
    return TARGETS[name]
