"""What each Keras layer is to the quantizer; the one table of supported layer types."""

from __future__ import annotations

import enum

import tf_keras

from qat import configs, operator_layers
from qat.errors import QatError
from qat.layers import ReplacedBySign

layers = tf_keras.layers


class UnsupportedLayerError(QatError):
    """A layer that has no integer operator here. One line: layer, type, what is legal."""


class Role(enum.Enum):
    """How a layer's output relates to the integer grid of its input."""

    LINEAR = "has a kernel; one output grid after batch normalization and activation"
    BATCHNORM = "affine: folds into the kernel in front of it, else a per-channel operator"
    RELU = "fuses into the operator in front of it"
    PASS = "moves or picks values: the output lies on the input's grid"
    AVERAGE = "averages codes: the kernel keeps the input's grid"
    CONCAT = "one grid for all inputs"
    ELEMENTWISE = "arithmetic on tensors, a grid of its own; takes a fused ReLU"
    COMPUTE = "other arithmetic, a grid of its own"
    FIXED = "output range known beforehand"
    IDENTITY = "nothing at inference"


# A module-level table: the reader finds here whether a layer type is taken, and as what.
ROLES: dict[type, Role] = {
    **dict.fromkeys(configs.KERNELS, Role.LINEAR),
    layers.BatchNormalization: Role.BATCHNORM,
    operator_layers.Affine: Role.BATCHNORM,
    operator_layers.ChannelScale: Role.BATCHNORM,
    layers.ReLU: Role.RELU,
    ReplacedBySign: Role.IDENTITY,
    operator_layers.FoldedAway: Role.IDENTITY,
    layers.Dropout: Role.IDENTITY,
    layers.SpatialDropout1D: Role.IDENTITY,
    layers.SpatialDropout2D: Role.IDENTITY,
    layers.GaussianNoise: Role.IDENTITY,
    layers.GaussianDropout: Role.IDENTITY,
    **dict.fromkeys(operator_layers.AUGMENTATION, Role.IDENTITY),
    layers.AlphaDropout: Role.IDENTITY,
    layers.ActivityRegularization: Role.IDENTITY,
    layers.MaxPooling1D: Role.PASS,
    layers.MaxPooling2D: Role.PASS,
    layers.GlobalMaxPooling1D: Role.PASS,
    layers.GlobalMaxPooling2D: Role.PASS,
    layers.Flatten: Role.PASS,
    layers.Reshape: Role.PASS,
    layers.ZeroPadding1D: Role.PASS,
    layers.ZeroPadding2D: Role.PASS,
    layers.Permute: Role.PASS,
    layers.Resizing: Role.PASS,  # "bilinear" averages
    operator_layers.Pad: Role.PASS,
    operator_layers.ReduceMax: Role.PASS,
    operator_layers.Slice: Role.PASS,
    layers.AveragePooling1D: Role.AVERAGE,
    layers.AveragePooling2D: Role.AVERAGE,
    layers.Concatenate: Role.CONCAT,
    layers.Add: Role.ELEMENTWISE,
    layers.Subtract: Role.ELEMENTWISE,
    layers.Multiply: Role.ELEMENTWISE,
    layers.GlobalAveragePooling1D: Role.COMPUTE,
    layers.GlobalAveragePooling2D: Role.COMPUTE,
    operator_layers.ReduceMean: Role.COMPUTE,
    layers.Rescaling: Role.COMPUTE,
    layers.Softmax: Role.FIXED,
}
ACTIVATIONS: dict[str, Role] = {
    "linear": Role.IDENTITY,
    "relu": Role.RELU,
    "relu6": Role.RELU,
    "softmax": Role.FIXED,
    "sigmoid": Role.FIXED,
    "tanh": Role.FIXED,
    "hard_sigmoid6": Role.FIXED,
}
# The output ranges that TFLite's kernels prescribe (8-bit specification): (minimum, maximum).
FIXED_RANGES = {
    "softmax": (0.0, 255.0 / 256.0),
    "sigmoid": (0.0, 255.0 / 256.0),
    "tanh": (-1.0, 127.0 / 128.0),
    "hard_sigmoid6": (0.0, 1.0),  # its operator is ours, so that 1 is a code
}


FIXED_BOUND_16 = 32767.0 / 32768.0

# What an operator of the file computes besides itself: {role: the roles it can fuse behind}.
FUSES: dict[Role, tuple[Role, ...]] = {
    Role.BATCHNORM: (Role.LINEAR,),
    Role.RELU: (Role.LINEAR, Role.BATCHNORM, Role.ELEMENTWISE),
}
KEEPS_GRID = (Role.PASS, Role.IDENTITY, Role.AVERAGE)


def activation_name(layer: layers.Layer) -> str | None:
    """The name of an activation layer's function; None for layers that are none.

    Raises:
        UnsupportedLayerError: a ReLU with a slope, a threshold or a bound other than 6.
    """
    if isinstance(layer, layers.Activation):
        name = getattr(layer.activation, "__name__", repr(layer.activation))
        return name
    if isinstance(layer, layers.Softmax):
        if layer.axis != -1:
            raise UnsupportedLayerError(
                f"layer {layer.name!r} (Softmax) has axis={layer.axis}; TFLite's is the last, -1"
            )
        return "softmax"
    if isinstance(layer, layers.ReLU):
        bound = None if layer.max_value is None else float(layer.max_value)
        if float(layer.negative_slope) or float(layer.threshold) or bound not in (None, 6.0):
            raise UnsupportedLayerError(
                f"layer {layer.name!r} (ReLU) has max_value={layer.max_value}, negative_slope="
                f"{layer.negative_slope}, threshold={layer.threshold}; supported are plain ReLU "
                "and max_value=6"
            )
        return "relu" if bound is None else "relu6"
    return None


def role(layer: layers.Layer) -> Role:
    """The layer's role.

    Raises:
        UnsupportedLayerError: no integer operator for this layer here.
    """
    name = activation_name(layer)
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name is not None:
        raise UnsupportedLayerError(
            f"layer {layer.name!r} computes {name!r}, which is not supported; supported "
            f"activations: {', '.join(ACTIVATIONS)}"
        )
    if type(layer) not in ROLES:
        raise UnsupportedLayerError(
            f"layer {layer.name!r} ({type(layer).__name__}) is not supported; supported layers: "
            f"{', '.join(sorted(kind.__name__ for kind in ROLES))}; replace it, or teach qat "
            "the layer"
        )
    _check_options(layer)
    if isinstance(layer, layers.Resizing) and layer.interpolation == "bilinear":
        return Role.AVERAGE
    return ROLES[type(layer)]


def supports(layer: layers.Layer) -> bool:
    """Whether the layer has a role."""
    try:
        role(layer)
    except UnsupportedLayerError:
        return False
    return True


def _check_options(layer: layers.Layer) -> None:
    """Options that the layer's operator lacks, refused before anything is trained."""
    axis = getattr(layer, "axis", -1)
    normalized = axis if isinstance(axis, int) else axis[0]
    problems = {
        "data_format='channels_first'; TFLite is channels_last": (
            getattr(layer, "data_format", None) == "channels_first"
        ),
        "padding='causal'; put a ZeroPadding1D in front": (
            getattr(layer, "padding", None) == "causal"
        ),
        "output_padding or dilation, which TRANSPOSE_CONV lacks": (
            isinstance(layer, layers.Conv2DTranspose)
            and (layer.output_padding is not None or tuple(layer.dilation_rate) != (1, 1))
        ),
        f"axis={axis}; TFLite's channels are the last axis": (
            isinstance(layer, layers.BatchNormalization)
            and normalized not in (-1, layer.input_spec.ndim - 1 if layer.built else -1)
        ),
        "an interpolation or a crop that TFLite lacks; it has 'nearest' and 'bilinear'": (
            isinstance(layer, layers.Resizing)
            and (layer.interpolation not in ("nearest", "bilinear") or layer.crop_to_aspect_ratio)
        ),
        "axis=0, the batch": isinstance(layer, layers.Concatenate) and axis == 0,
    }
    for problem, found in problems.items():
        if found:
            raise UnsupportedLayerError(
                f"layer {layer.name!r} ({type(layer).__name__}) has {problem}"
            )
