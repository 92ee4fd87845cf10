"""Five 3x3 convolutions (32-32-64-64-128), two poolings, a global average: the small baseline.

After the all-convolutional networks of Springenberg et al., "Striving for Simplicity", 2014
(arXiv 1412.6806), with max pooling kept.

141,098 parameters for (28, 28, 1) and 10 classes;
141,674 parameters for (32, 32, 3) and 10 classes.
"""

from __future__ import annotations

import tf_keras

from models._blocks import channels, classifier, conv_bn_relu, max_pool, pixels


def build(
    input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `width` multiplies every number of filters. Raises ValueError if it is not above 0.
    """
    inputs, x = pixels(input_shape)
    for index, filters in enumerate((32, 32, 64, 64, 128), start=1):
        x = conv_bn_relu(x, channels(filters, width), 3, name=f"conv{index}")
        if index in (2, 4):
            x = max_pool(x, name=f"pool{index // 2}")
    return tf_keras.Model(inputs, classifier(x, num_classes), name="cnn5")
