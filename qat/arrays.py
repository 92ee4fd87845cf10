"""Examples from an .npz file: inputs and targets of any rank, split and batched the same each time.

`x` (or one array for each input, by its name) and, for training, `y` (or one for each output).
A fifth of the examples is held out for the report, a tenth for validation.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat.errors import QatError

_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.1
_LEAST_EXAMPLES = 3


class ArrayError(QatError):
    """An .npz file that cannot be read, or does not fit the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayData:
    """Batches (x, y), or (x,) where there are no targets.

    Attributes:
        name: for reports.
        x, y: arrays by position in the model's inputs and outputs; y is empty without targets.
        order: (examples,) int64, the shuffled examples: test, then validation, then training.
    """

    name: str
    model: tf_keras.Model
    x: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]
    order: np.ndarray
    batch_size: int
    seed: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Examples for training, validation and test."""
        total = len(self.order)
        test, validation = (max(1, int(total * s)) for s in (_TEST_SHARE, _VALIDATION_SHARE))
        return total - test - validation, validation, test

    @property
    def steps_per_epoch(self) -> int:
        """The number of training batches in an epoch, at least 1."""
        return max(1, self.counts[0] // self.batch_size)

    @property
    def validation(self) -> tf.data.Dataset:
        """The validation part in a fixed order."""
        _, validation, test = self.counts
        return self._batches(self.order[test : test + validation])

    @property
    def test(self) -> tf.data.Dataset:
        """The part that is held out for the report, in a fixed order."""
        return self._batches(self.order[: self.counts[2]])

    def train_stream(self, start_step: int = 0) -> tf.data.Dataset:
        """Endless batches, shuffled anew each epoch, a function of seed and step alone."""
        train = tf.constant(self.order[-self.counts[0] :])
        whole = self.counts[0] >= self.batch_size
        epoch, step = divmod(start_step, self.steps_per_epoch)

        def shuffled(number: tf.Tensor) -> tf.data.Dataset:
            seed = tf.stack([tf.constant(self.seed, tf.int64), number])
            order = tf.random.experimental.stateless_shuffle(train, seed)
            return tf.data.Dataset.from_tensor_slices(order).batch(self.batch_size, whole)

        with tf.device("CPU"):
            order = tf.data.Dataset.range(epoch, tf.int64.max).flat_map(shuffled).skip(step)
            stream = self._gathered(order)
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return stream.apply(endless)

    def _batches(self, order: np.ndarray) -> tf.data.Dataset:
        return self._gathered(tf.data.Dataset.from_tensor_slices(order).batch(self.batch_size))

    def _gathered(self, order: tf.data.Dataset) -> tf.data.Dataset:
        with tf.device("CPU"):
            x, y = tf.nest.map_structure(tf.constant, (self.x, self.y))
        types = [tensor.dtype for tensor in self.model.inputs]
        nested_inputs, nested_outputs = self.model._nested_inputs, self.model._nested_outputs

        def batch(index: tf.Tensor) -> Any:
            inputs = [tf.cast(tf.gather(a, index), t) for a, t in zip(x, types, strict=True)]
            inputs = _packed(nested_inputs, inputs)
            if not y:
                return (inputs,)
            return inputs, _packed(nested_outputs, [tf.gather(array, index) for array in y])

        return order.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def load_arrays(
    path: str, model: tf_keras.Model, *, batch_size: int, seed: int, flag: str
) -> ArrayData:
    """The file's examples for a model.

    Args:
        path: of the .npz file. flag: named in messages.

    Raises:
        ArrayError: unreadable, arrays missing or too many, shapes that do not fit, too few
            examples, NaN or infinite values.
    """
    arrays = _read(path, flag)
    x = _chosen(arrays, "x", model.input_names, f"{flag}={path}")
    y = _chosen(arrays, "y", model.output_names, f"{flag}={path}", optional=True)
    if arrays:
        raise ArrayError(
            f"{flag}={path} holds arrays that belong to nothing: {', '.join(arrays)}; legal: "
            f"{_names('x', model.input_names)}, and for training "
            f"{_names('y', model.output_names)}"
        )
    count = len(x[0])
    for array in (*x, *y):
        if len(array) != count:
            sizes = ", ".join(str(len(each)) for each in (*x, *y))
            raise ArrayError(f"{flag}={path}: arrays hold different numbers of examples: {sizes}")
    for array, tensor, name in zip(x, model.inputs, model.input_names, strict=True):
        if not tensor.shape[1:].is_compatible_with(array.shape[1:]):
            raise ArrayError(
                f"{flag}={path}: input {name!r} takes examples of shape {tuple(tensor.shape[1:])}, "
                f"the file holds {array.shape[1:]}"
            )
        holds_floats = array.dtype.kind == "f"
        if tensor.dtype.is_integer and holds_floats and (array != np.rint(array)).any():
            raise ArrayError(
                f"{flag}={path}: input {name!r} takes {tensor.dtype.name}, the file holds fractions"
            )
    if count < _LEAST_EXAMPLES:
        raise ArrayError(
            f"{flag}={path} holds {count} examples; at least {_LEAST_EXAMPLES} are needed"
        )
    order = np.random.default_rng(seed).permutation(count)
    return ArrayData(
        name=pathlib.Path(path).name,
        model=model,
        x=x,
        y=y,
        order=order,
        batch_size=batch_size,
        seed=seed,
    )


def _read(path: str, flag: str) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ArrayError(f"{flag}={path} holds a single array; write it with np.savez(…, x=x)")
        with file:
            arrays = dict(file)
    except QatError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ArrayError(f"{flag}={path} cannot be read as .npz: {reason}") from error
    for name, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            raise ArrayError(f"{flag}={path}: {name!r} is no array of numbers, one row an example")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ArrayError(f"{flag}={path}: {name!r} holds NaN or infinite values")
    return arrays


def _chosen(
    arrays: dict[str, np.ndarray],
    short: str,
    names: list[str],
    place: str,
    *,
    optional: bool = False,
) -> tuple[np.ndarray, ...]:
    """Takes the arrays of these inputs or outputs out of the file's."""
    if len(names) == 1 and short in arrays:
        return (arrays.pop(short),)
    present = [name for name in names if name in arrays]
    if not present and optional:
        return ()
    if len(present) != len(names):
        raise ArrayError(
            f"{place} lacks {_names(short, names)}; it holds {', '.join(arrays) or 'nothing'}"
        )
    return tuple(arrays.pop(name) for name in names)


def _names(short: str, names: list[str]) -> str:
    return short if len(names) == 1 else ", ".join(names)


def _packed(nested: Any, tensors: list[tf.Tensor]) -> Any:
    """As the model takes or gives them: one tensor, or a tuple or dictionary of them."""
    packed = tf.nest.pack_sequence_as(nested, tensors)
    return tuple(packed) if isinstance(packed, list) else packed
