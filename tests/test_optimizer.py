"""QatAdam against NumPy, and the names that it goes by."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from stripes import float_model

from qat import configs
from qat.optimizer import QatAdam, belongs_to_quantizer, cosine_schedule
from qat.recipe import METHODS, TensorSpec

layers = tf_keras.layers
SHAPE, RATE, DECAY, FACTOR = (3, 4), 0.01, 0.3, 0.125
# name: (rate factor, whether it decays)
VARIABLES = {
    "conv/kernel": (1.0, True),
    "conv/depthwise_kernel": (1.0, True),
    "conv/bias": (1.0, False),
    "bn/gamma": (1.0, False),
    "quant_conv/kernel_gain": (FACTOR, False),
    "quant_conv/depthwise_kernel_gain": (FACTOR, False),
    "relu_fake_quantize/output_shift": (FACTOR, False),
}


def arrays(seed, count):
    return list(np.random.default_rng(seed).normal(0, 1, (count, *SHAPE)).astype(np.float32))


def numpy_adam(w, gradients, rate, decay):
    w, m, v = w.astype(float), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.astype(float) ** 2
        w = w - decay * w
        w = w - rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)
    return w


@pytest.mark.parametrize("jit_compile", (False, True))
@pytest.mark.parametrize("steps", (1, 5))
def test_each_variable_has_its_rate_and_decay(steps, jit_compile):
    starts = arrays(0, len(VARIABLES))
    variables = [tf.Variable(w, name=name) for w, name in zip(starts, VARIABLES, strict=True)]
    optimizer = QatAdam(
        RATE, weight_decay=DECAY, quantizer_learning_rate=FACTOR, jit_compile=jit_compile
    )
    gradients = [arrays(step + 1, len(VARIABLES)) for step in range(steps)]
    step = tf.function(lambda given: optimizer.apply_gradients(zip(given, variables, strict=True)))
    for given in gradients:
        step([tf.constant(g) for g in given])
    for i, (factor, decays) in enumerate(VARIABLES.values()):
        own = [given[i] for given in gradients]
        expected = numpy_adam(starts[i], own, RATE * factor, RATE * DECAY * decays)
        np.testing.assert_allclose(variables[i], expected, rtol=0, atol=2e-6)
    assert float(optimizer.learning_rate) == np.float32(RATE)


def test_a_scaled_rate_is_adams_own_at_that_rate_bit_for_bit():
    (start, *gradients) = arrays(9, 4)
    ours, plain = (tf.Variable(start, name="quant_conv/kernel_gain") for _ in range(2))
    scaled = QatAdam(RATE, quantizer_learning_rate=FACTOR)
    adam = tf_keras.optimizers.Adam(RATE * FACTOR)
    for gradient in gradients:
        scaled.apply_gradients([(tf.constant(gradient), ours)])
        adam.apply_gradients([(tf.constant(gradient), plain)])
    np.testing.assert_array_equal(ours, plain)


def test_it_is_serializable():
    schedule = cosine_schedule(0.1, 20, 5)
    optimizer = QatAdam(schedule, weight_decay=0.5, quantizer_learning_rate=0.25, beta_2=0.99)
    again = tf_keras.optimizers.deserialize(tf_keras.optimizers.serialize(optimizer))
    assert type(again) is QatAdam and again.get_config() == optimizer.get_config()
    assert [float(again.learning_rate), again.quantizer_learning_rate] == [0.0, 0.25]


def test_the_rate_can_be_set():
    optimizer = QatAdam(0.5)
    optimizer.learning_rate = 0.25
    assert float(optimizer.learning_rate) == 0.25


@pytest.mark.parametrize("factor", (-1.0, float("nan"), float("inf")))
def test_an_illegal_factor_is_named(factor):
    with pytest.raises(ValueError, match="quantizer_learning_rate"):
        QatAdam(quantizer_learning_rate=factor)


class Owner(layers.Layer):
    """Like the layers that quantizers add their variables to."""


def quantizers():
    for method, made in METHODS.items():
        for bits in made.weights[:1] + made.weights[-1:]:
            yield (
                method,
                "kernel",
                configs.weight_quantizer(TensorSpec(bits=bits, method=method), (-1,)),
            )
        for bits in made.activations[:1] + made.activations[-1:]:
            yield (
                method,
                "output",
                configs.activation_quantizer(TensorSpec(bits=bits, method=method)),
            )


def test_all_that_quantizers_train_is_known_by_its_name():
    trained = set()
    for method, name, quantizer in quantizers():
        owner = Owner()
        quantizer.build(tf.TensorShape([3, 3, 2, 4]), name, owner)
        for variable in owner.trainable_weights:
            assert belongs_to_quantizer(variable), f"{method}: {variable.name}"
            trained.add(method)
    assert {"lsq", "lsqplus", "pact"} <= trained


def test_layers_have_no_such_names():
    model = float_model()
    assert len(model.trainable_variables) == 5
    assert not any(map(belongs_to_quantizer, model.trainable_variables))
