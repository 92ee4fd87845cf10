"""What every quantizer here is: a TFMOT `Quantizer` that can name the integers it makes."""

from __future__ import annotations

import abc
from typing import Any

import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from qat.grid import Grid


class GridQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """A TFMOT quantizer whose output always lies on a `Grid`.

    `weights` is the dictionary that `build` returned. `inputs` is the tensor to quantize; only
    quantizers whose range is the tensor's own need it. `method` is the quantizer's name in recipes,
    `num_bits` the width that it makes, `code_unit` what all codes are whole multiples of,
    `cuts_negatives` whether it can only cover numbers from 0 up. Equal are two of one class with
    equal configs.
    """

    method = ""
    num_bits: int
    code_unit = 1
    cuts_negatives = False

    @property
    def container_bits(self) -> int:
        """Width of the smallest two's-complement integer that holds all codes of a kernel."""
        return self.num_bits

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        """The quantizer's variables, made by `layer.add_weight`; none unless a subclass says so."""
        return {}

    # AutoGraph would read and rewrite every function below, and finds nothing to do.
    @tf.autograph.experimental.do_not_convert
    def __call__(
        self, inputs: tf.Tensor, training: bool, weights: dict[str, Any], **kwargs
    ) -> tf.Tensor:
        """The inputs on the grid, in their dtype; training moves ranges that follow the data."""
        if _only_shapes_matter():
            return tf.identity(inputs)
        return self.quantized(inputs, training, weights)

    @abc.abstractmethod
    def quantized(self, inputs: tf.Tensor, training: bool, weights: dict[str, Any]) -> tf.Tensor:
        """What a call gives."""

    @abc.abstractmethod
    def grid(self, weights: dict[str, Any], inputs: tf.Tensor | None = None) -> Grid:
        """The grid that the forward pass rounds to now; training and export both ask here.

        Raises:
            ValueError: the range comes from data or from `inputs`, and there was none.
        """

    def codes(self, inputs: tf.Tensor, weights: dict[str, Any]) -> tf.Tensor:
        """The integers (float32 whole numbers) that stand for `inputs` on the grid."""
        return self.grid(weights, inputs).quantize(inputs)

    def set_range(self, weights: dict[str, Any], minimum: Any, maximum: Any) -> bool:
        """Makes the grid cover [minimum, maximum], float32, shaped as the quantizer's own range.

        Returns:
            Whether there is a range to set: not if it is fixed or follows the tensor.
        """
        return False

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    __hash__ = None


def _only_shapes_matter() -> bool:
    """Whether Keras builds a model: it calls each layer in a graph that it throws away."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    return getattr(graph, "name", "").endswith("_scratch_graph")


def required(inputs: tf.Tensor | None, quantizer: GridQuantizer) -> tf.Tensor:
    """The tensor that a quantizer takes its grid from.

    Raises:
        ValueError: there is none.
    """
    if inputs is None:
        raise ValueError(
            f"{type(quantizer).__name__} takes its grid from the tensor: call grid(weights, inputs)"
        )
    return inputs


def straight_through(x: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`values` forward, the identity backward: `dx = g`. Both float, of one shape and dtype."""

    @tf.custom_gradient
    def forward(x, values):
        return tf.identity(values), lambda upstream: (upstream, None)

    return forward(x, values)


def range_shape(tensor_shape, channel_axes: tuple[int, ...] | None) -> list[int]:
    """The shape of a range that broadcasts against the tensor: [] or ones but for the channels."""
    if channel_axes is None:
        return []
    kept = {axis % len(tensor_shape) for axis in channel_axes}
    return [size if axis in kept else 1 for axis, size in enumerate(tensor_shape)]


def over_replicas(minimum: tf.Tensor, maximum: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The lowest minimum and the highest maximum of all replicas, each of which calls it.

    So ranges are those of the step's whole batch, on any number of devices. float32, one shape.
    """
    context = tf.distribute.get_replica_context()
    replicas = 1 if context is None else context.num_replicas_in_sync
    if replicas == 1:
        return minimum, maximum
    both = tf.stack([-minimum, maximum])[tf.newaxis]  # one exchange instead of two
    own = tf.one_hot(context.replica_id_in_sync_group, replicas, on_value=True, off_value=False)
    own = tf.reshape(own, [replicas] + [1] * (both.shape.rank - 1))
    # A sum, where each adds to a row of its own: replicas know how to add, and neither maxima
    # nor (beside other exchanges, in TensorFlow 2.21) to gather.
    rows = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.where(own, both, 0.0))
    widest = tf.reduce_max(rows, axis=0)
    return -widest[0], widest[1]


def range_variable(
    layer: tf_keras.layers.Layer, name: str, shape: list[int], initializer: Any = "zeros"
) -> tf.Variable:
    """A float32 variable that training updates but no optimizer does.

    Replicas average what they assign; what `over_replicas` gave is equal on all of them.
    """
    return layer.add_weight(
        name,
        shape=shape,
        dtype=tf.float32,
        initializer=initializer,
        trainable=False,
        experimental_autocast=False,
        synchronization=tf.VariableSynchronization.AUTO,
        aggregation=tf.VariableAggregation.MEAN,
    )


def trained_variable(
    layer: tf_keras.layers.Layer, name: str, shape: list[int], initializer: str, regularizer=None
) -> tf.Variable:
    """A float32 variable that the optimizer trains, placed behind the weights of a wrapped layer.

    TFMOT's wrapper lists the wrapped layer's weights first if that layer was built before (by
    `quantize_apply`), else last (when a file is loaded), and files know weights by their order.
    """
    listed = {id(weight) for weight in layer._trainable_weights}
    inner = getattr(layer, "layer", None)
    for weight in [] if inner is None else inner.trainable_weights:
        if id(weight) not in listed:
            layer._trainable_weights.append(weight)
    return layer.add_weight(
        name,
        shape=shape,
        dtype=tf.float32,
        initializer=initializer,
        regularizer=regularizer,
        trainable=True,
        experimental_autocast=False,
    )
