"""Running a .tflite file on batches of images through the LiteRT interpreter."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qat.tflite_file import FileError, read_bytes

KERNELS = {
    "default": OpResolverType.AUTO,
    "optimized": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "reference": OpResolverType.BUILTIN_REF,
}


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
        FileError: missing, truncated, foreign, or with operators that the kernels lack.
    """

    def __init__(
        self, path: str | os.PathLike, *, kernels: str = "default", threads: int | None = None
    ):
        self.path = os.fspath(path)
        content = read_bytes(self.path)
        try:
            self._interpreter = Interpreter(
                model_content=content,
                experimental_op_resolver_type=KERNELS[kernels],
                num_threads=threads or os.cpu_count(),
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise FileError(f"{self.path}: the interpreter refuses it: {reason}") from error
        self.inputs = self._interpreter.get_input_details()
        self.outputs = self._interpreter.get_output_details()
        self.batch_size = int(self.inputs[0]["shape"][0])

    def run(self, *inputs: np.ndarray) -> list[Codes]:
        """All outputs for float32 inputs of any number of examples, in the file's batches.

        Inputs of 8-bit files are quantized with the scale that the file states; the last batch is
        filled up by repeating its last example.
        """
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
        batch = [self._filled(x[: self.batch_size]) for x in inputs]
        seconds = []
        for _ in range(runs + 5):
            start = time.perf_counter()
            self._invoke(batch)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[5:]))

    def _filled(self, x: np.ndarray) -> np.ndarray:
        missing = self.batch_size - len(x)
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    def _invoke(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        for detail, x in zip(self.inputs, batch, strict=True):
            self._interpreter.set_tensor(detail["index"], self._encoded(detail, x))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(detail["index"]).copy() for detail in self.outputs]

    def _encoded(self, detail: dict, x: np.ndarray) -> np.ndarray:
        expected = tuple(map(int, detail["shape"]))
        if x.shape != expected:
            raise FileError(
                f"{self.path}: input {detail['name']!r} has shape {expected}, the data {x.shape}"
            )
        if not np.issubdtype(detail["dtype"], np.integer):
            return x.astype(detail["dtype"])
        scale, zero_point = _quantization(detail)
        limits = np.iinfo(detail["dtype"])
        codes = np.rint(x.astype(np.float64) / scale) + zero_point
        return np.clip(codes, limits.min, limits.max).astype(detail["dtype"])


def _quantization(detail: dict) -> tuple[float, int]:
    if not np.issubdtype(detail["dtype"], np.integer) or not detail["quantization"][0]:
        return 1.0, 0
    scale, zero_point = detail["quantization"]
    return float(scale), int(zero_point)
