"""BinaryNet's topology as an ordinary float network: the twin that a binary recipe starts from.

Courbariaux et al., "Binarized Neural Networks", 2016 (arXiv 1602.02830): 3x3 convolutions of
128-128-256-256-512-512 filters with a pooling after each pair. Every hidden layer is convolution,
BatchNorm, ReLU, so each ReLU stands (through the pooling) in front of a convolution, where a sign
can take its place; the last one stands in front of the global average. The paper's two dense layers
of 1024 units are 1x1 convolutions here: any image size fits, and they are hidden layers like the
others.

6,170,762 parameters for (28, 28, 1) and 10 classes;
6,173,066 parameters for (32, 32, 3) and 10 classes.
About 0.6 billion multiplications for one 32x32 image: on a CPU, prefer width=0.25.
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
    for stage, filters in enumerate((128, 256, 512), start=1):
        for index in (1, 2):
            x = conv_bn_relu(x, channels(filters, width), 3, name=f"conv{stage}_{index}")
        x = max_pool(x, name=f"pool{stage}")
    for index in (1, 2):
        x = conv_bn_relu(x, channels(1024, width), 1, name=f"fc{index}")
    return tf_keras.Model(inputs, classifier(x, num_classes), name="binarynet")
