"""A small network of ReActNet's units, as a float network: made to be accurate with single bits.

Liu et al., "ReActNet", 2020 (arXiv 2003.03488): y = ReLU(BN(conv3x3(x)) + x), where the recipe
`w1a1-reactnet` puts an RPReLU in the place of the ReLU and an RSign in front of the convolution;
the shortcut carries the RPReLU's real values. Stem and transition are QuickNet's (arXiv
2011.09398), real-valued and meant to keep 8 bits beside a binary recipe (rules for the layers
"stem_*" and "transition*"): two convolutions that halve images of up to 64 pixels and quarter
larger ones; 2x2 max pooling and a 1x1 convolution between the two stages.

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
    x = conv_bn_relu(x, channels(_STAGES[0][0], width), 3, strides=2, name="stem_conv2")
    for stage, (filters, units) in enumerate(_STAGES, start=1):
        filters = channels(filters, width)
        if stage > 1:
            name = f"transition{stage - 1}"
            x = conv_bn_relu(max_pool(x, name=f"{name}_pool"), filters, 1, name=name)
        for index in range(1, units + 1):
            x = _residual_unit(x, filters, f"stage{stage}_conv{index}")
    return tf_keras.Model(inputs, classifier(x, num_classes), name="reactnet")


def _residual_unit(x, filters: int, name: str):
    """ReLU(BN(conv3x3(x)) + x)."""
    x = tf_keras.layers.Add(name=f"{name}_add")([conv_bn(x, filters, 3, name=name), x])
    return tf_keras.layers.ReLU(name=f"{name}_relu")(x)
