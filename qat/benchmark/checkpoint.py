"""The float network that all runs of a seed start from, trained once."""

from __future__ import annotations

from collections.abc import Callable

import tf_keras

from qat.benchmark import networks
from qat.benchmark.plan import Terms
from qat.benchmark.store import Store
from qat.data import ImageData
from qat.float_model import save_float_model


def make_float_model(
    store: Store,
    seed: int,
    terms: Terms,
    data: ImageData,
    build: Callable[[], tf_keras.Model],
    *,
    wait: bool,
) -> None:
    """Trains the checkpoint, unless it is there or another process is training it.

    Args:
        store: knows where it lies. seed: of weights. terms: epochs and learning rate.
        data: to train on, in the seed's order.
        build: makes the untrained network.
        wait: for the other process.

    Raises:
        TrainingError: the loss is no longer a number.
    """
    path = store.float_model(seed)
    with store.claimed(path, wait=wait) as mine:
        if not mine or path.exists():
            return
        print(f"seed {seed}: float network, {terms.float_epochs} epochs", flush=True)
        tf_keras.utils.set_random_seed(seed)
        model = build()
        networks.train_plainly(model, data, terms.float_epochs, terms.learning_rate)
        save_float_model(model, path)
