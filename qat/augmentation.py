"""Random changes of training images that keep their pixels the integers they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random translation by up to `shift` pixels (the border repeats) and mirroring (`flip`).

    Both are index arithmetic: pixels stay the integers they were.
    """

    shift: int
    flip: bool

    @classmethod
    def for_image(
        cls, image_shape: tuple[int, int, int], class_names: Sequence[str] = ()
    ) -> Augmentation:
        """A default by the shorter side: 1 px up to 16, 2 px up to 31, 4 px up to 64, then 1/16.

        Flips colour images whose classes all have names of words. Digits, letters and numbered
        classes may change their meaning in a mirror and are never flipped.
        """
        side = min(image_shape[:2])
        shift = 1 if side <= 16 else 2 if side < 32 else max(4, side // 16)
        words = all(len(name) > 1 and not name.isdigit() for name in class_names)
        return cls(shift=shift, flip=image_shape[2] >= 3 and bool(class_names) and words)

    def __call__(self, images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Images (n, height, width, channels) of any dtype, a function of `seed` (2,) alone."""
        count, (height, width) = tf.shape(images)[0], images.shape[1:3]
        shifts = tf.random.stateless_uniform(
            (2, count, 1), seed, -self.shift, self.shift + 1, tf.int32
        )
        rows = tf.clip_by_value(tf.range(height) + shifts[0], 0, height - 1)
        columns = tf.clip_by_value(tf.range(width) + shifts[1], 0, width - 1)
        if self.flip:
            chance = tf.random.stateless_uniform((count, 1), tf.random.fold_in(seed, 1))
            columns = tf.where(chance < 0.5, width - 1 - columns, columns)
        images = tf.gather(images, rows, axis=1, batch_dims=1)
        return tf.gather(images, columns, axis=2, batch_dims=1)
