"""Small networks of the kinds that people bring, each trained a little on data of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tf_keras

layers = tf_keras.layers
COUNT = 320


def blobs(rng: np.random.Generator, side: int, channels: int = 3) -> np.ndarray:
    """Images of 0-1 with one bright square each, and noise."""
    images = rng.uniform(0, 0.3, (COUNT, side, side, channels)).astype(np.float32)
    for image, (top, left) in zip(images, rng.integers(0, side - 4, (COUNT, 2)), strict=True):
        image[top : top + 4, left : left + 4] += rng.uniform(0.4, 0.7, channels)
    return images


def conv(x, filters: int, stride: int = 1, activation: str | None = "relu"):
    x = layers.Conv2D(filters, 3, stride, "same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    return layers.Activation(activation)(x) if activation else x


def u_net(rng):
    inputs = layers.Input((16, 16, 3))
    first = conv(inputs, 8)
    second = conv(layers.MaxPooling2D()(first), 16)
    x = conv(layers.MaxPooling2D()(second), 16)
    for skip, filters in ((second, 16), (first, 8)):
        x = layers.Conv2DTranspose(filters, 3, 2, "same", activation="relu")(x)
        x = conv(layers.Concatenate()([x, skip]), filters)
    outputs = layers.Conv2D(2, 1, activation="softmax")(x)
    x = blobs(rng, 16)
    return tf_keras.Model(inputs, outputs), x, (x.mean(-1) > 0.45).astype(np.int64)


def keyword_spotting(rng):
    inputs = layers.Input((64, 10))
    x = inputs
    for filters in (16, 24):
        x = layers.Conv1D(filters, 5, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.MaxPooling1D(2)(x)
    x = layers.SeparableConv1D(24, 3, padding="same", activation="relu")(x)
    outputs = layers.Dense(4, activation="softmax")(layers.GlobalAveragePooling1D()(x))
    labels = rng.integers(0, 4, COUNT)
    time = np.arange(64)[None, :, None] * (0.1 + 0.2 * labels[:, None, None])
    x = np.sin(time + np.arange(10)) + rng.normal(0, 0.3, (COUNT, 64, 10))
    return tf_keras.Model(inputs, outputs), x.astype(np.float32), labels


def detector(rng):
    """Two outputs, class and box for every cell; nearest upsampling in the neck."""
    inputs = layers.Input((16, 16, 3))
    fine = conv(inputs, 12, 2)
    coarse = conv(conv(fine, 16, 2), 16)
    up = layers.UpSampling2D(2, interpolation="nearest")(layers.Conv2D(12, 1)(coarse))
    x = conv(layers.Add()([fine, up]), 16)
    kinds = layers.Conv2D(1, 3, padding="same", activation="sigmoid", name="kind")(x)
    boxes = layers.Conv2D(4, 3, padding="same", name="box")(x)
    x = blobs(rng, 16)
    bright = x.reshape(COUNT, 8, 2, 8, 2, 3).mean((2, 4, 5))[..., None]
    kind = (bright > 0.45).astype(np.float32)
    return tf_keras.Model(inputs, [kinds, boxes]), x, [kind, bright * np.float32([1, -1, 2, 0.5])]


def transfer(rng):
    """A frozen backbone, trained under another head, nested in a new one; pixels rescaled."""
    images = blobs(rng, 16)
    labels = images.max((1, 2)).argmax(-1)
    image = layers.Input((16, 16, 3))
    body = tf_keras.Model(image, conv(conv(image, 8, 2), 16, 2), name="backbone")
    before = tf_keras.Sequential([body, layers.GlobalAveragePooling2D(), layers.Dense(3)])
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    before.compile(tf_keras.optimizers.Adam(1e-2), loss)
    before.fit(2.0 * images - 1.0, labels, epochs=30, verbose=0)
    body.trainable = False
    inputs = layers.Input((16, 16, 3))
    x = body(layers.Rescaling(2.0, -1.0)(inputs), training=False)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    outputs = layers.Dense(3, activation="softmax")(x)
    return tf_keras.Model(inputs, outputs), images, labels


def se_resnet(rng):
    inputs = layers.Input((16, 16, 3))
    x = conv(inputs, 16)
    for _ in range(2):
        y = conv(conv(x, 16), 16, activation=None)
        gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
        gate = layers.Conv2D(4, 1, activation="relu")(gate)
        gate = layers.Conv2D(16, 1, activation="sigmoid")(gate)
        x = layers.ReLU()(layers.Add()([x, layers.Multiply()([y, gate])]))
    outputs = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    x = blobs(rng, 16)
    return tf_keras.Model(inputs, outputs), x, x.max((1, 2)).argmax(-1)


def face_net(rng):
    """PReLU after every convolution, an embedding as output."""
    inputs = layers.Input((16, 16, 3))
    x = inputs
    for filters in (12, 16):
        x = layers.Conv2D(filters, 3, 2, "same", use_bias=False)(x)
        x = layers.PReLU(shared_axes=[1, 2], alpha_initializer="random_uniform")(
            layers.BatchNormalization()(x)
        )
    x = layers.DepthwiseConv2D(4)(x)
    outputs = layers.Dense(8)(layers.Flatten()(x))
    x = blobs(rng, 16)
    return tf_keras.Model(inputs, outputs), x, x.max((1, 2)) @ rng.normal(size=(3, 8))


def autoencoder(rng):
    inputs = layers.Input((16, 16, 3))
    x = conv(conv(inputs, 12, 2), 8, 2)
    for filters in (12, 8):
        x = layers.Conv2DTranspose(filters, 3, 2, "same", activation="relu")(x)
    outputs = layers.Conv2D(3, 3, padding="same", activation="sigmoid")(x)
    x = blobs(rng, 16)
    return tf_keras.Model(inputs, outputs), x, x


def two_inputs(rng):
    """An image and numbers beside it."""
    image, numbers = layers.Input((16, 16, 3), name="image"), layers.Input((5,), name="numbers")
    x = layers.GlobalAveragePooling2D()(conv(conv(image, 12, 2), 16, 2))
    y = layers.Dense(16, activation="relu")(numbers)
    x = layers.Dense(16, activation="relu")(layers.Concatenate()([x, y]))
    model = tf_keras.Model([image, numbers], layers.Dense(2)(x))
    x, y = blobs(rng, 16), rng.normal(size=(COUNT, 5)).astype(np.float32)
    return model, [x, y], np.stack([x.mean((1, 2, 3)) + y[:, 0], y[:, 1]], 1)


WHOLE_MODELS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "u_net": (u_net, ("sparse_categorical_crossentropy",)),
    "keyword_spotting": (keyword_spotting, ("sparse_categorical_crossentropy",)),
    "detector": (detector, ("binary_crossentropy", "mean_squared_error")),
    "transfer": (transfer, ("sparse_categorical_crossentropy",)),
    "se_resnet": (se_resnet, ("sparse_categorical_crossentropy",)),
    "face_net": (face_net, ("mean_squared_error",)),
    "autoencoder": (autoencoder, ("mean_squared_error",)),
    "two_inputs": (two_inputs, ("mean_squared_error",)),
}
