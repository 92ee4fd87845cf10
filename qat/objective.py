"""What a training minimizes, output by output: Keras losses and the metrics that go with them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.canonical import is_operator_call, operator_symbol
from qat.errors import ModelError, UserError
from qat.layers import FakeQuantize

SPARSE = "sparse_categorical_crossentropy"
# From the loss of an output follows which metric people read: {loss: metric class}.
_METRICS = {
    SPARSE: tf_keras.metrics.SparseCategoricalAccuracy,
    "categorical_crossentropy": tf_keras.metrics.CategoricalAccuracy,
    "binary_crossentropy": tf_keras.metrics.BinaryAccuracy,
}
_LEGAL = (
    SPARSE,
    "categorical_crossentropy",
    "binary_crossentropy",
    "mean_squared_error",
    "mean_absolute_error",
    "huber",
)
# Behind which an output is still a probability.
_CHANGES_NO_NUMBER = (
    FakeQuantize,
    tf_keras.layers.ActivityRegularization,
    tf_keras.layers.Dropout,
    tf_keras.layers.Flatten,
    tf_keras.layers.Identity,
    tf_keras.layers.Permute,
    tf_keras.layers.Reshape,
)
_OPERATORS_CHANGE_NO_NUMBER = ("cast", "identity", "reshape", "squeeze")
_OPERATORS = {"nn.softmax": "softmax", "nn.sigmoid": "sigmoid", "math.sigmoid": "sigmoid"}


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """The loss of one output.

    Attributes:
        name: of a Keras loss, e.g. "mean_squared_error" or "huber".
        from_logits: whether the output lacks the softmax or sigmoid that the loss expects; without
            meaning for losses that expect none.
    """

    name: str
    from_logits: bool = False

    @property
    def function(self) -> Callable:
        """`loss(y_true, y_pred)`, one number for an example (and a position)."""
        found = _keras_loss(self.name)
        if "from_logits" not in inspect.signature(found).parameters:
            return found
        made = functools.partial(found, from_logits=self.from_logits)
        return functools.update_wrapper(made, found)

    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """The metric that people read beside this loss, if there is one."""
        kind = _METRICS.get(_keras_loss(self.name).__name__)
        if kind is None:
            return []
        if kind is tf_keras.metrics.BinaryAccuracy and self.from_logits:
            return [kind("accuracy", threshold=0.0)]
        return [kind("accuracy")]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of all outputs, which are summed."""

    outputs: tuple[OutputLoss, ...]

    def losses(self) -> list[Callable]:
        """For `compile`."""
        return [output.function for output in self.outputs]

    def metrics(self) -> list[list[tf_keras.metrics.Metric]]:
        """For `compile`; new ones at each call."""
        return [output.metrics() for output in self.outputs]

    def value(self, y_true: Sequence[tf.Tensor], y_pred: Sequence[tf.Tensor]) -> tf.Tensor:
        """The sum of the outputs' mean losses on a batch, float32 ()."""
        pairs = zip(self.losses(), y_true, y_pred, strict=True)
        return tf.add_n([tf.reduce_mean(loss(true, pred)) for loss, true, pred in pairs])


def classification(*, from_logits: bool) -> Objective:
    """Cross-entropy of labels 0 … classes - 1 with the one output."""
    return Objective((OutputLoss(SPARSE, from_logits),))


def objective(model: tf_keras.Model, names: Sequence[str]) -> Objective:
    """The objective of a model whose outputs have these losses, one name for all or one for each.

    Raises:
        UserError: a name that Keras does not know, or a wrong number of them.
        ModelError: outputs that are a dictionary.
    """
    _require_ordered_outputs(model)
    outputs = model.output_names
    if len(names) not in (1, len(outputs)):
        raise UserError(
            f"--loss={','.join(names)}: give one loss, or one for each of the outputs "
            f"{', '.join(outputs)}"
        )
    for name in names:
        _keras_loss(name)
    each = list(names) * len(outputs) if len(names) == 1 else names
    logits = [not ends_in_probability(tensor) for tensor in model.outputs]
    return Objective(tuple(map(OutputLoss, each, logits)))


def imitation(model: tf_keras.Model) -> Objective:
    """The objective of learning the outputs of another model of the same kind.

    Cross-entropy where they are a softmax's probabilities, else the squared error.
    """
    _require_ordered_outputs(model)
    kinds = [last_activation(tensor) == "softmax" for tensor in model.outputs]
    names = ["categorical_crossentropy" if kind else "mean_squared_error" for kind in kinds]
    return Objective(tuple(OutputLoss(name, from_logits=False) for name in names))


def require_targets(
    chosen: Objective, model: tf_keras.Model, targets: Sequence[np.ndarray], place: str
) -> None:
    """Refuses targets that an objective cannot compare with the model's outputs.

    Args:
        targets: one array for each output. place: where they come from, for messages.

    Raises:
        UserError: a shape other than the loss needs, or labels outside the classes.
    """
    for own, tensor, name, target in zip(
        chosen.outputs, model.outputs, model.output_names, targets, strict=True
    ):
        shape, given = tuple(tensor.shape[1:]), tuple(target.shape[1:])
        function = _keras_loss(own.name).__name__
        if function == "binary_crossentropy" and target.size:
            _require_probabilities(target, f"{place}: loss {own.name} compares output {name!r}")
        if function != SPARSE:
            if given != shape:
                raise UserError(
                    f"{place}: loss {own.name} compares output {name!r}, {shape} an example, with "
                    f"targets of the same shape; got {given}"
                )
        elif given not in (shape[:-1], (*shape[:-1], 1)) or target.dtype.kind not in "iub":
            raise UserError(
                f"{place}: loss {own.name} compares output {name!r}, {shape} an example, with "
                f"integer labels of shape {shape[:-1]}; got {target.dtype} of shape {given}"
            )
        elif target.size and not 0 <= target.min() <= target.max() < shape[-1]:
            raise UserError(
                f"{place}: labels of output {name!r} lie in [{target.min()}, {target.max()}], its "
                f"classes in [0, {shape[-1] - 1}]"
            )


def _require_probabilities(target: np.ndarray, comparison: str) -> None:
    if not 0 <= target.min() <= target.max() <= 1:
        raise UserError(
            f"{comparison} with targets of 0 to 1; got {target.min()} to {target.max()}"
        )


def as_targets(tensor: Any, target: np.ndarray) -> np.ndarray:
    """Targets as an output compares them: labels in floats as int64, numbers with an axis of one.

    Args:
        tensor: the output. target: one row an example.
    """
    shape, given = tuple(tensor.shape[1:]), tuple(target.shape[1:])
    if shape == (1,) and given == ():
        return target[:, None]
    whole = target.dtype.kind == "f" and bool((target == np.rint(target)).all())
    labels = target.astype(np.int64) if whole else target
    return labels if takes_labels(tensor, labels) else target


def takes_binary_labels(tensor: Any, target: np.ndarray) -> bool:
    """Whether the targets are 0 and 1 for an output of one probability."""
    one = tuple(tensor.shape[1:]) == tuple(target.shape[1:]) == (1,)
    return one and last_activation(tensor) == "sigmoid" and bool(np.isin(target, (0, 1)).all())


def takes_labels(tensor: Any, target: np.ndarray) -> bool:
    """Whether the targets look like labels of an output's classes."""
    shape, given = tuple(tensor.shape[1:]), tuple(target.shape[1:])
    integers = target.dtype.kind in "iub" and shape[-1] is not None and shape[-1] > 1
    return integers and given in (shape[:-1], (*shape[:-1], 1)) and given != shape


def ends_in_probability(tensor: Any) -> bool:
    """Whether a model's output comes from a softmax or sigmoid."""
    return last_activation(tensor) in ("softmax", "sigmoid")


def last_activation(tensor: Any) -> str:
    """The name of the activation that a model's output comes from; "" for none."""
    layer = tensor.node.layer
    if isinstance(layer, tf_keras.Model):
        return last_activation(layer.outputs[tensor._keras_history.tensor_index])
    if _changes_no_number(layer):
        return last_activation(tensor.node.keras_inputs[0])
    if is_operator_call(layer):  # a float model's
        return _OPERATORS.get(operator_symbol(layer), "")
    layer = getattr(layer, "layer", layer)  # a wrapper's own
    if isinstance(layer, tf_keras.layers.Softmax):
        return "softmax"
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return "softmax" if name == tf.nn.softmax.__name__ else name


def _require_ordered_outputs(model: tf_keras.Model) -> None:
    if isinstance(model._nested_outputs, dict):
        raise ModelError(
            f"model {model.name!r} gives a dictionary of outputs, and losses go by their order; "
            "give tf_keras.Model(model.inputs, model.outputs), or calibrate only"
        )


def _changes_no_number(layer: tf_keras.layers.Layer) -> bool:
    if is_operator_call(layer):
        return operator_symbol(layer) in _OPERATORS_CHANGE_NO_NUMBER
    # As of mixed precision, whose last layer casts to float32.
    linear = getattr(layer, "activation", None) is tf_keras.activations.linear
    passes = isinstance(layer, tf_keras.layers.Activation) and linear
    return passes or isinstance(layer, _CHANGES_NO_NUMBER)


def _keras_loss(name: str) -> Callable:
    try:
        found = tf_keras.losses.get(name)
    except ValueError as error:
        raise UserError(
            f"--loss={name} is no loss of Keras; e.g. {', '.join(_LEGAL)}, or one that "
            "--custom_objects brings"
        ) from error
    if not (inspect.isfunction(found) and len(inspect.signature(found).parameters) >= 2):
        raise UserError(f"--loss={name}: give its function's name, e.g. {', '.join(_LEGAL)}")
    return found
