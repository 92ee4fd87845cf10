"""How long one invocation of a file takes."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from qat.verify.larq import open_runner

_MOST_RUNS, _LEAST_RUNS, _SECONDS = 50, 3, 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of an invocation, which takes the file's batch.

    Attributes:
        threads: of the interpreter.
        runs: how many were measured, after warming up.
        median_seconds, quartile_seconds: half of the runs lie between the quartiles.
        batch_size: examples in an invocation.
    """

    threads: int
    runs: int
    median_seconds: float
    quartile_seconds: list[float]
    batch_size: int


def latencies(path: str | os.PathLike) -> list[Latency]:
    """With one thread, then with one for each core; on default kernels (`open_runner`) and
    inputs of zeros.

    50 runs, less of a file that takes more than 40 ms: 2 seconds' worth, 3 at least.

    Raises:
        FileError, UserError: as `open_runner`.
    """
    return [_latency(path, threads) for threads in sorted({1, os.cpu_count() or 1})]


def _latency(path: str | os.PathLike, threads: int) -> Latency:
    runner = open_runner(path, threads=threads)
    inputs = [np.zeros(detail["shape"], np.float32) for detail in runner.inputs]
    first = float(runner.timings(*inputs, runs=1)[0])
    runs = int(np.clip(_SECONDS / first, _LEAST_RUNS, _MOST_RUNS))
    lower, median, upper = np.quantile(runner.timings(*inputs, runs=runs), (0.25, 0.5, 0.75))
    return Latency(
        threads=threads,
        runs=runs,
        median_seconds=float(median),
        quartile_seconds=[float(lower), float(upper)],
        batch_size=runner.batch_size,
    )
