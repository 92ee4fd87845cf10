"""The wrapper that quantizes a layer's kernel: once a call of the model."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapperV2,
)

# Of the model call that runs in this thread: {kernel and how it is quantized: the quantized one}.
_running = threading.local()


@contextlib.contextmanager
def _one_call() -> Iterator[None]:
    if getattr(_running, "kernels", None) is not None:  # of a model around this one
        yield
        return
    _running.kernels = {}
    try:
        yield
    finally:
        _running.kernels = None


def kernels_once_a_call(model: tf_keras.Model) -> tf_keras.Model:
    """Has a layer that the model calls several times quantize its kernel once a call of the model.

    No longer than that: no optimizer changes a variable in it, and one gradient tape sees all of
    it. The model stays of Keras's own class, since a file with another is not loaded without it;
    copies of the model that others make (`clone_model`) quantize at each call of the layer.
    """

    def call(self, inputs, training=None, mask=None):
        with _one_call():
            return type(self).call(self, inputs, training=training, mask=mask)

    model.call = types.MethodType(call, model)  # SavedModels want it bound
    return model


@tf_keras.utils.register_keras_serializable("qat")
class KernelWrapper(QuantizeWrapperV2):
    """TFMOT's QuantizeWrapperV2; it trains nothing while its layer is not trainable.

    TFMOT lists the kernel among the trainable weights whatever `trainable` says, so that a frozen
    backbone would train again once it is quantized.

    Weights come in one order, the layer's own first, whether the layer was built before its wrapper
    (`quantize_apply`) or with it (a file that is loaded), frozen or not: files know them by it.
    """

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True
        if not self.layer.trainable:  # TFMOT does so with what is trainable
            self._trainable_weights.extend(self.layer._trainable_weights)
        super().build(input_shape)

    def call(self, inputs, *others, training=None, **kwargs):
        if not others:
            return super().call(inputs, training=training, **kwargs)
        # Layers of several arguments, e.g. masked attention, are never quantized.
        mode = {"training": training} if self.layer._expects_training_arg else {}
        return self.layer.call(inputs, *others, **mode, **kwargs)

    def _make_quantizer_fn(self, quantizer, x, training, quantizer_vars) -> Callable:
        quantize = super()._make_quantizer_fn(quantizer, x, training, quantizer_vars)
        kernels = getattr(_running, "kernels", None)
        if kernels is None or not isinstance(x, tf.Variable):
            return quantize

        def once() -> tf.Tensor:
            # A branch's tensors cannot leave it.
            graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
            key = id(x), id(quantizer), training, graph
            if key not in kernels:
                kernels[key] = quantize()
            return kernels[key]

        return once

    @property
    def trainable_weights(self):
        return super().trainable_weights if self.layer.trainable else []

    @property
    def non_trainable_weights(self):
        frozen = super().non_trainable_weights
        if self.layer.trainable:
            return frozen
        return self._dedup_weights([*super().trainable_weights, *frozen])
