"""One-bit quantizers: binary weights and binary activations."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qat import ranges, ste
from qat.grid import SMALLEST_SCALE, Grid
from qat.quantizers.base import GridQuantizer, required, straight_through
from qat.quantizers.rounding import in_float32

# The codes that stand for ±1 and ±α. The bias of a kernel is rounded to a multiple of the product
# of its input's scale and its own: with codes ±1 in both that is a whole product, and signs behind
# it flip. The largest codes of the containers (int8 activations, INT4 kernels) make it 889 times
# finer. A file may store the kernel's codes / 7.
ACTIVATION_CODE = 127
WEIGHT_CODE = 7


def _binary_grid(scale: tf.Tensor, code: int) -> Grid:
    return Grid(scale=scale, zero_point=tf.constant(0.0), qmin=-code, qmax=code)


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

    def codes(self, inputs: tf.Tensor, weights: dict[str, Any]) -> tf.Tensor:
        code = float(self.grid(weights, inputs).qmax)
        return tf.where(in_float32(inputs) >= 0.0, code, -code)


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

    code_unit = WEIGHT_CODE

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
        x = in_float32(required(inputs, self))
        scale = ranges.mean_magnitude(x, self.channel_axes)
        return _binary_grid(tf.maximum(scale / WEIGHT_CODE, SMALLEST_SCALE), WEIGHT_CODE)

    @property
    def container_bits(self) -> int:
        return WEIGHT_CODE.bit_length() + 1

    def quantized(self, inputs, training, weights):
        x = in_float32(inputs)
        return tf.cast(self._forward(self.sign(x), self.grid(weights, x)), inputs.dtype)

    def _forward(self, sign: tf.Tensor, grid: Grid) -> tf.Tensor:
        return straight_through(sign, grid.dequantize(sign * float(grid.qmax)))

    def get_config(self):
        own = {"scaled": self.scaled, "channel_axes": self.channel_axes}
        return {**super().get_config(), **own}


@tf_keras.utils.register_keras_serializable("qat")
class XnorWeightQuantizer(BinaryWeightQuantizer):
    """XNOR-Net weights: `α·sign(w)`, α = mean|w|, differentiated as a whole.

    Backward: `dw = α·1[|w| <= 1]·g + sign(w)/n·Σ sign(w)·g`, the sum over the n elements that share
    α. (The paper prints 1/n for the second term; its implementations differentiate.)

    Args:
        As `BinaryWeightQuantizer`.

    Source: XNOR-Net arXiv 1603.05279, section 3.1; jiecaoyu/XNOR-Net-PyTorch MNIST/util.py.
    """

    method = "xnor"

    def _forward(self, sign, grid):
        return grid.dequantize(sign * float(grid.qmax))


@tf_keras.utils.register_keras_serializable("qat")
class BwnWeightQuantizer(BinaryWeightQuantizer):
    """Binary-Weight-Network: `α·sign(w)`, α = mean|w|; backward the identity.

    Args:
        As `BinaryWeightQuantizer`.

    Source: arXiv 1603.05279, algorithm 1, which updates w by the gradient of `α·sign(w)`.
    """

    method = "bwn"

    def __init__(self, *, surrogate: str = "identity", **options):
        super().__init__(surrogate=surrogate, **options)


@tf_keras.utils.register_keras_serializable("qat")
class DorefaBinaryWeightQuantizer(BwnWeightQuantizer):
    """DoReFa's one-bit weights: BWN with one α for the whole layer.

    Source: DoReFa-Net arXiv 1606.06160; tensorpack examples/DoReFa-Net/dorefa.py.
    """

    method = "dorefa"

    def __init__(self, *, channel_axes: tuple[int, ...] | None = None, **options):
        super().__init__(channel_axes=channel_axes, **options)


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

    def quantized(self, inputs, training, weights):
        return self.sign(inputs)
