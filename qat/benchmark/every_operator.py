"""A small network that has each kind of operator whose kernels or codes depend on the widths."""

from __future__ import annotations

import tf_keras

layers = tf_keras.layers
NAME = "every_operator"
# A few hundred steps leave Keras's averages (0.99) near where they began, far from the data's.
_MOMENTUM = 0.9


def build(image_shape: tuple[int, int, int], num_classes: int) -> tf_keras.Model:
    """Images of 0 to 255, (height, width, channels) of any size, to logits (num_classes,).

    Convolutions (strided, 1×1), a depthwise and a transposed one, a residual Add, a Concatenate of
    tensors of two grids, average and global average pooling, batch normalization behind a kernel
    and alone, dense layers. All channels but the image's are even, as bit-packed convolutions with
    zero padding ask for.
    """
    x = image = layers.Input(image_shape, name="image")
    x = layers.Rescaling(1 / 255, name="to_unit")(x)
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU(name="stem_relu")(
        layers.BatchNormalization(momentum=_MOMENTUM, name="stem_norm")(x)
    )
    y = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(x)
    y = layers.Conv2D(16, 1, use_bias=False, name="pointwise")(y)
    y = layers.BatchNormalization(momentum=_MOMENTUM, name="pointwise_norm")(y)
    x = layers.ReLU(name="residual_relu")(layers.Add(name="residual")([x, y]))
    pooled = layers.AveragePooling2D(2, padding="same", name="average")(x)
    strided = layers.Conv2D(16, 3, strides=2, padding="same", name="strided")(x)
    x = layers.Concatenate(name="concat")([pooled, strided])
    x = layers.Conv2DTranspose(32, 2, strides=2, activation="relu", name="transposed")(x)
    x = layers.GlobalAveragePooling2D(name="global_average")(x)
    # A sign would tell averages of ReLUs nothing.
    x = layers.BatchNormalization(momentum=_MOMENTUM, name="centred")(x)
    x = layers.Dense(32, activation="relu", name="hidden")(x)
    return tf_keras.Model(image, layers.Dense(num_classes, name="logits")(x), name=NAME)
