"""Images of a TFDS dataset in the channels, range and targets of a model that exists already."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf
import tf_keras

from qat.data import ImageData
from qat.errors import ModelError
from qat.objective import SPARSE, Objective, objective


def converts_channels(given: int, wanted: int) -> bool:
    """Whether `in_channels` makes images of so many channels of these: grey ones and colours."""
    return wanted == given or {wanted, given} == {1, 3}


def in_channels(images: tf.Tensor, wanted: int) -> tf.Tensor:
    """Images of 1 or 3 channels as the other kind, if a model wants that."""
    if images.shape[-1] == wanted:
        return images
    return (tf.image.grayscale_to_rgb if wanted == 3 else tf.image.rgb_to_grayscale)(images)


def in_range(images: tf.Tensor, input_range: tuple[float, float]) -> tf.Tensor:
    """Pixels 0 to 255 in a model's units."""
    low, high = input_range
    return images / 255.0 * (high - low) + low


@dataclasses.dataclass(frozen=True)
class ModelImages:
    """Batches (images float32 in `input_range`, targets), see `qat.data.ImageData`.

    Args:
        images: of the model's height and width.
        model: one image input, one output.
        input_range: what pixels 0 and 255 become.
        loss: a Keras loss's name, or nothing for cross-entropy on labels. Losses on other targets
            than labels get one-hot vectors, or labels 0 and 1 as they are for an output of one.

    Raises:
        ModelError: channels or classes of model and dataset that do not go together.
    """

    images: ImageData
    model: tf_keras.Model
    input_range: tuple[float, float]
    loss: Sequence[str] = ()

    def __post_init__(self):
        wanted, given = self.model.inputs[0].shape[-1], self.images.spec.image_shape[-1]
        if not converts_channels(given, wanted):
            raise ModelError(
                f"model {self.model.name!r} takes images of {wanted} channels, {self.name} has "
                f"{given}"
            )
        shape, classes = self.model.outputs[0].shape, self.images.spec.num_classes
        if len(shape) != 2 or not (shape[-1] == classes or (shape[-1], classes) == (1, 2)):
            raise ModelError(
                f"model {self.model.name!r} gives {tuple(shape[1:])} for an image, and {self.name} "
                f"has {classes} classes"
            )
        if not self.has_classes and {SPARSE, "categorical_crossentropy"} & set(self.loss):
            raise ModelError(
                f"--loss={','.join(self.loss)} needs a number for each class, and model "
                f"{self.model.name!r} gives one for both; take binary_crossentropy"
            )

    @property
    def name(self) -> str:
        """The dataset's, with its version."""
        return self.images.name

    @property
    def objective(self) -> Objective | None:
        """What the loss says; None for labels of one vector of classes."""
        if not self.loss and self.model.outputs[0].shape[-1] == 1:
            return objective(self.model, ["binary_crossentropy"])
        return None if self._labels_alone else objective(self.model, self.loss)

    @property
    def steps_per_epoch(self) -> int:
        """The number of training batches in an epoch, at least 1."""
        return self.images.steps_per_epoch

    @property
    def validation(self) -> tf.data.Dataset:
        """The validation part in a fixed order."""
        return self.images.validation.map(self._batch)

    @property
    def test(self) -> tf.data.Dataset:
        """The test part in a fixed order; its targets are labels where there are classes."""
        if self.has_classes:
            return self.images.test.map(lambda images, labels: (self._inputs(images), labels))
        return self.images.test.map(self._batch)

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """Endless batches from this step of the training on."""
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return self.images.train_stream(start_step).map(self._batch).apply(endless)

    @property
    def has_classes(self) -> bool:
        """Whether the output has a number for each class, not one for both."""
        return self.model.outputs[0].shape[-1] > 1

    @property
    def _labels_alone(self) -> bool:
        return set(self.loss) <= {SPARSE} and self.has_classes

    def _inputs(self, images: tf.Tensor) -> tf.Tensor:
        return in_range(in_channels(images, self.model.inputs[0].shape[-1]), self.input_range)

    def _batch(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images = self._inputs(images)
        if self._labels_alone:
            return images, labels
        if self.has_classes:
            return images, tf.one_hot(labels, self.images.spec.num_classes)
        return images, tf.cast(labels, tf.float32)[:, None]
