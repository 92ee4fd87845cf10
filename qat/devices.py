"""The devices that TensorFlow trains on."""

from __future__ import annotations

import tensorflow as tf

from qat.errors import UserError


def prepare(*, deterministic: bool, jit_compile: bool) -> None:
    """Lets GPUs take memory as they need it, and asks for deterministic kernels if wished.

    TensorFloat-32 is switched off: its 10 bits of mantissa cannot hold `code · scale`, so that a
    convolution would see other values than those on the grid.

    Raises:
        UserError: deterministic together with XLA, which lacks deterministic pooling gradients.
    """
    if deterministic and jit_compile:
        raise UserError("--deterministic and --jit_compile exclude each other; leave one out")
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if deterministic:
        tf.config.experimental.enable_op_determinism()


def strategy(name: str) -> tf.distribute.Strategy:
    """The strategy of --distribution: "none", "mirrored" (all GPUs of this machine) or
    "multi_worker" (the machines that TF_CONFIG names)."""
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()
