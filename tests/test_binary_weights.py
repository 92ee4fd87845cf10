"""One-bit weights whose gradients differ from the plain sign's: XNOR-Net, BWN, DoReFa."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from quantizer_calls import (
    F32,
    HALF_ULP,
    assert_serializable,
    call,
    every_way,
    sample,
    shared_axes,
)

from qat.quantizers import (
    BinaryWeightQuantizer,
    BwnWeightQuantizer,
    DorefaBinaryWeightQuantizer,
    XnorWeightQuantizer,
)

KINDS = [XnorWeightQuantizer, BwnWeightQuantizer, DorefaBinaryWeightQuantizer]
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_serialization():
    assert_serializable(
        {
            "binary": lambda: BinaryWeightQuantizer(),
            "xnor": lambda: XnorWeightQuantizer(),
            "xnorswish": lambda: XnorWeightQuantizer(surrogate="swish", beta=3.0),
            "bwn": lambda: BwnWeightQuantizer(),
            "bwnclipped": lambda: BwnWeightQuantizer(surrogate="clipped"),
            "dorefa": lambda: DorefaBinaryWeightQuantizer(),
            "dorefachannels": lambda: DorefaBinaryWeightQuantizer(channel_axes=(-1,)),
        }
    )


@every_kind
@every_way
def test_values(kind, axes, mode):
    w = sample(spread=0.8)
    called = call(kind(channel_axes=axes), w, mode=mode)
    alpha = np.abs(w.astype(float)).mean(shared_axes(w.ndim, axes), keepdims=True)
    np.testing.assert_array_equal(called.codes, 7 * np.sign(w))
    np.testing.assert_array_equal(called.y, called.codes * called.scale)
    np.testing.assert_allclose(called.y, alpha * np.sign(w), rtol=(w.size + 4) * HALF_ULP)


def test_default_alphas():
    w = tf.constant(sample())
    assert XnorWeightQuantizer().grid({}, w).scale.shape == (1, 1, 1, 6)
    assert BwnWeightQuantizer().grid({}, w).scale.shape == (1, 1, 1, 6)
    assert DorefaBinaryWeightQuantizer().grid({}, w).scale.shape == ()


@every_kind
def test_names_and_widths(kind):
    quantizer = kind()
    names = {XnorWeightQuantizer: "xnor", BwnWeightQuantizer: "bwn"}
    assert quantizer.method == names.get(kind, "dorefa")
    assert quantizer.num_bits == 1 and quantizer.container_bits == 4  # ±7
    assert quantizer.code_unit == 7


@every_way
def test_xnor_gradient(axes, mode):
    w = sample(spread=0.8)
    g = np.random.default_rng(1).normal(size=w.shape).astype(F32)
    dx = call(XnorWeightQuantizer(channel_axes=axes), w, mode=mode, upstream=g).dx
    shared, wide, up = shared_axes(w.ndim, axes), w.astype(float), g.astype(float)
    n = np.prod([w.shape[axis] for axis in shared])
    alpha, sign = np.abs(wide).mean(shared, keepdims=True), np.sign(wide)
    through_alpha = sign / n * (sign * up).sum(shared, keepdims=True)
    expected = alpha * (np.abs(wide) <= 1) * up + through_alpha
    # Each term has n products; they are of the size of α and of 1/√n.
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=(n + 10) * HALF_ULP)
    assert np.abs(wide).max() > 1.5 and np.abs(through_alpha).max() > 1e-3


@every_way
@pytest.mark.parametrize("kind", [BwnWeightQuantizer, DorefaBinaryWeightQuantizer])
def test_bwn_gradient_is_the_identity(kind, axes, mode):
    w = sample(spread=0.8)
    g = np.random.default_rng(1).normal(size=w.shape).astype(F32)
    np.testing.assert_array_equal(call(kind(channel_axes=axes), w, mode=mode, upstream=g).dx, g)


@pytest.mark.parametrize("kind", [BinaryWeightQuantizer, *KINDS])
def test_mixed_precision_takes_the_sign_of_the_stored_weight(kind):
    """-1e-9 is -0 in float16, whose sign would be +1; the export sees float32."""

    class Holder(tf_keras.layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight("kernel", [2, 2])
            self.built = True

        def call(self, inputs):
            assert self.kernel.dtype == "float16"  # read through Keras's autocast
            return kind()(self.kernel, True, {})

    layer = Holder(dtype="mixed_float16")
    layer.build([1])
    layer.kernel.assign([[-1e-9, 1.0], [0.5, -1e-9]])
    y = layer(tf.ones([1, 1])).numpy()
    assert y.dtype == np.float16
    np.testing.assert_array_equal(np.sign(y), [[-1, 1], [1, -1]])
