"""Distillation: a quantized network learns from the class probabilities of a float one."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qat.callbacks.scheduled import Scheduled, hook_loss, unhook_loss
from qat.objective import ends_in_probability

_SMALLEST_PROBABILITY = 1e-7  # as tf_keras clips them


@tf_keras.utils.register_keras_serializable("qat")
class DistillationLoss(tf_keras.losses.Loss):
    """`w·T²·(-Σ softmax(t/T)·log softmax(s/T)) + (1 - w)·(-log softmax(s)[label])`.

    s are the student's logits, t the teacher's. T² keeps the size of the gradients.

    Args:
        temperature: T > 0. weight: w in [0, 1]. from_logits: whether the student's output is
            logits, else probabilities.

    Shapes: y_true (batch,) or (batch, 1), labels alone: then the loss is theirs; or, as
    `Distillation` makes it, (batch, 1 + classes) float32, label and teacher's logits. y_pred
    (batch, classes) float32.

    Raises:
        ValueError: a temperature or weight outside its range.

    Source: Hinton et al., arXiv 1503.02531; with T = 1 and w = 1, ReActNet arXiv 2003.03488.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        weight: float = 1.0,
        from_logits: bool = True,
        name: str = "distillation",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight is the teacher's share in [0, 1], got {weight!r}")
        self.temperature = temperature
        self.weight = weight
        self.from_logits = from_logits

    def call(self, y_true, y_pred):
        y_true, logits = tf.convert_to_tensor(y_true), _logits(y_pred, self.from_logits)
        taught = y_true.shape.rank == 2 and y_true.shape[-1] == logits.shape[-1] + 1
        labels = y_true[:, 0] if y_true.shape.rank == 2 else y_true
        of_labels = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.cast(labels, tf.int32), logits
        )
        if not taught:
            return of_labels
        of_teacher = tf.nn.softmax_cross_entropy_with_logits(
            tf.nn.softmax(y_true[:, 1:] / self.temperature), logits / self.temperature
        )
        whole = self.weight * self.temperature**2 * of_teacher
        return whole if self.weight == 1.0 else whole + (1.0 - self.weight) * of_labels

    def get_config(self) -> dict[str, Any]:
        own = {"temperature": self.temperature, "weight": self.weight}
        return {**super().get_config(), **own, "from_logits": self.from_logits}


class Distillation(Scheduled):
    """Lets a model that is compiled with `DistillationLoss` see a teacher's logits beside labels.

    The teacher runs in inference inside the training step, on the same batch; it is not changed.
    Metrics see the labels alone, so that "accuracy" is the accuracy on labels.

    Args:
        teacher: a classifier of the same classes whose output is logits or a softmax.
    """

    def __init__(self, teacher: tf_keras.Model):
        super().__init__()
        self.teacher = teacher
        self._from_logits = not ends_in_probability(teacher.outputs[0])
        self._target = None

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self._target is None:
            self._target = self.with_teacher
            hook_loss(self.model, target=self._target)

    def with_teacher(self, x, labels) -> tf.Tensor:
        """(batch, 1 + classes) float32: the label, the teacher's logits."""
        logits = _logits(self.teacher(x, training=False), self._from_logits)
        labels = tf.reshape(tf.cast(labels, tf.float32), [-1, 1])
        return tf.stop_gradient(tf.concat([labels, logits], axis=-1))

    def finish(self):
        if self._target is not None:
            unhook_loss(self.model, self._target)
            self._target = None


def _logits(output: tf.Tensor, are_logits: bool) -> tf.Tensor:
    """The logits that an output is, or was made of, float32; else those of its probabilities."""
    before = output if are_logits else getattr(output, "_keras_logits", None)
    if before is not None:
        return tf.cast(before, tf.float32)
    return tf.math.log(tf.maximum(tf.cast(output, tf.float32), _SMALLEST_PROBABILITY))
