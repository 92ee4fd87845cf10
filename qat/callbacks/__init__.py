"""Keras callbacks that help a quantized network keep its accuracy, for `model.fit` and `qat.fit`.

`model.fit(…, callbacks=[qat.callbacks.FreezeBatchNorm(after=0.7)])` trains with one of them;
`qat.fit` makes them from the fields of `qat.TrainConfig`, keeps their state in its checkpoints and
resumes them bit for bit.
"""

from qat.callbacks.distillation import Distillation, DistillationLoss
from qat.callbacks.guards import Checkpoints, Interrupted, StopAtNan, TrainingError
from qat.callbacks.oscillations import Dampening, IterativeFreezing
from qat.callbacks.progress import Progress
from qat.callbacks.randomness import RandomByStep
from qat.callbacks.scheduled import Scheduled
from qat.callbacks.statistics import FreezeBatchNorm, FreezeRanges, ReestimateBatchNorm
from qat.callbacks.summaries import QuantizationSummaries
from qat.callbacks.widths import GradualBits

__all__ = [
    "Checkpoints",
    "Dampening",
    "Distillation",
    "DistillationLoss",
    "FreezeBatchNorm",
    "FreezeRanges",
    "GradualBits",
    "Interrupted",
    "IterativeFreezing",
    "Progress",
    "QuantizationSummaries",
    "RandomByStep",
    "ReestimateBatchNorm",
    "Scheduled",
    "StopAtNan",
    "TrainingError",
]
