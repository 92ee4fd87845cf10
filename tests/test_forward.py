"""Running call by call gives what the model gives, and leaves no trace in it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_models import branches, data_for, model_of, residual

from qat.forward import forward, in_mode, infer, predictor

layers = tf_keras.layers


@pytest.mark.parametrize(("build", "shape"), [(branches, (8, 8, 2)), (residual, (6, 6, 3))])
def test_the_models_own_outputs(build, shape):
    model = model_of(build, shape)
    x = data_for(model, 4)
    seen = []

    def visit(call, args, kwargs):
        seen.append(call.layer.name)
        return infer(call, args, kwargs)

    (found,) = forward(model, x, visit)
    np.testing.assert_allclose(found, model(x[0], training=False), rtol=1e-6, atol=1e-6)
    assert sorted(seen) == sorted(layer.name for layer in model.layers[1:])
    assert tf_keras.Model(model.inputs, model.layers[-2].output)(x[0]).shape[0] == 4


def test_batches_of_all_sizes_are_predicted_by_one_trace():
    traced = []

    @tf_keras.utils.register_keras_serializable("test")
    class Counted(layers.Layer):
        def call(self, x):
            traced.append(x.shape)
            return 2 * x

    one, two = tf_keras.Input([3]), tf_keras.Input([3], dtype=tf.int32)
    model = tf_keras.Model([one, two], {"sum": Counted()(one) + tf.cast(two, tf.float32)})
    predict, built = predictor(model), len(traced)
    for size in (4, 4, 4, 1):
        found = predict([tf.ones([size, 3]), 3 * tf.ones([size, 3])])
        np.testing.assert_array_equal(found["sum"], np.full([size, 3], 5.0))
    assert len(traced) == built + 2  # the first batch runs without a trace


def test_calls_can_be_replaced():
    x = tf_keras.Input([3])
    y = layers.Rescaling(3.0, name="thrice")(layers.Rescaling(2.0, name="twice")(x))
    model = tf_keras.Model(x, [y, x])

    def visit(call, args, kwargs):
        return args[0] if call.layer.name == "twice" else infer(call, args, kwargs)

    found = tf.function(lambda *tensors: forward(model, tensors, visit))(tf.ones([2, 3]))
    np.testing.assert_array_equal(found[0], np.full([2, 3], 3.0))
    np.testing.assert_array_equal(found[1], np.ones([2, 3]))


def test_training_and_inference():
    x = tf_keras.Input([500])
    model = tf_keras.Model(x, layers.Dropout(0.5)(x))
    always = tf_keras.Model(x, layers.Dropout(0.5)(x, training=True))

    def training(call, args, kwargs):
        return in_mode(call, args, kwargs, training=True)

    zeros = [
        np.count_nonzero(forward(net, [tf.ones([4, 500])], visit)[0] == 0)
        for net, visit in [(model, infer), (model, training), (always, infer)]
    ]
    assert zeros[0] == 0 and 800 < zeros[1] < 1200 and 800 < zeros[2] < 1200
