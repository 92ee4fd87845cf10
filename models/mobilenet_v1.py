"""MobileNet v1 for small images: depthwise separable convolutions, ReLU6.

Howard et al., "MobileNets", 2017 (arXiv 1704.04861). The stages are those of the paper up to 512
filters, with two repetitions of 512 for its five and without 1024: a 32x32 image then ends at 4x4,
and a training step stays affordable on a CPU. The first stride is 1 up to 64 pixels, 2 above.

819,850 parameters for (28, 28, 1) and 10 classes;
820,426 parameters for (32, 32, 3) and 10 classes.
"""

from __future__ import annotations

import tf_keras

from models._blocks import channels, classifier, conv_bn, depthwise_bn, pixels, stem_stride

# (filters, stride) of each depthwise separable block
_STAGES = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1))


def build(
    input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `width` multiplies every number of filters. Raises ValueError if it is not above 0.
    """
    inputs, x = pixels(input_shape)
    x = conv_bn(x, channels(32, width), 3, strides=stem_stride(input_shape), name="conv1")
    x = tf_keras.layers.ReLU(6.0, name="conv1_relu")(x)
    for index, (filters, strides) in enumerate(_STAGES, start=1):
        x = depthwise_bn(x, strides=strides, name=f"block{index}_depthwise")
        x = tf_keras.layers.ReLU(6.0, name=f"block{index}_depthwise_relu")(x)
        x = conv_bn(x, channels(filters, width), 1, name=f"block{index}_pointwise")
        x = tf_keras.layers.ReLU(6.0, name=f"block{index}_pointwise_relu")(x)
    return tf_keras.Model(inputs, classifier(x, num_classes), name="mobilenet_v1")
