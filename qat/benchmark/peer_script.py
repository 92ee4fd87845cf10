"""Trains one QKeras or Larq network and measures it: `python -I peer_script.py FOLDER`.

Run by the Python of an environment that has the peers and knows nothing of qat; TF_USE_LEGACY_KERAS
must be 1, because both are written for Keras 2. FOLDER holds job.json, weights.npz (the float
checkpoint), train/ and measured/ (the batches); result.json is written there.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import pathlib
import sys
import time

import numpy as np
import tensorflow as tf
import tf_keras

layers = tf_keras.layers
KERNELS = (layers.Conv2D, layers.Dense)  # DepthwiseConv2D is a Conv2D only by name
# What a tensor of codes passes without change.
MOVES = (layers.MaxPooling2D, layers.Flatten, layers.Reshape, layers.Dropout, layers.ZeroPadding2D)
EDGE_BITS = 8
CALIBRATION_BATCHES = 10


class Batches:
    """Batches that qat wrote: float32 pixels 0-255 and int32 labels, in order."""

    def __init__(self, folder: pathlib.Path):
        shapes = json.loads((folder / "shapes.json").read_text())
        self.sizes = shapes["batch_sizes"]
        self.shape = tuple(shapes["image_shape"])
        self.labels = np.fromfile(folder / "labels.raw", np.int32)
        self.images = np.memmap(
            folder / "images.raw", np.uint8, "r", shape=(len(self.labels), *self.shape)
        )

    def __iter__(self):
        start = 0
        for size in self.sizes:
            rows = slice(start, start + size)
            yield np.float32(self.images[rows]), self.labels[rows]
            start = rows.stop

    def dataset(self) -> tf.data.Dataset:
        signature = (
            tf.TensorSpec((None, *self.shape), tf.float32),
            tf.TensorSpec((None,), tf.int32),
        )
        stream = tf.data.Dataset.from_generator(lambda: iter(self), output_signature=signature)
        return stream.prefetch(4)


class Network:
    """The float network, and what its tensors are read by."""

    def __init__(self, model: tf_keras.Model):
        self.model = model
        self.kernels = [layer for layer in model.layers if isinstance(layer, KERNELS)]
        self.edges = {self.kernels[0].name, self.kernels[-1].name}

    def is_inner(self, layer: layers.Layer) -> bool:
        """Whether a layer has a kernel and is neither the first nor the last that has."""
        return layer in self.kernels and layer.name not in self.edges

    def feeds_inner(self, layer: layers.Layer) -> bool:
        """Whether inner kernels alone read the layer's output, pooled or reshaped maybe."""
        readers = [node.outbound_layer for node in layer._outbound_nodes]
        return bool(readers) and all(
            self.feeds_inner(reader) if isinstance(reader, MOVES) else self.is_inner(reader)
            for reader in readers
        )

    def with_layers(self, replace) -> tf_keras.Model:
        """A copy; `replace(layer)` gives a layer's counterpart, or None to keep its kind."""

        def clone(layer):
            return replace(layer) or type(layer).from_config(layer.get_config())

        return tf_keras.models.clone_model(self.model, clone_function=clone)


def qkeras_network(network: Network, job: dict, batches: Batches) -> tf_keras.Model:
    """quantized_bits (or ternary) with automatic scales, quantized_relu; 8 bits at the edges."""
    import qkeras

    weights, activations = job["widths"]
    kinds = {layers.Conv2D: qkeras.QConv2D, layers.Dense: qkeras.QDense}
    integers = integer_bits(network, int(activations), batches)

    def kernel_quantizer(layer):
        if weights == "t" and network.is_inner(layer):
            return qkeras.ternary(alpha="auto")
        bits = int(weights) if network.is_inner(layer) else EDGE_BITS
        return qkeras.quantized_bits(bits, 0, symmetric=True, alpha="auto")

    def replace(layer):
        if type(layer) in kinds:
            config = layer.get_config()
            return kinds[type(layer)](**config, kernel_quantizer=kernel_quantizer(layer))
        if isinstance(layer, layers.ReLU):
            bits, integer = integers[layer.name]
            return qkeras.QActivation(qkeras.quantized_relu(bits, integer), name=layer.name)
        return None

    return network.with_layers(replace)


def integer_bits(network: Network, bits: int, batches: Batches) -> dict[str, tuple[int, int]]:
    """{ReLU: (bits, those above the binary point that quantize its float outputs best)}."""
    relus = [layer for layer in network.model.layers if isinstance(layer, layers.ReLU)]
    probe = tf_keras.Model(network.model.inputs, [relu.output for relu in relus])
    images = [x for x, _ in itertools.islice(batches, CALIBRATION_BATCHES)]
    outputs = probe.predict(np.concatenate(images), verbose=0)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    found = {}
    for relu, values in zip(relus, outputs, strict=True):
        width = bits if network.feeds_inner(relu) else EDGE_BITS

        def error(integer, values=values, width=width):
            step = 2.0 ** (integer - width)
            codes = np.clip(np.rint(values / step), 0, 2**width - 1)
            return np.square(codes * step - values).mean()

        found[relu.name] = width, min(range(-2, 6), key=error)
    return found


def larq_network(network: Network, job: dict, batches: Batches) -> tf_keras.Model:
    """ste_sign for inner kernels and what they read, in place of the ReLU; float at the edges."""
    import larq

    kinds = {layers.Conv2D: larq.layers.QuantConv2D, layers.Dense: larq.layers.QuantDense}
    signs = {
        "input_quantizer": "ste_sign",
        "kernel_quantizer": "ste_sign",
        "kernel_constraint": "weight_clip",
    }

    def replace(layer):
        if network.is_inner(layer):
            return kinds[type(layer)](**{**layer.get_config(), **signs})
        if isinstance(layer, layers.ReLU) and network.feeds_inner(layer):
            return layers.Activation("linear", name=layer.name)
        return None

    return network.with_layers(replace)


def train(model: tf_keras.Model, job: dict, batches: Batches) -> None:
    """Adam, its rate falling to 0 along a cosine, as qat.fit trains."""
    steps = job["epochs"] * job["steps_per_epoch"]
    schedule = tf_keras.optimizers.schedules.CosineDecay(job["learning_rate"], max(1, steps))
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(schedule), loss, ["accuracy"])
    model.fit(
        batches.dataset(), epochs=job["epochs"], steps_per_epoch=job["steps_per_epoch"], verbose=2
    )


def accuracy(model: tf_keras.Model, batches: Batches) -> tuple[float, int]:
    """(share of right classes, examples)."""
    predict = tf.function(lambda x: tf.argmax(model(x, training=False), axis=-1))
    classes = [predict(x).numpy() for x, _ in batches.dataset().rebatch(1000)]
    return float((np.concatenate(classes) == batches.labels).mean()), len(batches.labels)


def main(folder: pathlib.Path) -> None:
    """Runs the job in the folder."""
    job = json.loads((folder / "job.json").read_text())
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf_keras.utils.set_random_seed(job["seed"])
    batches, measured = Batches(folder / "train"), Batches(folder / "measured")
    float_model = tf_keras.models.model_from_json(job["model"])
    with np.load(folder / "weights.npz") as weights:
        checkpoint = [weights[f"arr_{index}"] for index in range(len(weights.files))]
    float_model.set_weights(checkpoint)
    build = {"qkeras": qkeras_network, "larq": larq_network}[job["peer"]]
    model = build(Network(float_model), job, batches)
    if job["from_checkpoint"]:
        model.set_weights(checkpoint)
    start = time.monotonic()
    train(model, job, batches)
    seconds = time.monotonic() - start
    share, examples = accuracy(model, measured)
    result = {
        "accuracy": share,
        "num_eval_examples": examples,
        "seconds": seconds,
        "versions": {
            name: importlib.metadata.version(name) for name in ("tensorflow", job["peer"])
        },
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
