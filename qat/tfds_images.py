"""TFDS image classification datasets, opened by name: what they hold, their splits, their pixels.

Every failure is a DataError of one line. Pixels leave as uint8 0-255 of one size, whatever the
dataset holds: uint16 images are divided by 257, and all are resized (bilinear, antialiased, rounded
to integers) where the size asked for differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from qat.tfds_builders import DataError, find_builder, is_prepared, one_line, prepare

DEFAULT_IMAGE_SIZE = 96
_FEWEST_TO_HOLD_OUT_OF = 10
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsImages:
    """An opened dataset: examples are (image uint8 (height, width, channels), label int64 ())."""

    builder: tfds.core.DatasetBuilder
    image_key: str
    label_key: str
    image_shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Name, config and version: "fashion_mnist/3.0.1"."""
        return self.builder.info.full_name

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in the order of the labels; "0", "1", ... where TFDS has no names."""
        return tuple(self.builder.info.features[self.label_key].names)

    def count(self, split: str) -> int:
        """The number of examples in a TFDS split expression.

        Raises DataError if the expression is not legal here, holds nothing, or a file is missing.
        """
        splits = self.builder.info.splits
        try:
            selected = splits[split]
            files, examples = selected.filepaths, selected.num_examples
        except (ValueError, AssertionError, KeyError) as error:
            raise DataError(
                f"dataset {self.name!r} has no split {split!r}; legal: {', '.join(splits)}, "
                "or slices and sums of them such as 'test[:100]' and 'train[90%:]+test'"
            ) from error
        if not examples:
            raise DataError(f"split {split!r} of dataset {self.name!r} holds no examples")
        for file in files:
            if not file.exists():
                raise self.unreadable(split, f"{file} is missing")
        return examples

    def read(self, split: str) -> tf.data.Dataset:
        """The examples of a split, always in the same order."""
        features = self.builder.info.features
        sized = tuple(features[self.image_key].shape) == self.image_shape

        def example(record: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            image = record[self.image_key]
            if image.dtype == tf.uint16:
                image = (tf.cast(image, tf.int32) + 128) // 257
            if not sized:
                image = tf.image.resize(image, self.image_shape[:2], antialias=True)
                image = tf.clip_by_value(tf.round(image), 0.0, 255.0)
            image = tf.ensure_shape(tf.cast(image, tf.uint8), self.image_shape)
            return image, tf.cast(record[self.label_key], tf.int64)

        keys = {self.image_key: True, self.label_key: True}
        dataset = self.builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders=tfds.decode.PartialDecoding(keys) if len(features) > 2 else None,
            read_config=tfds.ReadConfig(try_autocache=False),
        )
        return dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)

    def unreadable(self, split: str, reason: object) -> DataError:
        """The error for prepared files that are missing or damaged."""
        return DataError(
            f"split {split!r} of dataset {self.name!r} cannot be read: {one_line(reason)}; "
            f"delete {self.builder.data_path} and prepare the dataset again"
        )

    def choose_splits(self) -> dict[str, str]:
        """TFDS expressions for "train", "validation" and "test": see `qat.data`."""
        info = self.builder.info
        if "train" not in info.splits:
            raise DataError(
                f"dataset {self.name!r} has no split 'train' to train on; it has: "
                f"{', '.join(info.splits)} (evaluation can read any of them)"
            )
        validation = next((name for name in _VALIDATION_NAMES if name in info.splits), None)
        test = "test" if "test" in info.splits and self._has_labels("test") else None
        if validation and test:
            return {"train": "train", "validation": validation, "test": test}
        if (count := self.count("train")) < _FEWEST_TO_HOLD_OUT_OF:
            raise DataError(
                f"split 'train' of dataset {self.name!r} has {count} examples, and parts of 10 % "
                f"are held out of it; at least {_FEWEST_TO_HOLD_OUT_OF} are needed"
            )
        if info.disable_shuffling:
            logging.warning(
                "%s is stored unshuffled: the part of train that is held out may differ from the "
                "rest.",
                self.name,
            )
        if validation or test:
            held_out = {"train": "train[:90%]", "validation": "train[90%:]"}
            return held_out | {"test": test or validation}
        return {"train": "train[:80%]", "validation": "train[80%:90%]", "test": "train[90%:]"}

    def first_label(self, split: str) -> int:
        """The label of the first example; raises as `count`, and DataError for damaged files."""
        self.count(split)
        try:
            _, label = next(self.read(split).take(1).as_numpy_iterator())
        except tf.errors.OpError as error:
            raise self.unreadable(split, error.message) from error
        return int(label)

    def require_labels(self, split: str, labels: Sequence[int]) -> None:
        """Raises DataError unless all of these labels of the split name a class."""
        least, most = min(labels), max(labels)
        if least < 0 or most >= len(self.class_names):
            raise DataError(
                f"split {split!r} of dataset {self.name!r} has labels from {least} to {most} where "
                f"0 to {len(self.class_names) - 1} are legal; it is not labelled"
            )

    def _has_labels(self, split: str) -> bool:
        """False where a challenge kept its test labels back: TFDS stores them as -1."""
        label = self.first_label(split)
        if label < 0:
            logging.warning("Split %r of %s has no labels and is not used.", split, self.name)
        return label >= 0


def open_dataset(
    name: str, *, data_dir: str | None = None, image_size: int | tuple[int, int] | None = None
) -> TfdsImages:
    """Open, and on first use prepare, the dataset `name`: "digits", "cifar10", "name/config:1.0.0".

    `data_dir` is TFDS's (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets). `image_size` in
    pixels: a side or (height, width); None keeps the dataset's own, or takes 96x96 (and logs so)
    where the images vary. Images that have another aspect ratio are stretched. Raises DataError.
    """
    builder = find_builder(name, data_dir)
    image_key, label_key = _keys(name, builder.info)  # before a download that would be in vain
    if not is_prepared(builder):
        builder = prepare(name, builder, data_dir)
    features = builder.info.features
    if (features[label_key].num_classes or 0) < 2:
        told = "does not say how many classes it has"
        one = f"has {features[label_key].num_classes} classes, and there is nothing to tell apart"
        raise DataError(
            f"dataset {name!r} {told if features[label_key].num_classes is None else one}"
        )
    shape = _image_shape(name, tuple(features[image_key].shape), image_size)
    return TfdsImages(builder=builder, image_key=image_key, label_key=label_key, image_shape=shape)


def _keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """The names of the image and the label feature; DataError unless there is one of each."""
    features = info.features
    columns = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    supervised = info.supervised_keys or (None, None)
    images = [
        key
        for key, feature in columns.items()
        if isinstance(feature, tfds.features.Image)
        and not isinstance(feature, tfds.features.LabeledImage)
        and len(feature.shape) == 3
    ]
    labels = [k for k, feature in columns.items() if isinstance(feature, tfds.features.ClassLabel)]
    image_key = _the_one(images, supervised[0], "image", name, columns)
    label_key = _the_one(labels, supervised[1], "class label", name, columns)
    dtype = np.dtype(columns[image_key].np_dtype).name
    if dtype not in ("uint8", "uint16"):
        raise DataError(
            f"dataset {name!r} stores its images as {dtype}, whose range is not known; only uint8 "
            "and uint16 images can be used"
        )
    return image_key, label_key


def _the_one(found: Sequence[str], preferred: object, kind: str, name: str, columns: dict) -> str:
    """The feature of this kind: the one in TFDS's supervised_keys, else the only one."""
    if preferred in found:
        return str(preferred)
    if len(found) == 1:
        return found[0]
    got = f"several {kind} features ({', '.join(found)})" if found else f"no {kind} feature"
    raise DataError(
        f"dataset {name!r} has {got} and cannot be used for image classification; its features: "
        f"{', '.join(columns) or 'none'}"
    )


def _image_shape(
    name: str, shape: tuple, image_size: int | tuple[int, int] | None
) -> tuple[int, int, int]:
    height, width, channels = shape
    if channels is None:
        raise DataError(f"dataset {name!r} does not say how many channels its images have")
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"image_size must be a side or (height, width), got {image_size!r}")
    elif height is None or width is None:
        size = (DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)
        logging.warning("The images of %s vary in size: all are resized to %dx%d.", name, *size)
    else:
        size = (height, width)
    return (*size, channels)
