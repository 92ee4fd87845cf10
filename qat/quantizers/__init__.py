"""TFMOT quantizers that know their grid."""

from qat.quantizers.base import GridQuantizer
from qat.quantizers.binary import (
    BinaryActivationQuantizer,
    BinaryWeightQuantizer,
    BwnWeightQuantizer,
    DorefaBinaryWeightQuantizer,
    XnorWeightQuantizer,
)
from qat.quantizers.learned import LsqPlusQuantizer, LsqQuantizer, PactQuantizer
from qat.quantizers.odd import (
    DorefaActivationQuantizer,
    DorefaWeightQuantizer,
    StatsqQuantizer,
)
from qat.quantizers.rounding import Backward, LearnedGrid, fake_quantize
from qat.quantizers.ternary import TtqQuantizer, TwnQuantizer
from qat.quantizers.uniform import (
    FixedRangeQuantizer,
    LastValueQuantizer,
    MovingAverageQuantizer,
    UniformQuantizer,
)

__all__ = [
    "Backward",
    "BinaryActivationQuantizer",
    "BinaryWeightQuantizer",
    "BwnWeightQuantizer",
    "DorefaActivationQuantizer",
    "DorefaBinaryWeightQuantizer",
    "DorefaWeightQuantizer",
    "FixedRangeQuantizer",
    "GridQuantizer",
    "LastValueQuantizer",
    "LearnedGrid",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "MovingAverageQuantizer",
    "PactQuantizer",
    "StatsqQuantizer",
    "TtqQuantizer",
    "TwnQuantizer",
    "UniformQuantizer",
    "XnorWeightQuantizer",
    "fake_quantize",
]
