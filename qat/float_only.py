"""Keras layers without an integer operator: those that stay in float32, and those refused."""

from __future__ import annotations

import tf_keras

layers = tf_keras.layers
_NORMALIZES = "TFLite has no integer kernel for the square roots and quotients of a normalization"
_THREE = "TFLite's three-dimensional convolutions have float kernels only"
_ATTENTION = "with masks, options or axes of this kind it is computed in float32 here"
_LOCAL = "no TFLite kernel has a filter of its own for each place"
# Layers without an integer operator, and why; they stay in float32 whatever the recipe says.
FLOAT_ONLY: dict[type, str] = {
    **dict.fromkeys(
        (layers.LayerNormalization, layers.GroupNormalization, layers.UnitNormalization),
        _NORMALIZES,
    ),
    **dict.fromkeys((layers.Conv3D, layers.Conv3DTranspose), _THREE),
    **dict.fromkeys((layers.Attention, layers.MultiHeadAttention), _ATTENTION),
    layers.Dot: "normalized, or of tensors of these ranks, it is computed in float32 here",
    layers.EinsumDense: "no integer form of its equation is written but of Dense's",
    **dict.fromkeys((layers.LocallyConnected1D, layers.LocallyConnected2D), _LOCAL),
}
# Layers that no TFLite file of ours can hold, in integers or in float, and what to do.
_STATE = "it keeps a state from step to step; use convolutions over time, e.g. Conv1D"
_STRINGS = "it prepares data; do that in the input pipeline, in front of the model"
REFUSED: dict[type, str] = {
    **dict.fromkeys(
        (layers.RNN, layers.LSTM, layers.GRU, layers.SimpleRNN, layers.Bidirectional), _STATE
    ),
    **dict.fromkeys((layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D), _STATE),
    **dict.fromkeys(
        (
            layers.CategoryEncoding,
            layers.Hashing,
            layers.HashedCrossing,
            layers.IntegerLookup,
            layers.StringLookup,
            layers.TextVectorization,
        ),
        _STRINGS,
    ),
    layers.Masking: "masks do not reach the file; cut the sequences to one length",
}
