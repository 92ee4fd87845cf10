"""The devices that TensorFlow trains on."""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from qat.errors import UserError

DISTRIBUTIONS = ("none", "mirrored", "multi_worker", "tpu")


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
    """The strategy of --distribution: one of `DISTRIBUTIONS`.

    "mirrored" takes all GPUs of this machine (all logical CPUs where it has none), "multi_worker"
    the machines that TF_CONFIG names, "tpu" the TPU that TPU_NAME or the machine names.

    Raises:
        UserError: no TF_CONFIG, one that cannot be read, or no TPU.
    """
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name == "multi_worker":
        _require_tf_config()
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "tpu":
        return tf.distribute.TPUStrategy(_tpu())
    return tf.distribute.get_strategy()


def require_legal(
    strategy: tf.distribute.Strategy, batch_size: int, jit_compile: bool, mixed_precision: str
) -> None:
    """Refuses what replicas cannot do, before any step.

    Raises:
        UserError: a batch that replicas cannot share evenly, XLA with several of them (which cannot
            exchange statistics inside of a compiled step), float16 on a TPU.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        raise UserError(
            f"--batch_size={batch_size} cannot be shared by {replicas} replicas; give a multiple "
            f"of {replicas}"
        )
    tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    if jit_compile and replicas > 1 and not tpu:
        raise UserError(
            f"--jit_compile works on one device, and --distribution has {replicas} replicas; leave "
            "one out"
        )
    if tpu and mixed_precision == "float16":
        raise UserError("--mixed_precision=float16 is nothing for a TPU; give bfloat16")


def account(
    strategy: tf.distribute.Strategy, jit_compile: bool, mixed_precision: str
) -> dict[str, Any]:
    """What a run computed on, for its report."""
    return {
        "strategy": type(strategy).__name__,
        "replicas": strategy.num_replicas_in_sync,
        "mixed_precision": mixed_precision,
        "jit_compile": jit_compile,
    }


def _require_tf_config() -> None:
    given = os.environ.get("TF_CONFIG")
    example = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", '
    example += '"index": 0}}'
    if not given:
        raise UserError(
            f"--distribution=multi_worker needs TF_CONFIG in the environment, e.g. {example}"
        )
    try:
        config = json.loads(given)
        machines = config["cluster"]["worker"]
        if config["task"]["type"] == "worker":
            machines[config["task"]["index"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"TF_CONFIG cannot be read ({error!r}); e.g. {example}") from error


def _tpu() -> tf.distribute.cluster_resolver.TPUClusterResolver:
    try:
        return tf.distribute.cluster_resolver.TPUClusterResolver.connect()
    except (ValueError, OSError, tf.errors.OpError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--distribution=tpu: no TPU was found ({reason}); set TPU_NAME, or use another "
            "--distribution"
        ) from error
