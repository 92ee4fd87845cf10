"""Quantization-aware training for Keras CNNs whose TFLite files hold the trained integers."""

from qat import callbacks, configs, quantizers, settings, ste
from qat.account import LayerAccount, quantization_report
from qat.apply import quantize_model
from qat.calibrate import calibrate
from qat.exact import ExactModel
from qat.export.tflite import export_tflite
from qat.layers import FakeQuantize
from qat.loading import load_model, parse_custom_objects
from qat.recipe import Recipe, Rule, TensorSpec
from qat.reestimate import reestimate_batch_norm
from qat.register import register
from qat.saving import load_quantized_model, save_model
from qat.scheme import scheme
from qat.settle import settle_biases
from qat.train import TrainConfig, fit
from qat.verify.compare import Verification, verify_tflite

__all__ = [
    "ExactModel",
    "FakeQuantize",
    "LayerAccount",
    "Recipe",
    "Rule",
    "TensorSpec",
    "TrainConfig",
    "Verification",
    "calibrate",
    "callbacks",
    "configs",
    "export_tflite",
    "fit",
    "load_model",
    "load_quantized_model",
    "parse_custom_objects",
    "quantization_report",
    "quantize_model",
    "quantizers",
    "reestimate_batch_norm",
    "register",
    "save_model",
    "scheme",
    "settings",
    "settle_biases",
    "ste",
    "verify_tflite",
]
