"""Runs a file on Larq Compute Engine's interpreter, in a Python of its own.

`python larq_script.py FILE THREADS KERNELS`, kernels as `qat.verify.larq.LarqRunner` has them.
Needs larq-compute-engine and NumPy, no TensorFlow. Messages on stdin and stdout are eight bytes of
length and an .npz: the inputs and how often to run them; then the outputs and each run's seconds,
or `error`. The first message is an answer of no outputs: the file has been loaded.
"""

import importlib.util
import io
import os
import struct
import sys
import time
import types

import numpy as np


def load(path, threads, kernels):
    """The interpreter; the package's own __init__ would import TensorFlow."""
    package = types.ModuleType("larq_compute_engine")
    spec = importlib.util.find_spec("larq_compute_engine")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["larq_compute_engine"] = package
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    options = {"use_xnnpack": kernels == "default", "use_reference_bconv": kernels == "reference"}
    with open(path, "rb") as file:
        return Interpreter(file.read(), num_threads=threads, **options).interpreter


def serve(interpreter, receive, send):
    """Answers until stdin ends."""
    send({"seconds": []})
    while message := receive():
        inputs = [message[f"input{i}"] for i in range(len(message) - 1)]
        seconds = []
        for _ in range(int(message["runs"])):
            start = time.perf_counter()
            outputs = interpreter.predict(inputs)
            seconds.append(time.perf_counter() - start)
        arrays = {f"output{i}": output for i, output in enumerate(outputs)}
        send(arrays | {"seconds": seconds})


def main():
    """Speaks on what stdout was; whatever else is printed goes to stderr."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def receive():
        header = source.read(8)
        if len(header) < 8:
            return None
        with np.load(io.BytesIO(source.read(*struct.unpack("<q", header)))) as arrays:
            return dict(arrays)

    def send(arrays):
        content = io.BytesIO()
        np.savez(content, **arrays)
        sink.write(struct.pack("<q", len(content.getvalue())) + content.getvalue())
        sink.flush()

    try:
        serve(load(sys.argv[1], int(sys.argv[2]), sys.argv[3]), receive, send)
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
