"""Names, copies and origins of the layers that a rewrite puts in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import tf_keras

Origins = tuple[tuple[str, str], ...]


class MadeLayers:
    """Layers made in the place of others, each once however often those are called.

    Attributes:
        origins: for the name of each made layer, the (name, class name) pairs that a recipe may
            know it by.
    """

    def __init__(self, taken: Iterable[str]):
        self._names = set(taken)
        self._made: dict[tuple[int, str], tuple[object, tf_keras.layers.Layer]] = {}
        self.origins: dict[str, Origins] = {}

    def once(
        self,
        layer: tf_keras.layers.Layer,
        key: str,
        name: str,
        origins: Origins,
        make: Callable[[str], tf_keras.layers.Layer],
    ) -> tf_keras.layers.Layer:
        """`make(name)`, the name made unique; the same layer again for the same layer and key."""
        if (id(layer), key) not in self._made:
            while name in self._names:
                name += "_"
            self._names.add(name)
            made = make(name)
            made.trainable = layer.trainable
            self._made[id(layer), key] = layer, made
            self.origins[name] = origins
        return self._made[id(layer), key][1]
