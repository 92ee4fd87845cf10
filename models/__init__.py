"""The model zoo: ordinary tf_keras image classifiers that know nothing of quantization.

One architecture a file, each with `build(input_shape, num_classes, *, ...) -> tf_keras.Model`:
float32 pixels 0-255, NHWC, in; logits out; convolution, BatchNorm and ReLU as separate layers.
"""

from __future__ import annotations

import inspect

import tf_keras

from models import (
    binarynet,
    birealnet,
    cnn5,
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    quicknet,
    reactnet,
    resnet20,
    resnet32,
    resnet56,
    vgg_small,
)

_ARCHITECTURES = {
    "lenet": lenet,
    "cnn5": cnn5,
    "vgg_small": vgg_small,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "binarynet": binarynet,
    "birealnet": birealnet,
    "quicknet": quicknet,
    "reactnet": reactnet,
}
MODELS: tuple[str, ...] = tuple(_ARCHITECTURES)


def chosen(text: str) -> tuple[str, dict[str, float]]:
    """("cnn5", {"width": 2.0}) of "cnn5:width=2"; semicolons separate several options.

    Raises ValueError for an unknown model or option, one that is given twice, and for a value that
    is no number above 0.
    """
    name, _, rest = text.partition(":")
    options = {}
    for part in rest.split(";") if rest else ():
        option, _, value = part.partition("=")
        if option in options:
            raise ValueError(f"{text!r} has {option!r} twice; give it once")
        options[option] = _number(option, value)
    _require_legal(name, options)
    return name, options


def build(
    name: str, input_shape: tuple[int, int, int], num_classes: int, **options
) -> tf_keras.Model:
    """The model `name` of MODELS: pixels 0-255 (batch, *input_shape) -> logits (batch, classes).

    `options` go to the architecture's own `build`, as do those of a name like "cnn5:width=2".
    Raises ValueError for an unknown name or option, for a shape that is not (height, width,
    channels) and for less than 2 classes.
    """
    name, named = chosen(name)
    _require_legal(name, options)
    if len(input_shape) != 3 or any(size is None or size < 1 for size in input_shape):
        raise ValueError(f"input_shape must be (height, width, channels), got {input_shape}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return _ARCHITECTURES[name].build(tuple(input_shape), num_classes, **{**named, **options})


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} must be a number above 0, e.g. {option}=0.5; got {text!r}")
    return value


def _require_legal(name: str, options: dict[str, float]) -> None:
    if name not in _ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}; legal names: {', '.join(MODELS)}")
    parameters = inspect.signature(_ARCHITECTURES[name].build).parameters.values()
    legal = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in legal:
            takes = ", ".join(legal) or "none"
            raise ValueError(f"model {name!r} has no option {option!r}; its options: {takes}")
