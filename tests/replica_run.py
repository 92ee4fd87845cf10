"""Trains small networks under a strategy, in a process of its own: devices come before all else.

`python replica_run.py STRATEGY RESULT.npz RECIPE...`: STRATEGY as --distribution, "mirrored" on two
logical CPUs. RESULT receives for each recipe ("float": none) the losses of the epochs, the weights,
and whether all replicas here hold the same ones.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf
import tf_keras
from small_models import everywhere
from stripes import Stripes, float_model, quantized_model

from qat import devices
from qat.train import TrainConfig, fit

EPOCHS = 3


class Logs(tf_keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_end(self, epoch, logs=None):
        names = ("loss", "accuracy", "val_loss", "val_accuracy")
        self.epochs.append([float(logs[name]) for name in names])


def _model(recipe: str) -> tf_keras.Model:
    return float_model() if recipe == "float" else quantized_model(recipe=everywhere(recipe))


def copies_agree(variable: tf.Variable) -> bool:
    copies = [copy.numpy() for copy in getattr(variable, "values", [variable])]
    return all(np.array_equal(copies[0], copy) for copy in copies)


def main(distribution: str, result: str, *recipes: str) -> None:
    if distribution == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        logical = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, logical)
    strategy, found = devices.strategy(distribution), {}
    for recipe in recipes:
        with strategy.scope():
            model = _model(recipe)
        logs = Logs()
        fit(model, Stripes(), TrainConfig(epochs=EPOCHS, learning_rate=0.02), callbacks=[logs])
        found[f"{recipe}/epochs"] = np.array(logs.epochs)
        found[f"{recipe}/replicas"] = strategy.num_replicas_in_sync
        found[f"{recipe}/agree"] = all(map(copies_agree, model.weights))
        for index, weight in enumerate(model.weights):
            found[f"{recipe}/{index:02} {weight.name}"] = weight.numpy()
    np.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
