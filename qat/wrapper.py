"""The wrapper that quantizes a layer's kernel: TFMOT's, which respects frozen layers here."""

from __future__ import annotations

import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapperV2,
)


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
        # Layers of several arguments, e.g. attention, are never quantized.
        mode = {"training": training} if self.layer._expects_training_arg else {}
        return self.layer.call(inputs, *others, **mode, **kwargs)

    @property
    def trainable_weights(self):
        return super().trainable_weights if self.layer.trainable else []

    @property
    def non_trainable_weights(self):
        frozen = super().non_trainable_weights
        if self.layer.trainable:
            return frozen
        return self._dedup_weights([*super().trainable_weights, *frozen])
