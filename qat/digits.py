"""The embedded dataset "digits": scikit-learn's hand-written digits as a real TFDS builder.

Importing this module registers it: `tfds.builder("digits")` then needs no network.
"""

from __future__ import annotations

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 images of 8x8 grey pixels, 10 classes; 1,437 to train and 360 to test.

    scikit-learn keeps pixels of 0-16; here they are round(v * 255 / 16), uint8 0-255.
    Source: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998
    (the test part, as in `sklearn.datasets.load_digits`).
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Stratified split by a fixed permutation."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing to download: the images come with scikit-learn
        from sklearn.datasets import load_digits  # slow to import, needed once per machine

        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        train, test = stratified_split(bunch.target)
        return {
            split: self._generate_examples(images, bunch.target, indices)
            for split, indices in (("train", train), ("test", test))
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray):
        for index in indices:
            yield int(index), {"image": images[index], "label": int(labels[index])}


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test): every fifth example of each class, after a fixed shuffle, is a test.

    Classes keep their shares to within one example. RandomState, because NumPy freezes its stream:
    the split is the same on every machine.
    """
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.arange(len(labels)) % 5 == 0
    return by_class[~is_test], by_class[is_test]
