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
        cls,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str] = (),
        *,
        shift: int | None = None,
        flip: bool | None = None,
    ) -> Augmentation:
        """What is given, and by default what is safe.

        The default shift goes by the shorter side: 1 px up to 16, 2 px up to 31, 4 px up to 64,
        then 1/16. By default only colour images whose classes all have names of words are flipped:
        digits, letters and numbered classes may change their meaning in a mirror.

        Raises:
            ValueError: a shift that is negative or leaves nothing of an image.
        """
        side = min(image_shape[:2])
        if shift is None:
            shift = 1 if side <= 16 else 2 if side < 32 else max(4, side // 16)
        elif not 0 <= shift < side:
            size = f"{image_shape[0]}x{image_shape[1]}"
            raise ValueError(f"its images are {size}; give a shift of 0 to {side - 1} pixels")
        if flip is None:
            words = all(len(name) > 1 and not name.isdigit() for name in class_names)
            flip = image_shape[2] >= 3 and bool(class_names) and words
        return cls(shift=shift, flip=flip)

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
