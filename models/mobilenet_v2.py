"""MobileNet v2 for small images: inverted residuals with linear bottlenecks, expansion 6, ReLU6.

Sandler et al., "MobileNetV2", 2018 (arXiv 1801.04381). Stages (expansion, filters, repetitions,
stride): (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1), then a 1x1
convolution to 640: fewer repetitions than the paper and no stage of 160 and 320 filters, so that a
32x32 image ends at 8x8 and a training step stays affordable on a CPU. Above 64 pixels a side the
first convolution and the stage of 24 filters have the paper's stride of 2.

451,786 parameters for (28, 28, 1) and 10 classes;
452,362 parameters for (32, 32, 3) and 10 classes.
"""

from __future__ import annotations

import tf_keras

from models._blocks import channels, classifier, conv_bn, depthwise_bn, pixels, stem_stride


def build(
    input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `width` multiplies every number of filters. Raises ValueError if it is not above 0.
    """
    early = stem_stride(input_shape)
    stages = ((1, 16, 1, 1), (6, 24, 2, early), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1))
    inputs, x = pixels(input_shape)
    x = conv_bn(x, channels(32, width), 3, strides=early, name="conv1")
    x = tf_keras.layers.ReLU(6.0, name="conv1_relu")(x)
    for stage, (expansion, filters, repetitions, stride) in enumerate(stages, start=1):
        for block in range(1, repetitions + 1):
            x = _inverted_residual(
                x,
                expansion,
                channels(filters, width),
                stride if block == 1 else 1,
                f"stage{stage}_block{block}",
            )
    x = conv_bn(x, channels(640, width), 1, name="head")
    x = tf_keras.layers.ReLU(6.0, name="head_relu")(x)
    return tf_keras.Model(inputs, classifier(x, num_classes), name="mobilenet_v2")


def _inverted_residual(x, expansion: int, filters: int, strides: int, name: str):
    """Expand 1x1, depthwise 3x3, project 1x1 (linear); added to x where the shape stays."""
    shortcut = x
    if expansion > 1:
        x = conv_bn(x, expansion * x.shape[-1], 1, name=f"{name}_expand")
        x = tf_keras.layers.ReLU(6.0, name=f"{name}_expand_relu")(x)
    x = depthwise_bn(x, strides=strides, name=f"{name}_depthwise")
    x = tf_keras.layers.ReLU(6.0, name=f"{name}_depthwise_relu")(x)
    x = conv_bn(x, filters, 1, name=f"{name}_project")
    if strides == 1 and shortcut.shape[-1] == filters:
        x = tf_keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return x
