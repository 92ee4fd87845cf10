"""Sound .tflite files of networks that no model here is: what a program may not have expected."""

from __future__ import annotations

import numpy as np
from single_operator import Operator, Tensor, constant, model

IMAGE = (1, 8, 8, 1)


def others() -> dict[str, bytes]:
    """{what is odd about it: content}; most tell 10 classes of 8×8 images apart."""
    ones = np.ones((1, 10), np.float32)
    flat = constant((1, 64))
    image, axes = _float(*IMAGE), constant((1, 2))
    return {
        "two inputs": model(_op("ADD", [_float(1, 10), _float(1, 10)], _float(1, 10))),
        "no input": model(
            _op("ADD", [constant(ones, "float32"), constant(ones, "float32")], _float(1, 10))
        ),
        "a number as input": model(_op("ADD", [_float(), constant(1, "float32")], _float())),
        "booleans": model(_op("EXPAND_DIMS", [_bool(*IMAGE), constant(0)], _bool(1, *IMAGE))),
        "an image and an input more": model(
            _op("ADD", [_float(*IMAGE), _float(*IMAGE)], _float(*IMAGE))
        ),
        "images of no size": model(_op("MEAN", [_float(1, 0, 8, 10), axes], _float(1, 10))),
        "images of 10 channels": model(_op("MEAN", [_float(1, 8, 8, 10), axes], _float(1, 10))),
        "images of 1000 × 1000": model(*_first_pixels(1000)),
        "an output for no image": model(_op("RESHAPE", [image, constant((64,))], _float(64))),
        "an image as output": model(_op("RELU", [image], _float(*IMAGE))),
        "64 classes": model(_op("RESHAPE", [image, flat], _float(1, 64))),
        "two outputs": model(
            _op("RESHAPE", [image, flat], _float(1, 64)), _op("RELU", [image], _float(*IMAGE))
        ),
        "NaN": model(_classifier(float("nan"))),
        "infinity": model(_classifier(3e38)),
        "7 images at once": model(_classifier(1.0, batch=7)),
        "no image at once": model(_classifier(1.0, batch=0)),
        "steps of 0": model(*_on_a_grid(scale=0.0)),
        "tiny steps": model(*_on_a_grid(scale=1e-38)),
        "huge steps": model(*_on_a_grid(scale=3e38)),
    }


def large(size: int) -> bytes:
    """A file that adds two tensors of `size` float32."""
    return model(_op("ADD", [_float(1, size), _float(1, size)], _float(1, size)))


def _float(*shape: int) -> Tensor:
    return Tensor(dtype="float32", shape=shape)


def _bool(*shape: int) -> Tensor:
    return Tensor(dtype="bool", shape=shape)


def _op(name: str, inputs: list[Tensor], output: Tensor) -> Operator:
    return Operator(name=name, inputs=inputs, outputs=[output], options={})


def _classifier(weight: float, batch: int = 1) -> Operator:
    kernel = constant(np.full((10, 64), weight), "float32")
    return _op("FULLY_CONNECTED", [_float(batch, *IMAGE[1:]), kernel], _float(batch, 10))


def _first_pixels(side: int) -> list[Operator]:
    """The first ten pixels are the classes."""
    flat, classes = _float(1, side**2), _float(1, 10)
    return [
        _op("RESHAPE", [_float(1, side, side, 1), constant((1, side**2))], flat),
        _op("SLICE", [flat, constant((0, 0)), constant((1, 10))], classes),
    ]


def _on_a_grid(scale: float) -> list[Operator]:
    classifier = _classifier(1.0)
    codes = Tensor(dtype="int8", shape=(1, 10), scale=scale)
    return [classifier, _op("QUANTIZE", classifier.outputs, codes)]
