"""No code that a model's file holds or names is run before someone has vouched for it.

Keras imports the modules that a configuration names, and runs the byte code of its Lambda layers,
in HDF5 files without asking. So the configuration is read first, and every class and function in
it must be Keras's own or an initializer of TensorFlow's, registered by the running program, or
given as a custom object.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from qat.errors import ModelError
from qat.loading.files import Format, ModelFile
from qat.loading.keras3_layers import APPLICATION_LAYERS, AUGMENTATION
from qat.loading.tensorflow_calls import SAFE_CALLS

_NAMESPACES = (
    tf_keras.layers,
    tf_keras.layers.experimental,
    tf_keras.initializers,
    tf_keras.regularizers,
    tf_keras.constraints,
    tf_keras.mixed_precision,
    # Of models nested in the model, which keep what they were compiled with.
    tf_keras.optimizers,
    tf_keras.optimizers.schedules,
    tf_keras.losses,
    tf_keras.metrics,
)
# EfficientNetV2 has TensorFlow's own; they hold numbers.
_INITIALIZERS = {
    (kind.__module__, kind.__name__)
    for kind in (
        tf.constant_initializer,
        tf.ones_initializer,
        tf.random_normal_initializer,
        tf.random_uniform_initializer,
        tf.zeros_initializer,
    )
}
_FUNCTIONS = (tf_keras.activations, tf_keras.losses, tf_keras.metrics)
_CODE = ("Lambda", "__lambda__")
# Keras 3 layers that run a program from elsewhere.
_PROGRAMS = ("FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper")
# They read the file that their vocabulary names.
_LOOKUPS = ("IntegerLookup", "StringLookup", "TextVectorization")
_CALLS = ("TFOpLambda", "SlicingOpLambda")
_MODELS = ("Functional", "Model", "Sequential")
# Values rather than classes, and Keras 3's types of numbers.
_VALUES = (
    "__bytes__ __ellipsis__ __keras_tensor__ __numpy__ __slice__ __tensor__ __tuple__ DTypePolicy "
    "DTypePolicyMap QuantizedDTypePolicy SeedGenerator TensorShape"
).split()
_QUANTIZED = ("FakeQuantize", "QuantizeLayer", "QuantizeWrapper", "QuantizeWrapperV2")
_REMEDY = "pass allow_unsafe_deserialization=True (--allow_unsafe_deserialization) if you trust it"


def check_safe(file: ModelFile, custom_objects: Mapping[str, Any]) -> None:
    """Refuses a file whose configuration names code that is not Keras's.

    Args:
        custom_objects: {name: class or function} that the caller vouches for.

    Raises:
        ModelError: the first such layer, its type, and what to do.
    """
    known = _Known(file, custom_objects)
    for owner, found in _objects(file.config, "the model"):
        known.check(owner, found)


def check_operations(file: ModelFile) -> None:
    """Refuses an HDF5 file of Keras 3 with operations, which Keras cannot read back: it keeps
    their class but not that they are no layers.

    Raises:
        ModelError: it names the operation.
    """
    if file.version < 3 or file.format is not Format.HDF5:
        return
    for _, found in _objects(file.config, "the model"):
        if "inbound_nodes" in found and not {"dtype", "layers"} & set(found["config"]):
            raise ModelError(
                f"{file.path}: {found['name']!r} ({found['class_name']}) is an operation, which "
                "Keras 3 cannot read back from .h5; save the model as a .keras file"
            )


def check_float(file: ModelFile) -> None:
    """Refuses a model that was quantized here or by TFMOT.

    Raises:
        ModelError: it names the layer.
    """
    for owner, found in _objects(file.config, "the model"):
        if str(found["class_name"]).split(">")[-1] in _QUANTIZED:
            raise ModelError(
                f"{file.path} is a quantized model ({owner}); open a .keras file of qat's with "
                "qat.load_quantized_model, or give the float model it came from"
            )


def _objects(config: Any, owner: str) -> Iterator[tuple[str, dict]]:
    """(layer it belongs to, object) for everything in a configuration that has a class."""
    if isinstance(config, dict):
        if isinstance(config.get("class_name"), str):
            inner = config.get("config")
            if isinstance(inner, dict) and isinstance(inner.get("name"), str):
                owner = f"layer {inner['name']!r} ({config['class_name']})"
            yield owner, config
        for value in config.values():
            yield from _objects(value, owner)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _objects(value, owner)


class _Known:
    """The classes and functions that may be taken from a configuration."""

    def __init__(self, file: ModelFile, custom_objects: Mapping[str, Any]):
        self.path = file.path
        self.keras3 = file.version >= 3
        registered = tf_keras.utils.get_custom_objects()
        if self.keras3:
            import keras

            registered = keras.utils.get_custom_objects()
        self.custom_objects = {**registered, **custom_objects}

    def check(self, owner: str, found: dict) -> None:
        name = found["class_name"]
        if name in _CODE and not self.names_functions(found):
            raise self.refusal(owner, "holds Python code", _REMEDY)
        if name in _PROGRAMS:
            raise self.refusal(owner, "runs a program from elsewhere", _REMEDY)
        config = found["config"] if isinstance(found.get("config"), dict) else {}
        if name in _LOOKUPS and isinstance(config.get("vocabulary"), str):
            raise self.refusal(owner, f"reads the file {config['vocabulary']!r}", _REMEDY)
        if name in _CALLS and (function := config.get("function")) not in SAFE_CALLS:
            raise self.refusal(
                owner, f"calls tf.{function}, which is no known computation", _REMEDY
            )
        if name == "function":
            self.check_function(owner, found)
        elif not self.knows_class(found):
            raise self.refusal(
                owner,
                f"is or has {name!r}, which is neither Keras's nor given",
                f"pass custom_objects={{{name!r}: …}} (--custom_objects=module:{name})",
            )

    def refusal(self, owner: str, what: str, remedy: str) -> ModelError:
        return ModelError(f"{self.path}: {owner} {what}; {remedy}")

    def names_functions(self, found: dict) -> bool:
        """Whether a Lambda only names functions, all of them given."""
        config = found.get("config")
        if found["class_name"] != "Lambda" or not isinstance(config, dict):
            return False
        given = self.named(config.get("function"))
        for part in ("output_shape", "mask"):
            value, kind = config.get(part), config.get(f"{part}_type", "raw")
            given = given and (self.named(value) or kind == "raw" and not isinstance(value, dict))
        return given and config.get("function_type", "function") == "function"

    def named(self, function: Any) -> bool:
        name = function.get("config") if isinstance(function, dict) else function
        return isinstance(name, str) and name in self.custom_objects

    def check_function(self, owner: str, found: dict) -> None:
        name = found.get("config")
        of_keras = _of_keras(found.get("module")) or found.get("module") == "builtins"
        if self.named(found) or of_keras and self.is_keras_function(name):
            return
        raise self.refusal(
            owner,
            f"names the function {name!r}, which is neither Keras's nor given",
            f"pass custom_objects={{{name!r}: …}} (--custom_objects=module:{name})",
        )

    def is_keras_function(self, name: Any) -> bool:
        places = list(_FUNCTIONS)
        if self.keras3:
            import keras

            places.append(keras.activations)
        found = [vars(place).get(name) for place in places if isinstance(name, str)]
        return name not in ("get", "serialize", "deserialize") and any(map(callable, found))

    def knows_class(self, found: dict) -> bool:
        name = found["class_name"]
        # As Keras looks: what is given or registered comes before the module that is named.
        if found.get("registered_name", name) in self.custom_objects:
            return True
        if (found.get("module"), name) in _INITIALIZERS:
            return True
        if not _of_keras(found.get("module")):
            return False
        if name in (*_MODELS, *_VALUES, *_CODE, *_CALLS, *APPLICATION_LAYERS, *AUGMENTATION):
            return True
        places = list(_NAMESPACES)
        if self.keras3:
            import keras

            if str(found.get("module")).startswith("keras.src.ops."):
                kind = vars(sys.modules.get(found["module"], keras.ops)).get(name)
                return inspect.isclass(kind) and issubclass(kind, keras.Operation)
            places += [keras.layers, keras.initializers, keras.regularizers, keras.constraints]
        return any(inspect.isclass(vars(place).get(name)) for place in places)


def _of_keras(module: Any) -> bool:
    """Whether a module that a configuration names is Keras's; HDF5 files name none."""
    return module is None or str(module).split(".")[0] in ("keras", "tf_keras")
