"""How well a trained network does, as a file and as a Keras model, and how large it is."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras

from qat import configs
from qat.forward import predictor
from qat.verify.interpreter import Runner

BATCH_SIZE = 1000


def model_classes(model: tf_keras.Model, images: tf.data.Dataset) -> np.ndarray:
    """The class that the model picks for each example of batches (x, y): int64 (examples,)."""
    predict = predictor(model)
    batches = images.rebatch(BATCH_SIZE)
    return np.concatenate([predict(x).numpy().argmax(-1) for x, _ in batches])


def file_classes(path: str | os.PathLike, images: tf.data.Dataset) -> np.ndarray:
    """The class that a .tflite file picks for each example of batches (x, y): int64 (examples,).

    One interpreter a core, each with its share of the images: a file of batch size 1 gives the
    threads of one interpreter too little to do.

    Raises:
        FileError: the interpreter refuses the file or the images.
    """
    runners = [Runner(path, threads=1) for _ in range(_cores())]
    found = []
    with concurrent.futures.ThreadPoolExecutor(len(runners)) as pool:
        for x, _ in images.rebatch(BATCH_SIZE):
            parts = np.array_split(x.numpy(), min(len(runners), len(x)))
            found += pool.map(_picked, runners[: len(parts)], parts)
    return np.concatenate(found)


def labels_of(images: tf.data.Dataset) -> np.ndarray:
    """The labels of batches (x, y): int64 (examples,)."""
    return np.concatenate([y.numpy() for _, y in images])


def packed_weight_bytes(model: tf_keras.Model, bits: Callable[[tf_keras.layers.Layer], int]) -> int:
    """Bytes of kernels, their codes packed without gaps, and of an int32 bias for each channel.

    What a file would need, for networks that no file is written of.

    Args:
        model: the float network. bits: a code of this layer's kernel takes.
    """
    total = 0
    for layer in model.layers:
        for name, axes in configs.kernels(layer).items():
            shape = getattr(layer, name).shape
            size, channels = int(np.prod(shape)), int(np.prod([shape[axis] for axis in axes]))
            total += -(-size * bits(layer) // 8) + 4 * channels
    return total


def float_weight_bytes(model: tf_keras.Model) -> int:
    """Bytes of all weights as float32."""
    return 4 * sum(int(np.prod(weight.shape)) for weight in model.weights)


def _picked(runner: Runner, images: np.ndarray) -> np.ndarray:
    return runner.run(images)[0].values.argmax(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
