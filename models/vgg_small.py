"""VGG-small, the CIFAR network of the low-bit literature: 128-128-256-256-512-512, all 3x3.

Simonyan & Zisserman, 2014 (arXiv 1409.1556), in the size that Zhang et al., "LQ-Nets", 2018
(arXiv 1807.10029) and others quantize. The feature map is averaged where they flatten it: the
size of the model then does not depend on the size of the images, so one definition fits 8x8 (where
both are the same) and 224x224 (where flattening would cost 4 million weights for 10 classes).

4,584,586 parameters for (28, 28, 1) and 10 classes;
4,586,890 parameters for (32, 32, 3) and 10 classes.
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
    return tf_keras.Model(inputs, classifier(x, num_classes), name="vgg_small")
