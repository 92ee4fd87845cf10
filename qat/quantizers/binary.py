"""One-bit quantizers: binary weights and binary activations."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qat import ranges, ste
from qat.grid import SMALLEST_SCALE, Grid
from qat.quantizers.base import GridQuantizer, in_float32

# The codes that stand for ±1 and ±α. The bias of a kernel is rounded to a multiple of the product
# of its input's scale and its own: with codes ±1 in both that is a whole product, and signs behind
# it flip. The largest codes of the containers (int8 activations, INT4 kernels) make it 889 times
# finer.
ACTIVATION_CODE = 127
WEIGHT_CODE = 7


def _binary_grid(scale: tf.Tensor, code: int) -> Grid:
    return Grid(scale=scale, zero_point=tf.constant(0.0), qmin=-code, qmax=code)


def _scale_forward(sign: tf.Tensor, scale: tf.Tensor, code: float) -> tf.Tensor:
    """`code · sign · scale` whose gradient is that of the sign, so that α scales no step."""

    @tf.custom_gradient
    def forward(x, alpha):
        scaled = tf.cast(tf.cast(x, tf.float32) * code * alpha, x.dtype)
        return scaled, lambda upstream: (upstream, None)

    return forward(sign, scale)


class _BinaryQuantizer(GridQuantizer):
    method = "binary"

    def __init__(self, surrogate: str, surrogate_options: dict[str, float]):
        ste.sign_ste(tf.zeros([1]), surrogate=surrogate, **surrogate_options)  # raises if illegal
        self.surrogate = surrogate
        self.surrogate_options = surrogate_options
        self.num_bits = 1

    def sign(self, x: tf.Tensor) -> tf.Tensor:
        return ste.sign_ste(x, surrogate=self.surrogate, **self.surrogate_options)

    def get_config(self) -> dict[str, Any]:
        return {"surrogate": self.surrogate, **self.surrogate_options}

    def build(self, tensor_shape, name: str, layer: tf_keras.layers.Layer) -> dict[str, Any]:
        return {}

    def codes(self, inputs: tf.Tensor, weights: dict[str, Any]) -> tf.Tensor:
        code = float(self.grid(weights, inputs).qmax)
        return tf.where(tf.cast(inputs, tf.float32) >= 0.0, code, -code)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    __hash__ = None


@tf_keras.utils.register_keras_serializable("qat")
class BinaryWeightQuantizer(_BinaryQuantizer):
    """Weights ±α: `α·sign(w)`, sign(0) = +1; α = mean|w| (stop-gradient) or 1; codes ±7.

    Backward: the surrogate gradient of `qat.ste.sign_ste`, unscaled, so that the step size does
    not depend on α.

    Args:
        scaled: α is the mean magnitude; else α = 1.
        channel_axes: axes that keep an α of their own; None = one for the tensor.
        surrogate, surrogate_options: as `qat.ste.sign_ste`, e.g. surrogate="swish", beta=5.0.

    Raises:
        ValueError: an unknown surrogate or option.

    Source: XNOR-Net arXiv 1603.05279 (the scale); ReActNet arXiv 2003.03488 (its gradient).
    """

    def __init__(
        self,
        *,
        scaled: bool = True,
        channel_axes: tuple[int, ...] | None = (-1,),
        surrogate: str = "clipped",
        **surrogate_options: float,
    ):
        super().__init__(surrogate, surrogate_options)
        self.scaled = scaled
        self.channel_axes = None if channel_axes is None else tuple(channel_axes)

    def grid(self, weights, inputs=None):
        if not self.scaled:
            return _binary_grid(tf.constant(1.0 / WEIGHT_CODE), WEIGHT_CODE)
        if inputs is None:
            raise ValueError(
                "BinaryWeightQuantizer scales by the tensor's mean: call grid(weights, inputs)"
            )
        scale = ranges.mean_magnitude(inputs, self.channel_axes)
        return _binary_grid(tf.maximum(scale / WEIGHT_CODE, SMALLEST_SCALE), WEIGHT_CODE)

    def __call__(self, inputs, training, weights, **kwargs):
        grid = self.grid(weights, tf.stop_gradient(in_float32(inputs)))
        return _scale_forward(self.sign(inputs), grid.scale, float(grid.qmax))

    def get_config(self):
        own = {"scaled": self.scaled, "channel_axes": self.channel_axes}
        return {**super().get_config(), **own}


@tf_keras.utils.register_keras_serializable("qat")
class BinaryActivationQuantizer(_BinaryQuantizer):
    """Activations ±1: `sign(x)`, sign(0) = +1, with a surrogate gradient; codes ±127.

    Args:
        surrogate, surrogate_options: as `qat.ste.sign_ste`; "bireal" is Bi-Real Net's polynomial.

    Raises:
        ValueError: an unknown surrogate or option.

    Source: BinaryNet arXiv 1602.02830; Bi-Real Net arXiv 1808.00278.
    """

    def __init__(self, *, surrogate: str = "bireal", **surrogate_options: float):
        super().__init__(surrogate, surrogate_options)

    def grid(self, weights, inputs=None):
        return _binary_grid(tf.constant(1.0 / ACTIVATION_CODE), ACTIVATION_CODE)

    def __call__(self, inputs, training, weights, **kwargs):
        return self.sign(inputs)
