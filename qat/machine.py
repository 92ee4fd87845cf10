"""What a result was measured on, in words."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re

import tensorflow as tf

_PACKAGES = ("tensorflow", "tf-keras", "tensorflow-model-optimization", "ai-edge-litert")


def machine() -> str:
    """CPU model, cores and GPUs, e.g. "AMD EPYC 7B13, 16 cores; NVIDIA H100"."""
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = [detail.get("device_name", "a GPU") for detail in details]
    return "; ".join([f"{_processor()}, {os.cpu_count()} cores", *names])


def versions() -> dict[str, str]:
    """{package: version} of what trains and runs networks here."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()
