"""quantize_model: a float Keras model in, a new quantization-aware one out."""

from __future__ import annotations

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_annotate import (
    QuantizeAnnotate,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_wrapper import (
    QuantizeWrapper,
)

from qat.canonical import as_layers, functional, leaves
from qat.deep import deep_models
from qat.errors import ModelError
from qat.layers import FakeQuantize
from qat.loading import from_keras3, is_keras3_model
from qat.loading.precision import in_float32, made_in_float32
from qat.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from qat.roles import UnsupportedLayerError
from qat.scheme import LayoutTransform
from qat.wrapper import kernels_once_a_call


@made_in_float32()
def quantize_model(
    model: tf_keras.Model,
    recipe: str | Recipe = DEFAULT_RECIPE,
    *,
    input_range: tuple[float, float] | None = None,
) -> tf_keras.Model:
    """A new model that trains with the integers its TFLite file will hold.

    The float model is left as it was; weights are copied. See `qat.quantization_report` for what
    became of each layer.

    Args:
        model: functional or Sequential model, built; a Keras 3 one is converted to tf_keras.
        recipe: grammar name ("w8a8", "w4a8", "w1a1", …), JSON file, or `Recipe`.
        input_range: (minimum, maximum) of the inputs, e.g. (0, 255) for image bytes; None =
            observed in training and calibration.

    Raises:
        RecipeError: an illegal recipe, or a rule that matches nothing.
        UnsupportedLayerError: a layer without an integer operator.
        ModelError: a model that is not functional, or not built; an operator call (`a + b`,
            `tf.nn.relu(x)`, …) that no layer does.
    """
    # 1. The recipe and the model are legal before anything is built.
    recipe = load_recipe(recipe)
    if is_keras3_model(model):
        model = from_keras3(model)
    model = in_float32(functional(model))
    _require_plain(model)
    # 2. Nested models and operator calls become layers.
    model, origins = as_layers(model)
    # 3. Canonical form, decisions, activation quantizers, kernel wrappers. What TFMOT's
    # `quantize_apply` does with all layers annotated, without the four copies that it makes.
    everything = {layer.name: {"quantize_config": None} for layer in model.layers}
    model, _ = LayoutTransform(recipe, input_range, origins).apply(model, everything)
    # 4. Layers forget the models that this one was built from.
    return kernels_once_a_call(_without_stale_nodes(model))


def _require_plain(model: tf_keras.Model) -> None:
    """Refuses layers that cannot be copied, or are not the float model's own, by name."""
    for layer in leaves(model):
        kind = type(layer).__name__
        if isinstance(layer, QuantizeAnnotate):
            raise ModelError(
                f"layer {layer.layer.name!r} is annotated for TFMOT; quantize this model with "
                "tfmot.quantization.keras.quantize_apply(model, scheme=qat.scheme(…)), or give "
                "quantize_model the model without annotations"
            )
        if isinstance(layer, FakeQuantize | QuantizeWrapper):
            raise ModelError(
                f"model {model.name!r} is already quantized (layer {layer.name!r}); quantize the "
                "float model it came from"
            )
        if not _can_be_copied(type(layer)):
            raise ModelError(
                f"layer {layer.name!r} is of the custom class {kind}, which Keras cannot copy; "
                "decorate the class with @tf_keras.utils.register_keras_serializable()"
            )
        if isinstance(layer, tf_keras.layers.Lambda):
            raise UnsupportedLayerError(
                f"layer {layer.name!r} (Lambda) hides what it computes; use layers, or a custom "
                "layer class"
            )


def _can_be_copied(kind: type) -> bool:
    if kind.__module__.split(".")[0] in ("tf_keras", "tensorflow_model_optimization"):
        return True
    name = tf_keras.utils.get_registered_name(kind)
    return tf_keras.utils.get_registered_object(name) is kind


@deep_models()
def _without_stale_nodes(model: tf_keras.Model) -> tf_keras.Model:
    """The same model; its layers keep only the calls that it consists of.

    Without it `layer.output` belongs to an intermediate model, and nothing can be tapped.
    """
    own = {id(node) for nodes in model._nodes_by_depth.values() for node in nodes}
    for layer in model.layers:
        for nodes in (layer._inbound_nodes, layer._outbound_nodes):
            nodes[:] = [node for node in nodes if id(node) in own]
        for index, node in enumerate(layer._inbound_nodes):
            for tensor in tf.nest.flatten(node.outputs):
                tensor._keras_history = tensor._keras_history._replace(node_index=index)
    return tf_keras.Model(model._nested_inputs, model._nested_outputs, name=model.name)
