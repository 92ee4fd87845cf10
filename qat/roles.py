"""What each Keras layer is to the quantizer; the one table of supported layer types."""

from __future__ import annotations

import enum

import tf_keras

from qat import configs, operator_layers
from qat.errors import QatError
from qat.float_only import FLOAT_ONLY, REFUSED
from qat.layers import QuantizedPReLU, ReplacedBySign

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
    POINTWISE = "a function of one number, a grid of its own; a table of 256 codes at 8 bits"
    GATHER = "picks rows of a table by whole numbers, a grid of its own"
    FLOAT = "no integer kernel exists: computed in float32, with its reason in the account"
    FIXED = "output range known beforehand"
    IDENTITY = "nothing at inference"


# A module-level table: the reader finds here whether a layer type is taken, and as what.
ROLES: dict[type, Role] = {
    **dict.fromkeys(configs.KERNELS, Role.LINEAR),
    layers.BatchNormalization: Role.BATCHNORM,
    operator_layers.Affine: Role.BATCHNORM,
    operator_layers.ChannelScale: Role.BATCHNORM,
    ReplacedBySign: Role.IDENTITY,
    operator_layers.FoldedAway: Role.IDENTITY,
    layers.Dropout: Role.IDENTITY,
    layers.SpatialDropout1D: Role.IDENTITY,
    layers.SpatialDropout2D: Role.IDENTITY,
    layers.SpatialDropout3D: Role.IDENTITY,
    layers.AlphaDropout: Role.IDENTITY,
    layers.ActivityRegularization: Role.IDENTITY,
    layers.Identity: Role.IDENTITY,
    layers.GaussianNoise: Role.IDENTITY,
    layers.GaussianDropout: Role.IDENTITY,
    **dict.fromkeys(operator_layers.AUGMENTATION, Role.IDENTITY),
    layers.MaxPooling1D: Role.PASS,
    layers.MaxPooling2D: Role.PASS,
    layers.MaxPooling3D: Role.PASS,
    layers.GlobalMaxPooling1D: Role.PASS,
    layers.GlobalMaxPooling2D: Role.PASS,
    layers.GlobalMaxPooling3D: Role.PASS,
    layers.Permute: Role.PASS,
    layers.RepeatVector: Role.PASS,
    layers.Cropping1D: Role.PASS,
    layers.Cropping2D: Role.PASS,
    layers.Cropping3D: Role.PASS,
    layers.UpSampling1D: Role.PASS,
    layers.UpSampling2D: Role.PASS,
    layers.UpSampling3D: Role.PASS,
    layers.Resizing: Role.PASS,
    layers.Flatten: Role.PASS,
    layers.Reshape: Role.PASS,
    layers.ZeroPadding1D: Role.PASS,
    layers.ZeroPadding2D: Role.PASS,
    layers.ZeroPadding3D: Role.PASS,
    operator_layers.Pad: Role.PASS,
    operator_layers.ReduceMax: Role.PASS,
    operator_layers.Slice: Role.PASS,
    layers.AveragePooling1D: Role.AVERAGE,
    layers.AveragePooling2D: Role.AVERAGE,
    layers.AveragePooling3D: Role.AVERAGE,
    layers.Concatenate: Role.CONCAT,
    layers.Maximum: Role.CONCAT,
    layers.Minimum: Role.CONCAT,
    layers.Add: Role.ELEMENTWISE,
    layers.Subtract: Role.ELEMENTWISE,
    layers.Multiply: Role.ELEMENTWISE,
    layers.GlobalAveragePooling1D: Role.COMPUTE,
    layers.GlobalAveragePooling2D: Role.COMPUTE,
    layers.GlobalAveragePooling3D: Role.COMPUTE,
    layers.PReLU: Role.COMPUTE,
    QuantizedPReLU: Role.COMPUTE,
    layers.Embedding: Role.GATHER,
    operator_layers.Buckets: Role.FIXED,
    operator_layers.MatMul: Role.COMPUTE,
    operator_layers.ReduceMean: Role.COMPUTE,
    layers.Rescaling: Role.COMPUTE,
    **dict.fromkeys(FLOAT_ONLY, Role.FLOAT),
}
ACTIVATIONS: dict[str, Role] = {
    "linear": Role.IDENTITY,
    **dict.fromkeys(
        (
            "elu",
            "exponential",
            "gelu",
            "hard_sigmoid",
            "hard_swish",
            "leaky_relu",
            "mish",
            "selu",
            "silu",
            "softplus",
            "softsign",
            "swish",
            "thresholded_relu",
        ),
        Role.POINTWISE,
    ),
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


_FIXED_BOUND_16 = 32767.0 / 32768.0

# What an operator of the file computes besides itself: {role: the roles it can fuse behind}.
FUSES: dict[Role, tuple[Role, ...]] = {
    Role.BATCHNORM: (Role.LINEAR,),
    Role.RELU: (Role.LINEAR, Role.BATCHNORM, Role.ELEMENTWISE),
}
KEEPS_GRID = (Role.PASS, Role.IDENTITY, Role.AVERAGE)


def activation_name(layer: layers.Layer) -> str | None:
    """The name of an activation layer's function; None for layers that are none.

    A ReLU with a slope or a threshold is "leaky_relu" or "thresholded_relu".

    Raises:
        UnsupportedLayerError: a softmax over another axis than the last.
    """
    if isinstance(layer, layers.Activation):
        return getattr(layer.activation, "__name__", repr(layer.activation))
    if isinstance(layer, layers.Softmax):
        if layer.axis != -1 and layer.axis != len(layer.input_shape) - 1:
            raise UnsupportedLayerError(
                f"layer {layer.name!r} (Softmax) has axis={layer.axis}; TFLite's is the last, -1: "
                "put a Permute in front and behind"
            )
        return "softmax"
    if isinstance(layer, layers.ReLU):
        return _relu_name(layer)
    return _ACTIVATION_LAYERS.get(type(layer))


# Layers whose role is that of their function, and its name where their class alone decides it.
_ACTIVATION_LAYERS = {
    **dict.fromkeys((layers.Activation, layers.ReLU, layers.Softmax)),
    layers.LeakyReLU: "leaky_relu",
    layers.ELU: "elu",
    layers.ThresholdedReLU: "thresholded_relu",
}


def _relu_name(layer: layers.ReLU) -> str:
    bound = relu_bound(layer)
    if float(layer.threshold) or (float(layer.negative_slope) and bound is not None):
        return "thresholded_relu"
    if float(layer.negative_slope):
        return "leaky_relu"
    return "relu6" if bound == 6.0 else "relu"


def relu_bound(layer: layers.Layer) -> float | None:
    """What a ReLU cuts its output at; None if it does not."""
    bound = getattr(layer, "max_value", None)
    return None if bound is None else float(bound)


def fixed_range(layer: layers.Layer, bits: int) -> tuple[float, float]:
    """(minimum, maximum) of a FIXED layer's output; at 16 bits all have the scale 2^-15."""
    if isinstance(layer, operator_layers.Buckets):
        return 0.0, 255.0  # of scale 1: codes are the buckets' numbers, see `lower_embedding`
    if bits == 16:
        return -_FIXED_BOUND_16, _FIXED_BOUND_16
    return FIXED_RANGES[activation_name(layer)]


def role(layer: layers.Layer) -> Role:
    """The layer's role.

    Raises:
        UnsupportedLayerError: no integer operator for this layer here.
    """
    kind = type(layer)
    name = None if kind in ROLES else activation_name(layer)
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name is not None:
        raise UnsupportedLayerError(
            f"layer {layer.name!r} computes {name!r}, which is not supported; supported "
            f"activations: {', '.join(ACTIVATIONS)}; or teach qat yours: "
            'qat.register(function, role="pointwise")'
        )
    if kind not in ROLES:
        raise UnsupportedLayerError(f"layer {layer.name!r} ({kind.__name__}) {_what_to_do(kind)}")
    _check_options(layer)
    if isinstance(layer, layers.UpSampling2D | layers.Resizing):
        return Role.PASS if layer.interpolation == "nearest" else Role.AVERAGE
    return ROLES[kind]


def _what_to_do(kind: type) -> str:
    if kind in REFUSED:
        return f"has no place in the file: {REFUSED[kind]}; keep_float cannot help"
    known = sorted(known.__name__ for known in (*ROLES, *_ACTIVATION_LAYERS))
    return (
        f"is not supported; supported layers: {', '.join(known)}; replace it, teach qat the layer "
        "with qat.register, or leave it in float32 by a recipe rule with keep_float"
    )


def require_a_place(layer: layers.Layer) -> None:
    """Raises UnsupportedLayerError for a layer that the file cannot even hold in float32."""
    if type(layer) in REFUSED:
        raise UnsupportedLayerError(
            f"layer {layer.name!r} ({type(layer).__name__}) {_what_to_do(type(layer))}"
        )


def require_widths(layer: layers.Layer, found: Role, bits: int) -> None:
    """Raises UnsupportedLayerError where a layer has no operator for activations of 16 bits."""
    table = isinstance(layer, operator_layers.Buckets) or (
        found is Role.POINTWISE and activation_name(layer) != "leaky_relu"
    )
    if bits == 16 and table:
        raise UnsupportedLayerError(
            f"layer {layer.name!r} ({type(layer).__name__}) has no operator for 16-bit "
            "activations; take 8 bits, or leave it in float32 by a recipe rule with keep_float"
        )


def float_reason(layer: layers.Layer) -> str | None:
    """Why a layer can only be computed in float32; None if it need not be."""
    return FLOAT_ONLY.get(type(layer))


def supports(layer: layers.Layer) -> bool:
    """Whether the layer has a role."""
    try:
        role(layer)
    except UnsupportedLayerError:
        return False
    return True


def _check_options(layer: layers.Layer) -> None:
    """Options that the layer's operator lacks, refused before anything is trained."""
    interpolation = getattr(layer, "interpolation", "nearest")
    axis = getattr(layer, "axis", -1)
    normalized = axis if isinstance(axis, int) else axis[0]
    problems = {
        "data_format='channels_first'; TFLite is channels_last": (
            getattr(layer, "data_format", None) == "channels_first"
        ),
        "dilation, which TRANSPOSE_CONV lacks": (
            isinstance(layer, layers.Conv1DTranspose | layers.Conv2DTranspose)
            and set(layer.dilation_rate) != {1}
        ),
        f"interpolation={interpolation!r}; TFLite has nearest and bilinear": (
            interpolation not in ("nearest", "bilinear")
        ),
        "crop_to_aspect_ratio; crop with a Cropping2D": (
            getattr(layer, "crop_to_aspect_ratio", False)
        ),
        "mask_zero; masks do not reach the file": getattr(layer, "mask_zero", False),
        f"axis={axis}; TFLite's channels are the last axis": (
            isinstance(layer, layers.BatchNormalization)
            and normalized not in (-1, layer.input_spec.ndim - 1 if layer.built else -1)
        ),
        "axis=0, the batch": isinstance(layer, layers.Concatenate) and axis == 0,
    }
    for problem, found in problems.items():
        if found:
            raise UnsupportedLayerError(
                f"layer {layer.name!r} ({type(layer).__name__}) has {problem}"
            )
