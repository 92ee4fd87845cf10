"""Running a .tflite file on batches of images through the LiteRT interpreter."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qat.tflite_file import FileError, read_bytes
from qat.verify import trial

KERNELS = {
    "default": OpResolverType.AUTO,
    "optimized": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "reference": OpResolverType.BUILTIN_REF,
}
TRIAL_SECONDS = 30
WARM_UP = 5  # invocations before the clock counts


@dataclasses.dataclass(frozen=True)
class Codes:
    """One output of the file for a batch: `real = (codes - zero_point) * scale`.

    Attributes:
        codes: as the file gives them, (examples, …); float32 files give reals, scale 1.
        scale, zero_point: of the output tensor, or 1 and 0.
    """

    codes: np.ndarray
    scale: float
    zero_point: int

    @property
    def values(self) -> np.ndarray:
        """Reals, float32."""
        return ((self.codes.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


class Runner:
    """A loaded file.

    Args:
        path: of the .tflite file.
        kernels: "default" (XNNPACK), "optimized" or "reference".
        threads: None = all cores.

    Raises:
        FileError: missing, truncated, damaged, foreign, with operators that the kernels lack, or
            one that the interpreter does not survive.
    """

    def __init__(
        self, path: str | os.PathLike, *, kernels: str = "default", threads: int | None = None
    ):
        self.path, self.kernels = os.fspath(path), kernels
        content = read_bytes(self.path)
        objection = _objection(content, KERNELS[kernels].name)
        if objection:
            raise FileError(f"{self.path}: the interpreter {objection}")
        self._interpreter = Interpreter(
            model_content=content,
            experimental_op_resolver_type=KERNELS[kernels],
            num_threads=threads or os.cpu_count(),
        )
        self._interpreter.allocate_tensors()
        self.inputs = self._interpreter.get_input_details()
        self.outputs = self._interpreter.get_output_details()
        sizes = {tuple(map(int, detail["shape"][:1])) for detail in self.inputs}
        if len(sizes) != 1 or sizes <= {(), (0,)}:
            raise FileError(
                f"{self.path}: its inputs do not begin with one and the same number of examples"
            )
        ((self.batch_size,),) = sizes

    def run(self, *inputs: np.ndarray) -> list[Codes]:
        """All outputs for float32 inputs of any number of examples, in the file's batches.

        Inputs of 8-bit files are quantized with the scale that the file states; the last batch is
        filled up by repeating its last example.

        Raises:
            FileError: the data does not fit, or what comes out is not one finite array an example.
        """
        if len(inputs) != len(self.inputs):
            raise FileError(f"{self.path}: has {len(self.inputs)} inputs, the data {len(inputs)}")
        examples, batches = len(inputs[0]), []
        for start in range(0, examples, self.batch_size):
            batch = [x[start : start + self.batch_size] for x in inputs]
            batches.append(self._invoke([self._filled(x) for x in batch]))
        return [
            Codes(np.concatenate(parts)[:examples], *_quantization(detail))
            for parts, detail in zip(zip(*batches, strict=True), self.outputs, strict=True)
        ]

    def latency(self, *inputs: np.ndarray, runs: int = 50) -> float:
        """Median seconds of one invocation, after warming up."""
        return float(np.median(self.timings(*inputs, runs=runs)))

    def timings(self, *inputs: np.ndarray, runs: int = 50) -> np.ndarray:
        """Seconds of each of so many invocations, after warming up: 5 more, or `runs` if less."""
        batch = [self._filled(x[: self.batch_size]) for x in inputs]
        seconds = []
        for _ in range(runs + min(runs, WARM_UP)):
            start = time.perf_counter()
            self._invoke(batch)
            seconds.append(time.perf_counter() - start)
        return np.asarray(seconds[-runs:])

    def _filled(self, x: np.ndarray) -> np.ndarray:
        missing = self.batch_size - len(x)
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    def _invoke(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        encoded = [self._encoded(detail, x) for detail, x in zip(self.inputs, batch, strict=True)]
        try:
            for detail, x in zip(self.inputs, encoded, strict=True):
                self._interpreter.set_tensor(detail["index"], x)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FileError(f"{self.path}: the interpreter fails on the data: {reason}") from error
        return [self._output(detail) for detail in self.outputs]

    def _output(self, detail: dict) -> np.ndarray:
        x = self._interpreter.get_tensor(detail["index"]).copy()
        if x.shape[:1] != (self.batch_size,):
            raise FileError(
                f"{self.path}: output {detail['name']!r} of shape {x.shape} does not hold one "
                f"result for each of {self.batch_size} examples"
            )
        if np.issubdtype(x.dtype, np.inexact) and not np.isfinite(x).all():
            raise FileError(f"{self.path}: output {detail['name']!r} holds NaN or infinity")
        return x

    def _encoded(self, detail: dict, x: np.ndarray) -> np.ndarray:
        expected = tuple(map(int, detail["shape"]))
        if x.shape != expected:
            raise FileError(
                f"{self.path}: input {detail['name']!r} has shape {expected}, the data {x.shape}"
            )
        return encoded(x, detail["dtype"], *_quantization(detail))


def encoded(x: np.ndarray, dtype: np.typing.DTypeLike, scale: float, zero_point: int) -> np.ndarray:
    """Reals as an input of this type takes them: `round(x / scale) + zero_point`, saturated, for
    integers."""
    if not np.issubdtype(dtype, np.integer):
        return x.astype(dtype)
    limits = np.iinfo(dtype)
    codes = np.rint(x.astype(np.float64) / scale) + zero_point
    return np.clip(codes, limits.min, limits.max).astype(dtype)


def _quantization(detail: dict) -> tuple[float, int]:
    if not np.issubdtype(detail["dtype"], np.integer) or not detail["quantization"][0]:
        return 1.0, 0
    scale, zero_point = detail["quantization"]
    return float(scale), int(zero_point)


@functools.lru_cache(maxsize=4)  # several runners of one file try it once
def _objection(content: bytes, resolver: str) -> str | None:
    """What LiteRT has against a file, found in another process: it may crash or never end."""
    try:
        process = subprocess.run(
            [sys.executable, "-P", trial.__file__, resolver],
            input=content,
            capture_output=True,
            timeout=TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"does not finish a first run in {TRIAL_SECONDS} seconds"
    if process.returncode < 0:
        return f"crashes on it ({signal.Signals(-process.returncode).name})"
    if process.returncode == trial.REFUSED:
        reason = " ".join(process.stdout.decode(errors="replace").split())
        return f"refuses it, given {trial.MEMORY_GIB} GiB of memory: {reason[:300]}"
    process.check_returncode()
    return None
