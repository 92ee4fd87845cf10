"""Models as users have them, Keras 2 or Keras 3, file or object, as tf_keras models."""

from qat.loading.custom_objects import parse_custom_objects
from qat.loading.keras3 import from_keras3, is_keras3_model
from qat.loading.load import load_model

__all__ = ["from_keras3", "is_keras3_model", "load_model", "parse_custom_objects"]
