"""QuickNet for small images, as a float network: made to be accurate with single bits.

After Bannink et al., "Larq Compute Engine", 2021 (arXiv 2011.09398): a stem of two real-valued
convolutions, stages of y = BN(conv3x3(ReLU(x))) + x, where a binary recipe puts a sign in the place
of the ReLU, and real-valued transitions between them: ReLU, 2x2 max pooling, 1x1 convolution,
BatchNorm. Small images: two stages, a stem that halves images of up to 64 pixels and quarters
larger ones, and no blur before the pooling. Stem and transitions are meant to keep 8 bits beside a
binary recipe (rules for the layers "stem_*" and "transition*").

426,970 parameters for (28, 28, 1) and 10 classes;
427,258 parameters for (32, 32, 3) and 10 classes. 95 % of them are in the kernels of the stages.
"""

from __future__ import annotations

import tf_keras

from models._blocks import (
    channels,
    classifier,
    conv_bn,
    conv_bn_relu,
    max_pool,
    pixels,
    relu_conv_bn,
    stem_stride,
)

# (filters, residual convolutions) of each stage.
_STAGES = ((64, 3), (128, 2))


def build(
    input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `width` multiplies every number of filters. Raises ValueError if it is not above 0.
    """
    inputs, x = pixels(input_shape)
    strides = stem_stride(input_shape)
    x = conv_bn_relu(x, channels(16, width), 3, strides=strides, name="stem_conv1")
    x = conv_bn(x, channels(_STAGES[0][0], width), 3, strides=2, name="stem_conv2")
    for stage, (filters, units) in enumerate(_STAGES, start=1):
        filters = channels(filters, width)
        if stage > 1:
            x = _transition(x, filters, f"transition{stage - 1}")
        for index in range(1, units + 1):
            x = _residual_unit(x, filters, f"stage{stage}_conv{index}")
    return tf_keras.Model(inputs, classifier(x, num_classes), name="quicknet")


def _residual_unit(x, filters: int, name: str):
    """BN(conv3x3(ReLU(x))) + x."""
    return tf_keras.layers.Add(name=f"{name}_add")([relu_conv_bn(x, filters, name=name), x])


def _transition(x, filters: int, name: str):
    """BN(conv1x1(max_pool(ReLU(x)))): half the size, another number of channels."""
    x = tf_keras.layers.ReLU(name=f"{name}_relu")(x)
    return conv_bn(max_pool(x, name=f"{name}_pool"), filters, 1, name=name)
