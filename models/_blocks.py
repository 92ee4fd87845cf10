"""The building blocks that the architectures share: convolution, BatchNorm, ReLU as three layers.

They stay separate layers so that a quantizer can see, fold and replace each of them.
"""

from __future__ import annotations

import tf_keras

# Short trainings see few batches: the Keras defaults (0.99) would leave the moving statistics
# near their initial values.
_BATCH_NORM = {"momentum": 0.9, "epsilon": 1e-3}


def pixels(input_shape: tuple[int, int, int]) -> tuple:
    """The model's input (float32 pixels 0-255, NHWC) and the same divided by 255."""
    inputs = tf_keras.Input(input_shape, name="image")
    return inputs, tf_keras.layers.Rescaling(1 / 255.0, name="rescale")(inputs)


def channels(filters: int, width: float) -> int:
    """`filters * width` to the nearest multiple of 8, at least 8; ValueError if width <= 0."""
    if width <= 0:
        raise ValueError(f"width must be above 0, got {width}")
    return max(8, 8 * int(filters * width / 8 + 0.5))


def conv_bn(x, filters: int, kernel_size: int, *, strides: int = 1, name: str):
    """Bias-free convolution, padding "same" (output size ceil(input / strides)), then BatchNorm."""
    x = tf_keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
    return tf_keras.layers.BatchNormalization(**_BATCH_NORM, name=f"{name}_bn")(x)


def depthwise_bn(x, *, strides: int = 1, name: str):
    """Bias-free 3x3 depthwise convolution, padding "same", then BatchNorm."""
    x = tf_keras.layers.DepthwiseConv2D(
        3,
        strides=strides,
        padding="same",
        use_bias=False,
        depthwise_initializer="he_normal",
        name=name,
    )(x)
    return tf_keras.layers.BatchNormalization(**_BATCH_NORM, name=f"{name}_bn")(x)


def conv_bn_relu(x, filters: int, kernel_size: int, *, strides: int = 1, name: str):
    """`conv_bn`, then ReLU."""
    x = conv_bn(x, filters, kernel_size, strides=strides, name=name)
    return tf_keras.layers.ReLU(name=f"{name}_relu")(x)


def relu_conv_bn(x, filters: int, *, strides: int = 1, name: str):
    """ReLU, then a 3x3 `conv_bn`: a binary recipe puts its sign in the place of the ReLU."""
    x = tf_keras.layers.ReLU(name=f"{name}_relu")(x)
    return conv_bn(x, filters, 3, strides=strides, name=name)


def max_pool(x, *, name: str):
    """2x2 max pooling, stride 2; padding "same" keeps a 1-pixel side at 1."""
    return tf_keras.layers.MaxPooling2D(2, padding="same", name=name)(x)


def stem_stride(input_shape: tuple[int, int, int]) -> int:
    """1 for images of up to 64 pixels a side, 2 for larger ones."""
    return 1 if max(input_shape[:2]) <= 64 else 2


def classifier(x, num_classes: int):
    """Global average pooling, then the dense layer "logits" (no softmax)."""
    x = tf_keras.layers.GlobalAveragePooling2D(name="global_pool")(x)
    return tf_keras.layers.Dense(num_classes, name="logits")(x)
