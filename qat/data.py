"""Image classification data for training and evaluation: the same batches for the same seed.

Pixels are integers 0-255 (as float32) from disk to model, so that an exported uint8 file sees what
training saw. The training data is a pure function of (seed, epoch): a run resumed at any step sees
the batches that it would have seen.

Splits: a split "validation" is used as it is, else the last 10 % of train are held out. Without a
(labelled) split "test" the validation split is the test, and validation is held out of train. With
train alone: 80 % train, 10 % validation, 10 % test.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from qat.augmentation import Augmentation
from qat.tfds_images import DataError, TfdsImages, open_dataset

__all__ = [
    "Augmentation",
    "DataError",
    "DatasetSpec",
    "ImageData",
    "evaluation_split",
    "load",
]

MEMORY_BYTES = 500_000_000
SHUFFLE_BYTES = 128_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a dataset is; `splits` maps roles to TFDS expressions, `num_examples` to counts."""

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    splits: dict[str, str]
    num_examples: dict[str, int]

    @property
    def num_classes(self) -> int:
        """The number of classes, labels being 0 ... num_classes - 1."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """uint8 examples in a fixed order: arrays in memory, or a dataset that reads them again."""

    count: int
    arrays: tuple[tf.Tensor, tf.Tensor] | None
    stream: tf.data.Dataset

    def batches(
        self, size: int, *, seed: tf.Tensor | None = None, drop_remainder: bool = False
    ) -> tf.data.Dataset:
        """Batches (images, labels); shuffled if there is a seed (2,)."""
        if self.arrays is None:
            stream = self.stream
            if seed is not None:
                image_bytes = stream.element_spec[0].shape.num_elements()
                window = max(size, min(self.count, SHUFFLE_BYTES // image_bytes))
                seed = tf.random.stateless_uniform((), seed, 0, tf.int64.max, tf.int64)
                with _without_global_seed():
                    stream = stream.shuffle(window, seed, reshuffle_each_iteration=False)
            return stream.batch(size, drop_remainder)
        order = tf.range(self.count)
        if seed is not None:
            order = tf.random.experimental.stateless_shuffle(order, seed)
        indices = tf.data.Dataset.from_tensor_slices(order).batch(size, drop_remainder)
        images, labels = self.arrays
        return indices.map(lambda index: (tf.gather(images, index), tf.gather(labels, index)))


@contextlib.contextmanager
def _without_global_seed() -> Iterator[None]:
    """Inside a tf.data function: its seed is the operator's own.

    With a global seed of 0 TensorFlow would compare the operator's tensor seed with 0 as a bool.
    """
    graph = tf.compat.v1.get_default_graph()
    kept, graph.seed = graph.seed, None
    try:
        yield
    finally:
        graph.seed = kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData:
    """Batches (images float32 (n, height, width, channels) 0-255, labels int64 (n,)).

    Training batches are all of `batch_size` (the rest of an epoch is dropped) unless the split is
    smaller than one batch.
    """

    spec: DatasetSpec
    batch_size: int
    seed: int
    augmentation: Augmentation | None
    splits: dict[str, _Split]

    @property
    def name(self) -> str:
        """The dataset's, with its version."""
        return self.spec.name

    @property
    def steps_per_epoch(self) -> int:
        """The number of training batches in an epoch, at least 1."""
        return max(1, self.splits["train"].count // self.batch_size)

    def train_epoch(self, epoch: int, *, start_step: int = 0) -> tf.data.Dataset:
        """The batches of one epoch, shuffled and augmented, from `start_step` on.

        A function of (seed, epoch) alone; a dataset too large for memory is shuffled within a
        window only.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch must be 0 or more and start_step 0 to {self.steps_per_epoch}, got "
                f"epoch={epoch}, start_step={start_step}"
            )
        with tf.device("CPU"):
            epochs = tf.data.Dataset.from_tensors(tf.constant(epoch, tf.int64))
            return self._augmented(epochs.flat_map(self._epoch).skip(start_step))

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """Endless: epoch after epoch from step `start_step` of the whole training.

        For one `fit(..., steps_per_epoch=data.steps_per_epoch)`, resumed or not.
        """
        epoch, step = divmod(start_step, self.steps_per_epoch)
        with tf.device("CPU"):
            epochs = tf.data.Dataset.range(epoch, tf.int64.max)
            stream = self._augmented(epochs.flat_map(self._epoch).skip(step))
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return stream.apply(endless)

    @property
    def train(self) -> tf.data.Dataset:
        """The first epoch (the same batches at every iteration), e.g. to calibrate with."""
        return self.train_epoch(0)

    @property
    def validation(self) -> tf.data.Dataset:
        """The whole validation part in a fixed order, not augmented."""
        return _in_order(self.splits["validation"], self.batch_size)

    @property
    def test(self) -> tf.data.Dataset:
        """The whole test part in a fixed order, not augmented."""
        return _in_order(self.splits["test"], self.batch_size)

    def _epoch(self, epoch: int | tf.Tensor) -> tf.data.Dataset:
        """(seed (2,) of the batch, (images uint8, labels))."""
        train = self.splits["train"]
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.cast(epoch, tf.int64)])
        batches = train.batches(
            self.batch_size, seed=seed, drop_remainder=train.count >= self.batch_size
        )
        return batches.enumerate().map(lambda step, batch: (tf.random.fold_in(seed, step), batch))

    def _augmented(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        def finish(seed: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]):
            images, labels = batch
            if self.augmentation is not None:
                images = self.augmentation(images, seed)
            return tf.cast(images, tf.float32), labels

        return batches.map(finish, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def load(
    name: str,
    *,
    data_dir: str | None = None,
    batch_size: int,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    augment: bool | Augmentation = True,
    shift: int | None = None,
    flip: bool | None = None,
    cache: bool = True,
) -> ImageData:
    """Training, validation and test data of the TFDS dataset `name` ("digits", "cifar10", ...).

    `data_dir` and `image_size` as in `tfds_images.open_dataset`. `augment=True` takes
    `Augmentation.for_image`, with `shift` and `flip` where given. `cache` keeps each split of up to
    500 MB (uint8) in memory. Raises DataError, with one line, for whatever keeps the dataset from
    being used, and ValueError for a shift or flip beside another `augment`.
    """
    source = open_dataset(name, data_dir=data_dir, image_size=image_size)
    spec, splits = _read_splits(source, source.choose_splits(), cache)
    augmentation = _chosen(augment, spec, shift, flip)
    logging.info("Dataset %s, augmentation %s", spec, augmentation)
    return ImageData(
        spec=spec, batch_size=batch_size, seed=seed, augmentation=augmentation, splits=splits
    )


def _chosen(
    augment: bool | Augmentation, spec: DatasetSpec, shift: int | None, flip: bool | None
) -> Augmentation | None:
    if augment is not True:
        if (shift, flip) != (None, None):
            raise ValueError(f"shift and flip go with augment=True, not with augment={augment}")
        return augment or None
    try:
        return Augmentation.for_image(spec.image_shape, spec.class_names, shift=shift, flip=flip)
    except ValueError as error:
        raise DataError(f"dataset {spec.name!r}, --augment_shift={shift}: {error}") from error


def evaluation_split(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    batch_size: int,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[tf.data.Dataset, DatasetSpec]:
    """All examples of a TFDS split expression ("test", "test[:100]") in order, in batches.

    Elements as in ImageData; `splits` and `num_examples` of the spec have the one key `split`.
    Raises DataError, which lists the legal splits where `split` is not one.
    """
    source = open_dataset(name, data_dir=data_dir, image_size=image_size)
    spec, splits = _read_splits(source, {split: split}, cache=True)
    return _in_order(splits[split], batch_size), spec


def _in_order(split: _Split, batch_size: int) -> tf.data.Dataset:
    batches = split.batches(batch_size).map(lambda x, y: (tf.cast(x, tf.float32), y))
    return batches.prefetch(tf.data.AUTOTUNE)


def _read_splits(
    source: TfdsImages, expressions: dict[str, str], cache: bool
) -> tuple[DatasetSpec, dict[str, _Split]]:
    counts = {role: source.count(expression) for role, expression in expressions.items()}
    spec = DatasetSpec(
        name=source.name,
        image_shape=source.image_shape,
        class_names=source.class_names,
        splits=expressions,
        num_examples=counts,
    )
    splits = {}
    for role, expression in expressions.items():
        arrays = None
        if cache and counts[role] * int(np.prod(spec.image_shape)) <= MEMORY_BYTES:
            arrays = _to_memory(source, expression, counts[role])
        else:
            source.require_labels(expression, [source.first_label(expression)])
            logging.info("%s of %s is streamed", role, spec.name)
        stream = source.read(expression)
        splits[role] = _Split(count=counts[role], arrays=arrays, stream=stream)
    return spec, splits


def _to_memory(source: TfdsImages, split: str, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    images = np.empty((count, *source.image_shape), np.uint8)
    labels = np.empty(count, np.int64)
    filled = 0
    try:
        for batch_images, batch_labels in source.read(split).batch(256).as_numpy_iterator():
            rows = slice(filled, filled + len(batch_labels))
            images[rows], labels[rows] = batch_images, batch_labels
            filled = rows.stop
    except (tf.errors.OpError, ValueError) as error:
        raise source.unreadable(split, error) from error
    if filled != count:
        raise source.unreadable(split, f"it holds {filled} examples where {count} are recorded")
    source.require_labels(split, (labels.min(), labels.max()))
    with tf.device("CPU"):
        return tf.constant(images), tf.constant(labels)
