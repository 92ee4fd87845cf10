"""LeNet-5 style: two 5x5 convolutions and three dense layers.

LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998, with today's parts:
ReLU for tanh, max pooling for trained subsampling, BatchNorm, padding "same" (so that 8x8 images
fit), dense logits for the radial basis functions.

107,852 parameters for (28, 28, 1) and 10 classes.
"""

from __future__ import annotations

import tf_keras

from models._blocks import conv_bn_relu, max_pool, pixels


def build(input_shape: tuple[int, int, int], num_classes: int) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes)."""
    inputs, x = pixels(input_shape)
    x = max_pool(conv_bn_relu(x, 6, 5, name="conv1"), name="pool1")
    x = max_pool(conv_bn_relu(x, 16, 5, name="conv2"), name="pool2")
    x = tf_keras.layers.Flatten(name="flatten")(x)
    for index, units in enumerate((120, 84), start=1):
        x = tf_keras.layers.Dense(units, name=f"dense{index}")(x)
        x = tf_keras.layers.ReLU(name=f"dense{index}_relu")(x)
    logits = tf_keras.layers.Dense(num_classes, name="logits")(x)
    return tf_keras.Model(inputs, logits, name="lenet")
