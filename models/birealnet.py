"""Bi-Real Net for small images, as a float network: one shortcut around every 3x3 convolution.

Liu et al., "Bi-Real Net", 2018 (arXiv 1808.00278): y = BN(conv3x3(ReLU(x))) + shortcut(x), where
a binary recipe puts a sign in the place of the ReLU; the real-valued x travels along the
shortcut. Where the shape changes, the shortcut is 2x2 average pooling, 1x1 convolution, BatchNorm.
As in the paper nothing stands between the last addition and the global pooling. Small images: the
first convolution is 3x3 (stride 1 up to 64 pixels, 2 above) without max pooling, and of the paper's
four stages the first three remain, four convolutions each.

2,781,002 parameters for (28, 28, 1) and 10 classes;
2,782,154 parameters for (32, 32, 3) and 10 classes.
About 0.4 billion multiplications for one 32x32 image: on a CPU, prefer width=0.25.
"""

from __future__ import annotations

import tf_keras

from models._blocks import channels, classifier, conv_bn, pixels, relu_conv_bn, stem_stride


def build(
    input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `width` multiplies every number of filters. Raises ValueError if it is not above 0.
    """
    inputs, x = pixels(input_shape)
    x = conv_bn(x, channels(64, width), 3, strides=stem_stride(input_shape), name="conv1")
    for stage, filters in enumerate((64, 128, 256), start=1):
        for index in range(1, 5):
            strides = 2 if stage > 1 and index == 1 else 1
            x = _bireal_unit(x, channels(filters, width), strides, f"stage{stage}_conv{index}")
    return tf_keras.Model(inputs, classifier(x, num_classes), name="birealnet")


def _bireal_unit(x, filters: int, strides: int, name: str):
    """BN(conv3x3(ReLU(x))) + shortcut(x)."""
    shortcut = x
    if strides != 1:
        shortcut = tf_keras.layers.AveragePooling2D(
            2, padding="same", name=f"{name}_shortcut_pool"
        )(x)
        shortcut = conv_bn(shortcut, filters, 1, name=f"{name}_shortcut")
    x = relu_conv_bn(x, filters, strides=strides, name=name)
    return tf_keras.layers.Add(name=f"{name}_add")([x, shortcut])
