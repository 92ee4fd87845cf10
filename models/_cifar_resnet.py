"""The CIFAR ResNet family: 6n + 2 layers in three stages of n blocks, 16-32-64 filters.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv 1512.03385), section 4.2,
with projection shortcuts (their option B) where the shape changes.
"""

from __future__ import annotations

import tf_keras

from models._blocks import channels, classifier, conv_bn, conv_bn_relu, pixels


def build_resnet(
    depth: int, input_shape: tuple[int, int, int], num_classes: int, width: float
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `depth` = 6n + 2 counts the convolutions outside the shortcuts and the dense layer.
    """
    inputs, x = pixels(input_shape)
    x = conv_bn_relu(x, channels(16, width), 3, name="conv1")
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, (depth - 2) // 6 + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = _residual_block(x, channels(filters, width), strides, f"stage{stage}_block{block}")
    return tf_keras.Model(inputs, classifier(x, num_classes), name=f"resnet{depth}")


def _residual_block(x, filters: int, strides: int, name: str):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + shortcut(x)), after He et al., figure 2."""
    shortcut = x
    if strides != 1 or x.shape[-1] != filters:
        shortcut = conv_bn(x, filters, 1, strides=strides, name=f"{name}_shortcut")
    x = conv_bn(x, filters, 3, strides=strides, name=f"{name}_conv1")
    x = tf_keras.layers.ReLU(name=f"{name}_conv1_relu")(x)
    x = conv_bn(x, filters, 3, name=f"{name}_conv2")
    x = tf_keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return tf_keras.layers.ReLU(name=f"{name}_relu")(x)
