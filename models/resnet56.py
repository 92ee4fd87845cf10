"""ResNet-56 for small images: 9 residual blocks in each of three stages (16-32-64 filters).

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv 1512.03385), section 4.2,
with projection shortcuts.

859,738 parameters for (28, 28, 1) and 10 classes;
860,026 parameters for (32, 32, 3) and 10 classes.
"""

from __future__ import annotations

import tf_keras

from models._cifar_resnet import build_resnet


def build(
    input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0
) -> tf_keras.Model:
    """Pixels 0-255 float32 (batch, *input_shape) -> logits (batch, num_classes).

    `width` multiplies every number of filters. Raises ValueError if it is not above 0.
    """
    return build_resnet(56, input_shape, num_classes, width)
