"""Room on Python's stack for models of many layers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

# ResNetRS420, one of the longest stock networks, has 2,258 layers before it is quantized.
_FRAMES = 20_000


@contextlib.contextmanager
def deep_models() -> Iterator[None]:
    """Inside, models may be deeper than Python's usual limit of 1,000 calls inside each other.

    Keras follows a model from its outputs, a call inside another for each layer, and quantizing
    about doubles the layers in a row. Also a decorator.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _FRAMES))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
