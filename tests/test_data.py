from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import shutil
import socket
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download import downloader

from qat import data
from qat.digits import Digits
from qat.tfds_images import DataError, open_dataset

COLOURS = ("red", "green", "blue", "grey", "pink")


@dataclasses.dataclass(eq=False, kw_only=True)
class BlocksConfig(tfds.core.BuilderConfig):
    counts: dict = dataclasses.field(default_factory=lambda: {"train": 60, "test": 20})
    shape: tuple = (20, 24, 3)
    dtype: type = np.uint8
    unlabelled: str = ""
    images: tuple = ("picture",)
    supervised: bool = True
    classes: int = len(COLOURS)


CONFIGS = (
    BlocksConfig(name="plain"),
    BlocksConfig(name="three", counts={"train": 30, "val": 10, "test": 20}),
    BlocksConfig(name="alone", counts={"train": 50}),
    BlocksConfig(name="no_test", counts={"train": 40, "validation": 10}),
    BlocksConfig(name="secret", counts={"train": 40, "test": 10}, unlabelled="test"),
    BlocksConfig(name="only_test", counts={"test": 10}),
    BlocksConfig(name="varied", shape=(None, None, 3)),
    BlocksConfig(name="deep", shape=(9, 10, 1), dtype=np.uint16),
    BlocksConfig(name="rgba", shape=(9, 10, 4)),
    BlocksConfig(name="few", counts={"train": 9}),
    BlocksConfig(name="one_class", classes=1),
    BlocksConfig(name="float", shape=(9, 10, 1), dtype=np.float32),
    BlocksConfig(name="stereo", images=("left", "right"), supervised=False),
    BlocksConfig(name="stereo_supervised", images=("left", "right")),
)


class TestBlocks(tfds.core.GeneratorBasedBuilder):
    """Small random images, each different from every other, of five classes."""

    __test__ = False  # not a test, whatever pytest thinks of the name
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = list(CONFIGS)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        image = tfds.features.Image(shape=config.shape, dtype=config.dtype, encoding_format="png")
        features = {name: image for name in config.images}
        features |= {
            "kind": tfds.features.ClassLabel(names=COLOURS[: config.classes]),
            "id": tf.int64,
        }
        keys = (config.images[0], "kind") if config.supervised else None
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=keys
        )

    def _split_generators(self, dl_manager) -> dict:
        counts = self.builder_config.counts
        starts = itertools.accumulate(counts.values(), initial=0)
        return {
            split: self._generate_examples(split, range(start, start + count))
            for (split, count), start in zip(counts.items(), starts, strict=False)
        }

    def _generate_examples(self, split: str, numbers: range):
        for number in numbers:
            label = (
                -1
                if split == self.builder_config.unlabelled
                else number % self.builder_config.classes
            )
            images = {
                name: block(self.builder_config, number) for name in self.builder_config.images
            }
            yield number, images | {"kind": label, "id": number}


def block(config: BlocksConfig, number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    height, width, channels = config.shape
    if height is None:  # one colour, so that no resizing may change it
        size = (10 + number, 90 - number)
        return np.broadcast_to(rng.integers(0, 256, channels, np.uint8), (*size, channels))
    if config.dtype == np.float32:
        return rng.random(config.shape, np.float32)
    return rng.integers(0, np.iinfo(config.dtype).max + 1, config.shape, config.dtype)


def config_named(name: str) -> BlocksConfig:
    return next(config for config in CONFIGS if config.name == name)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def own_copy(data_dir, tmp_path) -> pathlib.Path:
    """A prepared "test_blocks/plain" that a test may damage: (data_dir)/test_blocks/plain/1.0.0."""
    open_dataset("test_blocks/plain", data_dir=data_dir)
    shutil.copytree(pathlib.Path(data_dir, "test_blocks"), tmp_path / "test_blocks")
    return tmp_path / "test_blocks" / "plain" / "1.0.0"


@functools.cache
def plain(data_dir: str, **options) -> data.ImageData:
    return data.load("test_blocks/plain", data_dir=data_dir, **({"batch_size": 8} | options))


def arrays(dataset: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def fingerprints(images: np.ndarray) -> list[bytes]:
    return [image.astype(np.uint8).tobytes() for image in images]


def assert_same(first: tf.data.Dataset, second: tf.data.Dataset) -> None:
    for left, right in zip(arrays(first), arrays(second), strict=True):
        np.testing.assert_array_equal(left, right)


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- digits


def test_digits_are_those_of_scikit_learn(data_dir):
    source = open_dataset("digits", data_dir=data_dir)
    counts, found = {}, collections.Counter()
    for split in ("train", "test"):
        images, labels = arrays(source.read(split).batch(2000))
        assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 1)
        counts[split] = len(labels)
        found.update(zip(fingerprints(images), labels.tolist(), strict=True))
    assert counts == {"train": 1437, "test": 360}

    bunch = load_digits()
    levels = [int(v * 255 / 16 + 0.5) for v in range(17)]
    assert levels[0] == 0 and levels[16] == 255
    expected = collections.Counter(
        (bytes(levels[int(v)] for v in image.ravel()), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    assert found == expected


def test_digits_split_is_stratified_and_fixed(data_dir):
    source = open_dataset("digits", data_dir=data_dir)
    images, labels = arrays(source.read("test").batch(360))
    shares = np.bincount(labels) - np.bincount(load_digits().target) / 5
    assert np.abs(shares).max() < 1
    digest = hashlib.sha256(b"".join(sorted(fingerprints(images)))).hexdigest()
    assert digest[:16] == "9e3a622c867f4cc1"


def test_digits_are_prepared_once_and_without_a_word(tmp_path, capsys):
    first = open_dataset("digits", data_dir=str(tmp_path))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert any("tfrecord" in file.name for file in written)
    assert capsys.readouterr().out == ""

    second = open_dataset("digits", data_dir=str(tmp_path))
    from_files = tfds.builder_from_directory(str(tmp_path / "digits" / "1.0.0"))
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == written
    assert_same(first.read("test").batch(50), second.read("test").batch(50))
    assert_same(
        first.read("test").batch(50),
        from_files.as_dataset(split="test", as_supervised=True).batch(50),
    )


def test_a_second_process_preparing_at_once_is_harmless(tmp_path, monkeypatch):
    generate = Digits._generate_examples
    other_process = []

    def overtaken(self, *arguments):
        if not other_process:  # another process prepares all of it while we are at it
            other_process.append("running")
            Digits(data_dir=str(tmp_path)).download_and_prepare()
        return generate(self, *arguments)

    monkeypatch.setattr(Digits, "_generate_examples", overtaken)
    source = open_dataset("digits", data_dir=str(tmp_path))
    assert other_process and source.count("train+test") == 1797
    assert len(arrays(source.read("train+test").batch(500))[1]) == 1797
    assert [f.name for f in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # nothing half made


# ---------------------------------------------------------------- what a dataset is


def test_spec_and_batches(data_dir):
    loaded = plain(data_dir)
    assert loaded.spec == data.DatasetSpec(
        name="test_blocks/plain/1.0.0",
        image_shape=(20, 24, 3),
        class_names=COLOURS,
        splits={"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
        num_examples={"train": 54, "validation": 6, "test": 20},
    )
    assert loaded.spec.num_classes == 5
    assert loaded.steps_per_epoch == 6
    images, labels = next(loaded.train.as_numpy_iterator())
    assert (images.shape, images.dtype) == ((8, 20, 24, 3), np.float32)
    assert (labels.shape, labels.dtype) == ((8,), np.int64)
    # Evaluation is in order and whole, the last batch too.
    config = config_named("plain")
    expected = {block(config, n).tobytes(): n % 5 for n in range(60, 80)}
    test_images, test_labels = arrays(loaded.test)
    assert dict(zip(fingerprints(test_images), test_labels.tolist(), strict=True)) == expected
    assert_same(loaded.test, loaded.test)


@pytest.mark.parametrize(
    ("config", "splits", "counts"),
    [
        ("plain", ("train[:90%]", "train[90%:]", "test"), (54, 6, 20)),
        ("three", ("train", "val", "test"), (30, 10, 20)),
        ("alone", ("train[:80%]", "train[80%:90%]", "train[90%:]"), (40, 5, 5)),
        ("no_test", ("train[:90%]", "train[90%:]", "validation"), (36, 4, 10)),
        ("secret", ("train[:80%]", "train[80%:90%]", "train[90%:]"), (32, 4, 4)),
    ],
)
def test_no_example_is_in_two_parts(data_dir, config, splits, counts):
    loaded = data.load(f"test_blocks/{config}", data_dir=data_dir, batch_size=1, augment=False)
    assert tuple(loaded.spec.splits.values()) == splits
    assert tuple(loaded.spec.num_examples.values()) == counts
    parts = [
        set(fingerprints(arrays(dataset)[0]))
        for dataset in (loaded.train, loaded.validation, loaded.test)
    ]
    assert tuple(len(part) for part in parts) == counts
    assert len(set.union(*parts)) == sum(counts)


@pytest.mark.parametrize("name", ["deep", "rgba"])
def test_other_channels_and_depths(data_dir, name):
    config = config_named(name)
    images, _ = arrays(data.load(f"test_blocks/{name}", data_dir=data_dir, batch_size=9).test)
    expected = [block(config, number) for number in range(60, 80)]
    if config.dtype == np.uint16:
        expected = [np.round(image / 257) for image in expected]
    assert sorted(fingerprints(images)) == sorted(fingerprints(np.array(expected)))


@pytest.mark.parametrize(
    ("image_size", "size"), [(None, (96, 96)), (32, (32, 32)), ((30, 50), (30, 50))]
)
def test_images_of_many_sizes_become_one(data_dir, monkeypatch, image_size, size):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    loaded = data.load(
        "test_blocks/varied", data_dir=data_dir, batch_size=20, image_size=image_size, augment=False
    )
    assert loaded.spec.image_shape == (*size, 3)
    said = [text for text in warnings if "vary in size: all are resized to 96x96" in text]
    assert len(said) == (1 if image_size is None else 0)
    images, _ = arrays(loaded.test)
    expected = {block(config_named("varied"), n)[0, 0].tobytes() for n in range(60, 80)}
    assert {image[0, 0].astype(np.uint8).tobytes() for image in images} == expected
    np.testing.assert_array_equal(images, images[:, :1, :1] + np.zeros_like(images))


def test_resizing_leaves_integers(data_dir):
    smaller = plain(data_dir, image_size=(7, 9)).test
    images, _ = arrays(smaller)
    assert images.shape[1:] == (7, 9, 3)
    np.testing.assert_array_equal(images, np.round(images))
    assert images.min() >= 0 and images.max() <= 255 and images.std() > 10


def test_supervised_keys_decide_between_two_images(data_dir):
    source = open_dataset("test_blocks/stereo_supervised", data_dir=data_dir)
    assert (source.image_key, source.label_key) == ("left", "kind")


# ---------------------------------------------------------------- order and resuming


@pytest.mark.parametrize("cache", [True, False])
def test_an_epoch_is_a_function_of_seed_and_epoch(data_dir, cache):
    one = plain(data_dir, cache=cache, seed=3)
    same = plain.__wrapped__(data_dir, cache=cache, seed=3)
    other = plain(data_dir, cache=cache, seed=4)
    assert_same(one.train_epoch(5), same.train_epoch(5))
    assert_same(one.train_epoch(5), one.train_epoch(5))
    images, labels = arrays(one.train_epoch(5))
    for different in (one.train_epoch(6), other.train_epoch(5), one.train):
        assert not np.array_equal(arrays(different)[1], labels)
    assert images.shape == (48, 20, 24, 3)


@pytest.mark.parametrize("cache", [True, False])
def test_an_epoch_shows_every_example_once(data_dir, cache):
    loaded = plain(data_dir, cache=cache, augment=False, batch_size=9)
    images, labels = arrays(loaded.train_epoch(1))
    config = config_named("plain")
    every = {block(config, number).tobytes(): number % 5 for number in range(60)}
    seen = dict(zip(fingerprints(images), labels.tolist(), strict=True))
    assert len(images) == len(seen) == 54 and seen.items() <= every.items()


@pytest.mark.parametrize("cache", [True, False])
def test_resuming_gives_the_batches_that_would_have_come(data_dir, cache):
    loaded = plain(data_dir, cache=cache)
    assert_same(loaded.train_epoch(2, start_step=4), loaded.train_epoch(2).skip(4))
    straight = loaded.train_epoch(0).skip(4)
    for epoch in (1, 2):
        straight = straight.concatenate(loaded.train_epoch(epoch))
    assert_same(loaded.train_stream(4).take(14), straight)
    assert_same(loaded.train_stream(13).take(3), loaded.train_epoch(2, start_step=1).take(3))
    assert loaded.train_stream().cardinality() == tf.data.INFINITE_CARDINALITY


def test_cached_and_streamed_evaluation_agree(data_dir):
    assert_same(plain(data_dir).validation, plain(data_dir, cache=False).validation)


def test_what_does_not_fit_in_memory_is_streamed(data_dir, monkeypatch):
    monkeypatch.setattr(data, "MEMORY_BYTES", 20 * 20 * 24 * 3)  # 20 images: the test split
    loaded = plain.__wrapped__(data_dir)
    assert {role: split.arrays is None for role, split in loaded.splits.items()} == {
        "train": True,
        "validation": False,
        "test": False,
    }


def test_fewer_examples_than_a_batch(data_dir):
    loaded = plain(data_dir, batch_size=100)
    assert loaded.steps_per_epoch == 1
    assert len(arrays(loaded.train)[1]) == 54
    assert len(arrays(loaded.train_stream().take(2))[1]) == 108


def test_positions_outside_of_an_epoch_are_refused(data_dir):
    loaded = plain(data_dir)
    for epoch, step in ((-1, 0), (0, -1), (0, 7)):
        with pytest.raises(ValueError, match="start_step 0 to 6"):
            loaded.train_epoch(epoch, start_step=step)


# ---------------------------------------------------------------- augmentation


def test_augmentation_shifts_and_mirrors_and_nothing_else():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 6, 7, 3), np.uint8)
    augment = data.Augmentation(shift=2, flip=True)
    seed = tf.constant([1, 2], tf.int64)
    result = augment(tf.constant(images), seed).numpy()
    np.testing.assert_array_equal(result, augment(tf.constant(images), seed))
    assert result.dtype == np.uint8

    drawn = collections.Counter()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for before, after in zip(padded, result, strict=True):
        moves = [
            (y, x, mirrored)
            for y, x, mirrored in itertools.product(range(5), range(5), (False, True))
            if np.array_equal(before[y : y + 6, x : x + 7][:, :: -1 if mirrored else 1], after)
        ]
        assert len(moves) == 1
        drawn[moves[0]] += 1
    # 600 draws of 50 moves, 12 expected each: Poisson gives 0 or more than 36 once in 10^4 runs,
    # and the seed is fixed.
    assert len(drawn) == 50 and max(drawn.values()) <= 36


def test_no_shift_and_no_flip_is_the_identity():
    images = np.random.default_rng(1).integers(0, 256, (4, 5, 6, 1), np.uint8)
    augment = data.Augmentation(shift=0, flip=False)
    np.testing.assert_array_equal(augment(tf.constant(images), tf.constant([0, 0])), images)


@pytest.mark.parametrize(
    ("shape", "names", "shift", "flip"),
    [
        ((8, 8, 1), "0123456789", 1, False),
        ((16, 40, 3), COLOURS, 1, True),
        ((28, 28, 1), ("T-shirt/top", "Trouser"), 2, False),
        ((32, 32, 3), "0123456789", 4, False),
        ((32, 32, 3), ("10", "11"), 4, False),
        ((32, 32, 3), COLOURS, 4, True),
        ((64, 64, 3), (), 4, False),
        ((96, 128, 3), COLOURS, 6, True),
    ],
)
def test_default_augmentation(shape, names, shift, flip):
    expected = data.Augmentation(shift=shift, flip=flip)
    assert data.Augmentation.for_image(shape, tuple(names)) == expected


def test_training_data_stay_integers_and_choose_their_augmentation(data_dir):
    assert plain(data_dir).augmentation == data.Augmentation(shift=2, flip=True)
    assert plain(data_dir, augment=False).augmentation is None
    own = data.Augmentation(shift=3, flip=False)
    assert plain(data_dir, augment=own).augmentation == own
    assert plain(data_dir, shift=0).augmentation == data.Augmentation(shift=0, flip=True)
    assert plain(data_dir, flip=False).augmentation == data.Augmentation(shift=2, flip=False)
    with pytest.raises(ValueError, match="go with augment=True"):
        plain(data_dir, augment=own, flip=True)
    images, _ = arrays(plain(data_dir).train)
    np.testing.assert_array_equal(images, np.round(images))
    assert images.min() == 0 and images.max() == 255
    raw, _ = arrays(plain(data_dir, augment=False).train)
    assert not np.array_equal(images, raw)


# ---------------------------------------------------------------- evaluation and mistakes


def test_evaluation_split(data_dir):
    dataset, spec = data.evaluation_split(
        "test_blocks/plain", "test[:7]+train[:2]", data_dir=data_dir, batch_size=4
    )
    assert spec.num_examples == {"test[:7]+train[:2]": 9} and spec.class_names == COLOURS
    images, labels = arrays(dataset)
    whole, whole_labels = arrays(plain(data_dir).test)
    assert len(labels) == 9
    np.testing.assert_array_equal(images[:7], whole[:7])
    np.testing.assert_array_equal(labels[:7], whole_labels[:7])


@pytest.mark.parametrize("split", ["validation", "test[:x]", "test+nope", ""])
def test_unknown_split_lists_the_legal_ones(data_dir, split):
    message = error_of(
        data.evaluation_split, "test_blocks/plain", split, data_dir=data_dir, batch_size=4
    )
    assert f"no split {split!r}; legal: train, test" in message


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("test_block/plain", ["knows no dataset 'test_block/plain'", "did you mean test_blocks"]),
        ("test_blocks/nope", ["'test_blocks/nope' cannot be opened", "BuilderConfig nope"]),
        ("test_blocks/plain:7.0.0", ["'test_blocks/plain:7.0.0' cannot be opened", "1.0.0"]),
        ("so what?", ["'so what?' cannot be opened"]),
        ("test_blocks/float", ["as float32", "only uint8 and uint16"]),
        ("test_blocks/stereo", ["several image features (left, right)"]),
        ("test_blocks/only_test", ["no split 'train'", "it has: test"]),
        ("test_blocks/few", ["train", "has 9 examples", "held out", "at least 10"]),
        ("test_blocks/one_class", ["has 1 classes"]),
        ("imdb_reviews", ["no image feature", "text, label"]),
        ("lsun", ["no class label feature", "id, image"]),
    ],
)
def test_unfit_datasets_say_why(data_dir, name, parts):
    message = error_of(data.load, name, data_dir=data_dir, batch_size=4)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("memory", [data.MEMORY_BYTES, 10])
def test_unlabelled_evaluation_is_refused(data_dir, memory, monkeypatch):
    """Of a split that is streamed too."""
    monkeypatch.setattr(data, "MEMORY_BYTES", memory)
    message = error_of(
        data.evaluation_split, "test_blocks/secret", "test", data_dir=data_dir, batch_size=4
    )
    assert "labels from -1 to -1 where 0 to 4 are legal" in message


@pytest.mark.parametrize("image_size", [0, (3, 4, 5)])
def test_image_size_is_checked(data_dir, image_size):
    message = error_of(plain, data_dir, image_size=image_size)
    assert "image_size must be a side or (height, width)" in message


def test_no_network_is_said_soon(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.monotonic()
    message = error_of(data.load, "cifar10", data_dir=str(tmp_path), batch_size=4)
    assert time.monotonic() - start < 20  # TFDS's own ten retries take 204 s
    assert "no connection to https://www.cs.toronto.edu" in message
    assert "tfds build cifar10" in message and "'digits' needs no network" in message
    assert downloader.MAX_RETRIES == 10


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    message = error_of(data.load, "digits", data_dir=str(tmp_path / "file"), batch_size=4)
    assert "could not be prepared" in message and "writable --data_dir" in message


def test_damaged_files_are_named(own_copy):
    root = str(own_copy.parents[2])
    record = next(own_copy.glob("*train.tfrecord*"))
    content = record.read_bytes()
    for damaged in (content[: len(content) // 2], b"\0" * len(content)):
        record.write_bytes(damaged)
        message = error_of(plain, root)
        assert "split 'train[:90%]'" in message and f"delete {own_copy}" in message
    record.unlink()
    message = error_of(plain, root)
    assert f"{record} is missing" in message and "prepare the dataset again" in message
    # What does not need the file still works.
    _, spec = data.evaluation_split("test_blocks/plain", "test", data_dir=root, batch_size=4)
    assert spec.num_examples == {"test": 20}


def test_a_folder_without_its_description(own_copy):
    (own_copy / "dataset_info.json").unlink()
    message = error_of(plain, str(own_copy.parents[2]))
    assert f"{own_copy} is incomplete, delete it" in message


@pytest.mark.slow
def test_fashion_mnist_as_tfds_made_it(fashion_mnist):
    loaded = data.load("fashion_mnist", batch_size=128)
    assert loaded.spec.num_examples == {"train": 54000, "validation": 6000, "test": 10000}
    assert loaded.augmentation == data.Augmentation(shift=2, flip=False)
    _, labels = arrays(loaded.test)
    assert np.bincount(labels).tolist() == [1000] * 10
    train, _ = arrays(data.load("fashion_mnist", batch_size=128, augment=False).train)
    assert train.shape == (421 * 128, 28, 28, 1)
