"""tflite-micro's answer to a file: does it run there, bit for bit, and in how much memory."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qat.export.graph import ExportError
from qat.tflite_file import FileModel, FileOperator, FileTensor, read_bytes, read_file

_SCRIPT = pathlib.Path(__file__).with_name("micro_interpreter.py")
_EXAMPLES = 4
_TIMEOUT_SECONDS = 1800
_ALIGNMENT = 16  # of everything in an arena
_FAILED = re.compile(r"Node (\w+) \(number (\d+)\) failed")
_USED = re.compile(r"Arena allocation total (\d+) bytes")
# What to do about operators that were found to fail.
_ADVICE = {
    "RELU6": "put the ReLU6 right behind a convolution, dense or Add layer, where it fuses",
    "REDUCE_MAX": "give the layer's input 8-bit activations, or use MaxPooling2D over the image",
}


def require_tflite_micro() -> None:
    """Raises ExportError if the package is not installed."""
    if importlib.util.find_spec("tflite_micro") is None:
        raise ExportError(
            "target tflm runs the file in tflite-micro, which is not installed; "
            'run: python -m pip install -e ".[micro]"'
        )


def micro_check(content: bytes) -> int:
    """Runs a file in tflite-micro and in LiteRT's reference kernels on random inputs.

    Every tensor that an operator writes must be equal, to the last bit.

    Args:
        content: of the .tflite file.

    Returns:
        Bytes of arena that the file needs, see `arena_bytes`.

    Raises:
        ExportError: tflite-micro is not installed, refuses the file, or computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(pathlib.Path(folder), content)
        written = [tensor for operator in trial.file.operators for tensor in operator.outputs]
        answer = trial.record(written)
    expected = _reference(content, trial.inputs, [trial.index[id(tensor)] for tensor in written])
    for operator in trial.file.operators:
        for tensor in operator.outputs:
            number = trial.index[id(tensor)]
            _require_equal(operator, answer[f"tensor_{number}"], expected[number])
    return _arena(content)


def arena_bytes(path: str | os.PathLike) -> int:
    """Bytes of arena with which tflite-micro was seen to run a file, a multiple of 16.

    Of the package's reference kernels on this machine: smaller pointers need less, kernels made
    for a processor may ask for more.

    Raises:
        ExportError: tflite-micro is not installed, or refuses the file.
        FileError: the file cannot be read.
    """
    return _arena(read_bytes(os.fspath(path)))


@functools.lru_cache(maxsize=1)  # the export asks, then the report of the same file
def _arena(content: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return _Trial(pathlib.Path(folder), content).arena()


class _Trial:
    """A file in a folder where tflite-micro runs it, each time in a process of its own."""

    def __init__(self, folder: pathlib.Path, content: bytes):
        require_tflite_micro()
        self.folder = folder
        (folder / "model.tflite").write_bytes(content)
        self.file = read_file(folder / "model.tflite")
        self.index = {id(tensor): i for i, tensor in enumerate(self.file.tensors)}
        rng = np.random.default_rng(0)
        self.inputs = [_random_input(self.file, tensor, rng) for tensor in self.file.inputs]

    def record(self, tensors: list[FileTensor]) -> dict[str, np.ndarray]:
        """The tensors' values by `tensor_<index>`, (examples, …)."""
        self._run([self.index[id(tensor)] for tensor in tensors])
        return self._answer()

    def arena(self) -> int:
        """Bytes of the smallest arena that sufficed, to 1 % or 16 bytes.

        Mostly what was used where there was enough; setting up may have taken more in passing.
        """
        enough = _aligned(int(_USED.search(self._run([]))[1]))
        short, expected = enough - _ALIGNMENT, self._answer()
        while not self._fits(enough, expected):
            short, enough = enough, 2 * enough
        while enough - short > max(_ALIGNMENT, enough // 100):
            middle = _aligned((short + enough) // 2)
            if self._fits(middle, expected):
                enough = middle
            else:
                short = middle
        return enough

    def _fits(self, arena: int, expected: dict[str, np.ndarray]) -> bool:
        """Whether the outputs are as expected; too small an arena may also crash the process."""
        if self._process([], arena).returncode:
            return False
        answer = self._answer()
        return all(np.array_equal(answer[name], values) for name, values in expected.items())

    def _roomy(self) -> int:
        """More than enough: every tensor, kernels too, twice as int64, and the nodes."""
        elements = sum(int(np.prod(tensor.shape)) for tensor in self.file.tensors)
        return _aligned(16 * elements + 4096 * len(self.file.tensors) + (1 << 16))

    def _answer(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "answer.npz") as answer:
            return dict(answer)

    def _run(self, tensors: list[int]) -> str:
        """What the script says of an arena that is large enough. Raises ExportError if it fails."""
        process = self._process(tensors, self._roomy())
        if process.returncode:
            raise ExportError(_refusal(process, self.file))
        return process.stderr

    def _process(self, tensors: list[int], arena: int) -> subprocess.CompletedProcess:
        examples = {f"input_{number:03d}": values for number, values in enumerate(self.inputs)}
        counts = {"tensors": np.asarray(tensors, int), "outputs": len(self.file.outputs)}
        np.savez(self.folder / "request.npz", **counts, **examples)
        command = [sys.executable, "-P", str(_SCRIPT), str(self.folder), str(arena)]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"tflite-micro ran the file for more than {_TIMEOUT_SECONDS} s; make the model "
                "smaller, or export it for target litert"
            ) from error


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _refusal(process: subprocess.CompletedProcess, file: FileModel) -> str:
    """One line about a script that failed: the operator, its output, the reason, what to do."""
    said = [line.strip() for line in process.stderr.partition("Traceback")[0].splitlines()]
    found = _FAILED.search(process.stderr)
    reason = " ".join(line for line in said if line and not _FAILED.search(line))[-200:]
    if found is not None:
        operator = file.operators[int(found[2])]
        return f"tflite-micro refuses {_named(operator)}: {reason}; {_advice(operator)}"
    if process.returncode < 0:
        reason = f"it crashed with signal {-process.returncode}"
    reason = reason or " ".join(process.stderr.strip().splitlines()[-1:])
    return f"tflite-micro refuses the file: {reason}; export it for target litert"


def _require_equal(operator: FileOperator, actual: np.ndarray, expected: np.ndarray) -> None:
    different = int((actual.reshape(expected.shape) != expected).sum())
    if different:
        raise ExportError(
            f"tflite-micro computes other values than LiteRT's reference kernels in "
            f"{_named(operator)}, {different} of {expected.size}; {_advice(operator)}"
        )


def _named(operator: FileOperator) -> str:
    """The operator's name and, in its output's, the layer's."""
    output = operator.outputs[0]
    return f"{operator.name} of {output.name!r} ({output.dtype})"


def _advice(operator: FileOperator) -> str:
    if operator.name in _ADVICE:
        return _ADVICE[operator.name]
    if operator.outputs[0].dtype == "int16":
        return "give this layer 8-bit activations, or export for target litert"
    return "replace this layer, or export for target litert"


def _random_input(file: FileModel, tensor: FileTensor, rng: np.random.Generator) -> np.ndarray:
    """Codes of the whole range, or the reals that they stand for; (examples, 1, …)."""
    shape = (_EXAMPLES, *tensor.shape)
    if tensor.dtype != "float32":
        limits = np.iinfo(tensor.dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(tensor.dtype)
    for operator in file.operators:
        if operator.name == "QUANTIZE" and operator.inputs[0] is tensor:
            (output,) = operator.outputs
            limits = np.iinfo(output.dtype)
            codes = rng.uniform(limits.min, limits.max, shape) - output.zero_point[0]
            return (codes * output.scale[0]).astype(np.float32)
    return rng.normal(0, 1, shape).astype(np.float32)


def _reference(
    content: bytes, inputs: list[np.ndarray], tensors: list[int]
) -> dict[int, np.ndarray]:
    """The tensors' values for every example, by LiteRT's reference kernels."""
    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
        num_threads=1,
    )
    interpreter.allocate_tensors()
    found: dict[int, list[np.ndarray]] = {index: [] for index in tensors}
    for example in zip(*inputs, strict=True):
        for detail, values in zip(interpreter.get_input_details(), example, strict=True):
            interpreter.set_tensor(detail["index"], values)
        interpreter.invoke()
        for index, values in found.items():
            values.append(interpreter.get_tensor(index).copy())
    return {index: np.stack(values) for index, values in found.items()}
