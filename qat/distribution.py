"""Training on several replicas: each step's batch is split, what it leaves is the same on all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from qat.callbacks.guards import TrainingError
from qat.canonical import functional
from qat.deep import deep_models
from qat.quantizers.base import over_replicas


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes; always true on a single machine."""
    return strategy.extended.should_checkpoint


def split(data: tf.data.Dataset, strategy: tf.distribute.Strategy) -> tf.data.Dataset:
    """The batches as `Model.fit` takes them: the replicas' rows of each make up the whole.

    Replica r of R gets rows r, r + R, r + 2R … of every batch, so that a step sees the examples
    that it would see on one device, in whatever order machines read. Every machine reads all
    batches and keeps its rows. With one replica it is the dataset itself.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return data

    def of_machine(context: tf.distribute.InputContext) -> tf.data.Dataset:
        here = replicas // context.num_input_pipelines
        first = context.input_pipeline_id * here

        def rows(*batch: tf.Tensor) -> tf.data.Dataset:
            own = tf.data.Dataset.range(first, first + here)
            return own.map(lambda r: tf.nest.map_structure(lambda x: x[r::replicas], batch))

        return data.flat_map(rows).prefetch(tf.data.AUTOTUNE)

    return strategy.distribute_datasets_from_function(of_machine)


def by_examples(data: tf.data.Dataset | None) -> tf.data.Dataset | None:
    """A finite dataset that Keras will share out to machines example by example, not by files."""
    if data is None:
        return None
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return data.with_options(options)


def require_same_step(step: int, strategy: tf.distribute.Strategy) -> None:
    """Makes sure that all machines resume at one step: they must see the same checkpoints.

    Raises:
        TrainingError: they do not.
    """
    if strategy.num_replicas_in_sync == 1:
        return

    @tf.function
    def lowest_and_highest() -> list[tuple[tf.Tensor, tf.Tensor]]:
        own = tf.constant(float(step))
        return strategy.experimental_local_results(strategy.run(over_replicas, (own, own)))

    lowest, highest = (int(number) for number in lowest_and_highest()[0])
    if lowest != highest:
        raise TrainingError(
            f"machines would resume at steps {lowest} and {highest}; give all of them one "
            "--output_dir on a file system that they share"
        )


@deep_models()
def local(model: tf_keras.Model) -> tf_keras.Model:
    """The model, or if replicas share its variables a copy that is this process's own.

    Every machine must call it, outside of the strategy's scope: reading batch normalization's
    statistics takes all of them. Whoever has the copy needs the others no more.
    """
    if model.distribute_strategy is tf.distribute.get_strategy():
        return model
    with tfmot.quantization.keras.quantize_scope():
        copy = tf_keras.models.clone_model(functional(model))
    copy.set_weights(model.get_weights())
    return copy


@contextlib.contextmanager
def batch_norm_over_replicas(
    model: tf_keras.Model, strategy: tf.distribute.Strategy
) -> Iterator[None]:
    """Inside, batch normalization in training takes its statistics over all replicas.

    Per replica they would be those of a smaller batch, and the network another one for every number
    of devices. Keras's fused kernel cannot do that, nor has this variance its factor n / (n - 1).
    """
    changed = []
    if strategy.num_replicas_in_sync > 1:
        for layer in model.submodules:
            if isinstance(layer, tf_keras.layers.BatchNormalization) and not layer.synchronized:
                changed.append((layer, layer.fused))
                layer.synchronized, layer.fused = True, False
    try:
        yield
    finally:
        for layer, fused in changed:
            layer.synchronized, layer.fused = False, fused
