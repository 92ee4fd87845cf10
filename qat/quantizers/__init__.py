"""TFMOT quantizers that know their grid."""

from qat.quantizers.base import GridQuantizer, fake_quantize
from qat.quantizers.binary import BinaryActivationQuantizer, BinaryWeightQuantizer
from qat.quantizers.uniform import (
    FixedRangeQuantizer,
    LastValueQuantizer,
    MovingAverageQuantizer,
    UniformQuantizer,
)

__all__ = [
    "BinaryActivationQuantizer",
    "BinaryWeightQuantizer",
    "FixedRangeQuantizer",
    "GridQuantizer",
    "LastValueQuantizer",
    "MovingAverageQuantizer",
    "UniformQuantizer",
    "fake_quantize",
]
