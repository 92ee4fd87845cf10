"""tflite-micro's answer to a file: does it run there, bit for bit, and in how much memory."""

from __future__ import annotations

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
_INSTRUCTION = re.compile(r"Node (\w+) \(number (\d+)\) failed")
# What to do about operators that were found to fail; all others get _ELSE.
_ADVICE = {
    "RELU6": "put the ReLU6 right behind a convolution, dense or Add layer, where it fuses",
    "REDUCE_MAX": "give the layer's input 8-bit activations, or use MaxPooling2D over the image",
}
_ELSE = "replace the layer, or export with --target=litert"


def micro_check(content: bytes) -> int:
    """Runs a file in tflite-micro and in LiteRT's reference kernels on random inputs.

    Every tensor that an operator writes must be equal, to the last bit.

    Args:
        content: of the .tflite file.

    Returns:
        Bytes of the smallest arena in which tflite-micro sets the file up, a multiple of 16.

    Raises:
        ExportError: tflite-micro is not installed, refuses the file, or computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = _stored(pathlib.Path(folder), content)
        inputs = _random_inputs(file)
        written = [tensor for operator in file.operators for tensor in operator.outputs]
        index = {id(tensor): i for i, tensor in enumerate(file.tensors)}
        answer = _ask(pathlib.Path(folder), file, inputs, [index[id(t)] for t in written])
    expected = _reference(content, inputs, [index[id(tensor)] for tensor in written])
    for operator in file.operators:
        for tensor in operator.outputs:
            number = index[id(tensor)]
            actual = answer[f"tensor_{number}"].reshape(expected[number].shape)
            _require_equal(operator, tensor, actual, expected[number])
    return int(answer["arena"])


def arena_bytes(path: str | os.PathLike) -> int:
    """Bytes of the smallest arena in which tflite-micro sets a file up, a multiple of 16.

    Of the package's reference kernels on this machine: smaller pointers need less, kernels made
    for a processor may ask for more.

    Raises:
        ExportError: tflite-micro is not installed, or refuses the file.
        FileError: the file cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = _stored(pathlib.Path(folder), read_bytes(os.fspath(path)))
        return int(_ask(pathlib.Path(folder), file, [], [])["arena"])


def _stored(folder: pathlib.Path, content: bytes) -> FileModel:
    (folder / "model.tflite").write_bytes(content)
    return read_file(folder / "model.tflite")


def _ask(
    folder: pathlib.Path, file: FileModel, inputs: list[np.ndarray], tensors: list[int]
) -> dict[str, np.ndarray]:
    """What the script answers; its file is in the folder."""
    if importlib.util.find_spec("tflite_micro") is None:
        raise ExportError(
            "--target=tflm runs the file in tflite-micro, which is not installed; "
            'run: python -m pip install -e ".[micro]"'
        )
    elements = sum(int(np.prod(tensor.shape)) for tensor in file.tensors)
    examples = {f"input_{number:03d}": values for number, values in enumerate(inputs)}
    # Eight bytes for each element, unpacked kernels included, twice, and what the nodes take.
    roomy = 16 * elements + 4096 * len(file.tensors) + (1 << 16)
    np.savez(folder / "request.npz", roomy=roomy, tensors=np.asarray(tensors, int), **examples)
    command = [sys.executable, "-P", str(_SCRIPT), str(folder)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"tflite-micro ran the file for more than {_TIMEOUT_SECONDS} s; use a smaller model, "
            "or --target=litert"
        ) from error
    if process.returncode:
        raise ExportError(_refusal(process, file))
    with np.load(folder / "answer.npz") as answer:
        return dict(answer)


def _refusal(process: subprocess.CompletedProcess, file: FileModel) -> str:
    """One line about a script that failed: the operator, its output, the reason, what to do."""
    lines = [line.strip() for line in process.stderr.partition("Traceback")[0].splitlines()]
    lines = [line for line in lines if line]
    found = _INSTRUCTION.search(process.stderr)
    if found is not None:
        operator = file.operators[int(found[2])]
        reasons = " ".join(line for line in lines if not _INSTRUCTION.search(line))[-200:]
        return f"tflite-micro refuses {_named(operator)}: {reasons}; {_advice(operator)}"
    if process.returncode < 0:
        return (
            f"tflite-micro crashed on the file (signal {-process.returncode}), this is a bug in "
            f"qat or tflite-micro; {_ELSE}"
        )
    reason = " ".join(lines[-3:] or process.stderr.strip().splitlines()[-1:])
    return f"tflite-micro refuses the file: {reason}; {_ELSE}"


def _require_equal(
    operator: FileOperator, tensor: FileTensor, actual: np.ndarray, expected: np.ndarray
) -> None:
    different = int((actual != expected).sum())
    if different:
        raise ExportError(
            f"tflite-micro computes other values than LiteRT's reference kernels in "
            f"{_named(operator)} ({different} of {expected.size}); {_advice(operator)}"
        )


def _named(operator: FileOperator) -> str:
    return f"{operator.name} of layer {operator.outputs[0].name!r} ({operator.outputs[0].dtype})"


def _advice(operator: FileOperator) -> str:
    return _ADVICE.get(operator.name, _ELSE)


def _random_inputs(file: FileModel) -> list[np.ndarray]:
    """Codes of the whole range, or the reals that they stand for; (examples, 1, …) each."""
    rng = np.random.default_rng(0)
    return [_random_input(file, tensor, rng) for tensor in file.inputs]


def _random_input(file: FileModel, tensor: FileTensor, rng: np.random.Generator) -> np.ndarray:
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
