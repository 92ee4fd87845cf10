"""Running a file of the lce target through Larq Compute Engine's interpreter.

It needs NumPy below 2, which TensorFlow 2.21 does not go with: it runs in a process of another
Python, named by the environment variable QAT_LCE_PYTHON.
"""

from __future__ import annotations

import io
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import weakref

import numpy as np

from qat.errors import UserError
from qat.larq_file import runs_on_larq
from qat.tflite_file import FileError, FileTensor, read_file
from qat.verify.interpreter import KERNELS, WARM_UP, Runner

VARIABLE = "QAT_LCE_PYTHON"
ENVIRONMENT = (
    'python3.11 -m venv lce && lce/bin/python -m pip install "larq-compute-engine==0.16.*" '
    f'"numpy<2" && export {VARIABLE}=$PWD/lce/bin/python'
)
SCRIPT = pathlib.Path(__file__).with_name("larq_script.py")
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def open_runner(
    path: str | os.PathLike, *, kernels: str = "default", threads: int | None = None
) -> Runner:
    """The file, loaded by the interpreter that has its operators: LiteRT's or Larq's.

    Args:
        kernels: "default", "optimized" or "reference", see `Runner` and `LarqRunner`. Default ones
            of a file for tflite-micro are LiteRT's optimized ones, whose convolutions round as
            those of tflite-micro; XNNPACK's round otherwise.
        threads: None = all cores.

    Raises:
        FileError: as `Runner`. UserError: as `require_python`.
    """
    file = read_file(path)
    if file.target == "tflm" and kernels == "default":
        kernels = "optimized"
    runner = LarqRunner if runs_on_larq(file) else Runner
    return runner(path, kernels=kernels, threads=threads)


def require_python() -> str:
    """The Python that has Larq Compute Engine.

    Raises:
        UserError: none is named or it has no such package, with the commands that make one.
    """
    python = os.environ.get(VARIABLE)
    if not python or shutil.which(python) is None:
        what = f"{VARIABLE}={python} is no program" if python else f"{VARIABLE} is not set"
        raise UserError(f"running a file of target lce: {what}; make one: {ENVIRONMENT}")
    found = subprocess.run([python, "-I", "-c", _FIND, "larq_compute_engine"], capture_output=True)
    if found.returncode:
        raise UserError(f"{VARIABLE}={python} has no larq-compute-engine; make one: {ENVIRONMENT}")
    return python


class LarqRunner(Runner):
    """A file loaded by Larq Compute Engine's interpreter, in a process that ends with this object.

    Args:
        path: of the .tflite file.
        kernels: "default" (XNNPACK for what is not Larq's), "optimized" (without XNNPACK), or
            "reference" (without, and LceBconv2d's reference kernel).
        threads: None = all cores.

    Raises:
        FileError: the file cannot be read, or the interpreter refuses it.
        UserError: as `require_python`.
    """

    def __init__(
        self, path: str | os.PathLike, *, kernels: str = "default", threads: int | None = None
    ):
        if kernels not in KERNELS:
            raise ValueError(f"unknown kernels {kernels!r}; legal: {', '.join(KERNELS)}")
        self.path, self.kernels = os.fspath(path), kernels
        file = read_file(self.path)
        self.inputs = [_details(tensor) for tensor in file.inputs]
        self.outputs = [_details(tensor) for tensor in file.outputs]
        self.batch_size = int(self.inputs[0]["shape"][0])
        threads = threads or os.cpu_count()
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [require_python(), "-I", SCRIPT, self.path, str(threads), kernels],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        weakref.finalize(self, _end, self._process)
        self._receive()

    def timings(self, *inputs: np.ndarray, runs: int = 50) -> np.ndarray:
        """As `Runner.timings`, measured inside the process."""
        batch = [self._filled(x[: self.batch_size]) for x in inputs]
        self._send(batch, runs=runs + min(runs, WARM_UP))
        return self._receive()["seconds"][-runs:]

    def _invoke(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        self._send(batch, runs=1)
        answer = self._receive()
        return [answer[f"output{i}"] for i in range(len(self.outputs))]

    def _send(self, batch: list[np.ndarray], *, runs: int) -> None:
        encoded = [self._encoded(detail, x) for detail, x in zip(self.inputs, batch, strict=True)]
        content = io.BytesIO()
        np.savez(content, runs=runs, **{f"input{i}": x for i, x in enumerate(encoded)})
        self._process.stdin.write(struct.pack("<q", len(content.getvalue())) + content.getvalue())
        self._process.stdin.flush()

    def _receive(self) -> dict[str, np.ndarray]:
        header = self._process.stdout.read(8)
        if len(header) < 8:
            code = self._process.wait()
            raise FileError(f"{self.path}: Larq's interpreter ended with exit code {code}")
        (length,) = struct.unpack("<q", header)
        with np.load(io.BytesIO(self._process.stdout.read(length))) as arrays:
            answer = dict(arrays)
        if "error" in answer:
            self._log.seek(0)
            # TensorFlow Lite writes the cause, the exception only says where it was noticed.
            causes = [line for line in self._log.read().decode().splitlines() if "ERROR" in line]
            reason = " ".join((causes or [str(answer["error"])])[0].split())[:300]
            raise FileError(f"{self.path}: Larq's interpreter refuses it: {reason}")
        return answer


def _details(tensor: FileTensor) -> dict:
    """What LiteRT's interpreter says of an input or output."""
    scale, zero_point = (*tensor.scale, 0.0)[0], (*tensor.zero_point, 0)[0]
    return {
        "name": tensor.name,
        "shape": np.asarray(tensor.shape),
        "dtype": np.dtype(tensor.dtype).type,
        "quantization": (float(scale), int(zero_point)),
    }


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()  # the script ends when there is nothing more to read
    process.wait()
    process.stdout.close()
