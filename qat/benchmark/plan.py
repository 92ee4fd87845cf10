"""What a benchmark does: its terms, and the runs that follow from them."""

from __future__ import annotations

import dataclasses
import pathlib

from qat.benchmark.candidate import Candidate
from qat.errors import UserError

SPLITS = ("validation", "test")
# The recipes that each peer has a counterpart of. Larq's second one starts from the checkpoint;
# its first is trained from scratch, as its own examples are.
FROM_CHECKPOINT = "w1a1-from-checkpoint"
PEERS: dict[str, tuple[str, ...]] = {
    "tfmot": ("w8a8", "w4a8", "w4a4", "w2a8", "w2a2"),
    "qkeras": ("w8a8", "w4a8", "w4a4", "w2a8", "wta8", "w2a2"),
    "larq": ("w1a1", FROM_CHECKPOINT),
}
# QKeras 0.9 needs the older pyparsing and does not say so.
ENVIRONMENT = (
    'python3.11 -m venv peers && peers/bin/python -m pip install "tensorflow-cpu==2.19.*" '
    '"tf-keras==2.19.*" "numpy<2" tensorflow-model-optimization larq qkeras "pyparsing<3.2"'
)
FLOAT, SAME_EPOCHS = "float", "float_same_epochs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What all runs of a benchmark share; results under other terms cannot be compared."""

    dataset: str
    model: str
    float_epochs: int
    batch_size: int
    learning_rate: float
    qat_learning_rate: float

    def learning_rate_of(self, source: str) -> float:
        """Of a run that is not ours: float goes on as all others do; Larq begins from scratch."""
        return self.learning_rate if source == "larq" else self.qat_learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One call of the benchmark; see `qat-benchmark --help` for the meaning of each field."""

    terms: Terms
    output_dir: pathlib.Path
    recipes: tuple[str, ...]
    peers: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: int = 3
    binary_epochs: int = 9
    split: str = "test"
    data_dir: str | None = None
    peer_python: str | None = None
    json: pathlib.Path | None = None
    command: str = ""

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"--split={self.split}: legal: {', '.join(SPLITS)}")
        for peer in self.peers:
            if peer not in PEERS:
                raise UserError(f"--peers: unknown peer {peer!r}; legal: {', '.join(PEERS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One network that is trained and measured.

    Attributes:
        seed: of weights, data order and augmentation.
        method: "float", "float_same_epochs", one of ours ("w2a2:distill=false"), or a peer's
            ("tfmot-w2a2"); unique together with seed and epochs.
        source: "float", "qat" or a peer.
        recipe: what it is a counterpart of, e.g. "w2a2"; "" for float.
        epochs: after the float checkpoint.
    """

    seed: int
    method: str
    source: str
    recipe: str
    epochs: int

    @property
    def label(self) -> str:
        """For the terminal."""
        return f"seed {self.seed}: {self.method}, {self.epochs} epochs"


def runs(plan: Plan) -> list[Run]:
    """All runs of a plan, seed by seed: float, its extra epochs, ours, the peers' counterparts."""
    ours = [Candidate.parse(text) for text in plan.recipes]
    trained = [
        (one.text, "qat", one.widths, one.epochs(plan.epochs, plan.binary_epochs)) for one in ours
    ]
    trained += [
        (f"{peer}-{name}", peer, widths, epochs)
        for peer in plan.peers
        for name in PEERS[peer]
        for _, _, widths, epochs in trained
        if widths == name.partition("-")[0]
    ]
    lengths = sorted({epochs for *_, epochs in trained})
    floats = [(FLOAT, FLOAT, "", 0), *((SAME_EPOCHS, FLOAT, "", epochs) for epochs in lengths)]
    return [
        Run(seed=seed, method=method, source=source, recipe=recipe, epochs=epochs)
        for seed in dict.fromkeys(plan.seeds)
        for method, source, recipe, epochs in dict.fromkeys([*floats, *trained])
    ]
