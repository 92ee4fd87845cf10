"""Small Keras models with realistic weights, quantized and calibrated, for several test modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter, OpResolverType

import qat
from qat import configs

layers = tf_keras.layers


def recipe(weight_bits: int, activation_bits: int, *rules: qat.Rule) -> qat.Recipe:
    """One rule for all layers, the first and the last ones too, after the rules given."""
    weights, activations = qat.TensorSpec(bits=weight_bits), qat.TensorSpec(bits=activation_bits)
    everything = qat.Rule(weights=weights, activations=activations)
    return qat.Recipe(name=f"w{weight_bits}a{activation_bits}", rules=(*rules, everything))


def everywhere(name: str) -> qat.Recipe:
    """The recipe's rule for all layers, the first and the last ones too.

    The input, which has negative numbers, lies on 8 bits if the method would cut them off.
    """
    rule = qat.Recipe.from_name(name).rules[-1]
    if not configs.activation_quantizer(rule.activations).cuts_negatives:
        return qat.Recipe(name=name, rules=(rule,))
    first = dataclasses.replace(rule, position="first", activations=qat.TensorSpec(bits=8))
    return qat.Recipe(name=name, rules=(first, rule))


def randomize(model: tf_keras.Model, seed: int = 0) -> tf_keras.Model:
    """He kernels, biases of their size, moving statistics near the data's, gammas of both signs."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        values = []
        for variable in layer.weights:
            name, shape = variable.name.split(":")[0].split("/")[-1], variable.shape
            if "kernel" in name:
                fan_in = max(1, int(np.prod(shape[:-1])))
                values.append(rng.normal(0, np.sqrt(2 / fan_in), shape))
            elif name == "gamma":
                values.append(rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape))
            elif name == "moving_variance":
                values.append(rng.uniform(0.5, 2, shape))
            else:
                values.append(rng.normal(0, 0.3, shape))
        layer.set_weights(values)
    return model


def model_of(
    build: Callable, *shapes: tuple[int, ...], seed: int = 0, name: str = "net"
) -> tf_keras.Model:
    """The functional model `build(*inputs)` on inputs of these shapes (batch left out)."""
    inputs = [layers.Input(shape, name=f"in{i}") for i, shape in enumerate(shapes)]
    outputs = build(*inputs)
    model = tf_keras.Model(inputs[0] if len(inputs) == 1 else inputs, outputs, name=name)
    return randomize(model, seed)


def kernel_layers(activation: str | None) -> dict[str, tf_keras.layers.Layer]:
    """{kind: a layer with a kernel and this activation}."""
    return {
        "convolution": layers.Conv2D(8, 3, activation=activation),
        "depthwise": layers.DepthwiseConv2D(3, depth_multiplier=2, activation=activation),
        "transposed": layers.Conv2DTranspose(8, 3, strides=2, activation=activation),
        "dense": layers.Dense(40, activation=activation),
        "separable": layers.SeparableConv2D(8, 3, activation=activation),
    }


def data_for(model: tf_keras.Model, count: int = 32, seed: int = 1) -> list[np.ndarray]:
    """Normal inputs, one array for each input of the model."""
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, (count, *x.shape[1:])).astype(np.float32) for x in model.inputs]


def batches(data: list[np.ndarray], size: int = 32) -> tf.data.Dataset:
    """Batches of x, as (x,) so that several inputs stay together."""
    x = data[0] if len(data) == 1 else tuple(data)
    return tf.data.Dataset.from_tensor_slices((x,)).batch(size)


def quantized(model: tf_keras.Model, how="w8a8", data=None, **options) -> tf_keras.Model:
    """Quantized and calibrated on the data, or on `data_for` it."""
    made = qat.quantize_model(model, how, **options)
    return qat.calibrate(made, batches(data_for(model) if data is None else data))


KERNELS = {
    "default": OpResolverType.AUTO,
    "optimized": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "reference": OpResolverType.BUILTIN_REF,
}


def run_file(path, data: list[np.ndarray], kernels: str = "default") -> list[np.ndarray]:
    """The file's raw outputs for the given arrays, one example at a time."""
    interpreter = Interpreter(
        str(path), experimental_op_resolver_type=KERNELS[kernels], num_threads=1
    )
    interpreter.allocate_tensors()
    outputs = []
    for row in zip(*data, strict=True):
        for detail, x in zip(interpreter.get_input_details(), row, strict=True):
            interpreter.set_tensor(detail["index"], x[None].astype(detail["dtype"]))
        interpreter.invoke()
        details = interpreter.get_output_details()
        outputs.append([interpreter.get_tensor(detail["index"])[0].copy() for detail in details])
    return [np.stack(parts) for parts in zip(*outputs, strict=True)]


def run_model(model: tf_keras.Model, data: list[np.ndarray]) -> list[np.ndarray]:
    """The Keras model's outputs in inference, always a list."""
    outputs = model(data[0] if len(data) == 1 else data, training=False)
    return [output.numpy() for output in tf.nest.flatten(outputs)]


def branches(x):
    """All kinds of kernels, pools, joins and curves."""
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False)(x)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    z = layers.Conv2D(12, 3, padding="same", dilation_rate=2)(x)
    y = layers.ReLU()(layers.Add()([y, z]))
    pooled = layers.AveragePooling2D(3, strides=2, padding="same")(y)
    y = layers.Concatenate()([pooled, layers.MaxPooling2D(2, padding="same")(y)])
    y = layers.Conv2DTranspose(4, 3, strides=2, padding="same", name="up")(y)
    y = layers.Multiply()([y, layers.Activation("sigmoid")(y)])
    y = layers.Flatten()(layers.ZeroPadding2D(1)(y))
    y = layers.Dense(9, activation="tanh", name="hidden")(y)
    return layers.Dense(5, activation="softmax", name="classes")(y)


def residual(x):
    """A residual block, which a binary recipe changes most, and a global mean."""

    def block(x, name):
        y = layers.Conv2D(8, 3, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(name=f"{name}_norm")(y)

    x = layers.ReLU()(block(x, "first"))
    y = block(layers.ReLU()(block(x, "second")), "third")
    x = layers.ReLU()(layers.Add()([x, y]))
    return layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(x))
