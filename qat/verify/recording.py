"""The codes that a file's kernels compute, intermediate tensors included."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
from ai_edge_litert.tools import flatbuffer_utils

from qat.tflite_file import FileError, FileModel, FileTensor, read_bytes
from qat.verify.integer import Simulator
from qat.verify.interpreter import Runner, encoded

_RECORDED = ("int8", "int16", "uint8", "bool")


def recordable(file: FileModel) -> list[FileTensor]:
    """What operators write in integers, an example in each row; unpacked kernels left out.

    Raises:
        FileError: several tensors of the file have the same name, or one has a zero byte in it,
            where interpreters cut it off.
    """
    if len({tensor.name for tensor in file.tensors}) < len(file.tensors):
        raise FileError("several tensors of the file have the same name")
    cut = next((tensor.name for tensor in file.tensors if "\0" in tensor.name), None)
    if cut is not None:
        raise FileError(f"the tensor's name {cut!r} has a zero byte in it")
    unpacked = file.unpacked_constants()
    batch = file.inputs[0].shape[:1] if file.inputs else ()
    return [
        tensor
        for op in file.operators
        for tensor in op.outputs
        if tensor.dtype in _RECORDED
        and tensor.name not in unpacked
        and tensor.shape[:1] == batch != ()
    ]


def record(
    runner: Runner, tensors: Sequence[FileTensor], inputs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """{name: codes (examples, …)} of tensors of the runner's file, by the runner's kernels.

    XNNPACK leaves no intermediate tensor behind, and `experimental_preserve_all_tensors` may make
    other kernels run. So a copy of the file runs that has the tensors as more outputs; what the
    file itself puts out must stay the same.

    Args:
        inputs: float32, as `Runner.run` takes them.

    Raises:
        FileError: the kernels refuse the file, or give other outputs once tensors are recorded.
    """
    content = _with_outputs(read_bytes(runner.path), [tensor.name for tensor in tensors])
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "recorded.tflite")
        copy.write_bytes(content)
        try:
            recorder = type(runner)(copy, kernels=runner.kernels)
            results = recorder.run(*inputs)
        except FileError as error:
            raise FileError(str(error).replace(str(copy), runner.path)) from error
    for one, other in zip(runner.run(*inputs), results, strict=False):
        if not np.array_equal(one.codes, other.codes):
            raise FileError(f"{runner.path}: its outputs change when its tensors are recorded")
    names = [detail["name"] for detail in recorder.outputs]
    found = {name: result.codes for name, result in zip(names, results, strict=True)}
    return _of_stated_shapes(tensors, found)


def simulate(
    path: str | os.PathLike,
    tensors: Sequence[FileTensor],
    inputs: Sequence[np.ndarray],
    given: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """As `record`, by the integer simulator, whose codes are those of the reference kernels.

    Args:
        given: codes that operators read in the place of those that others have written, so that
            each one's result is its own.

    Raises:
        SimulationError: an operator that the simulator does not know.
    """
    simulator = Simulator(path)
    codes = [
        encoded(x, tensor.dtype, float((*tensor.scales, 1)[0]), tensor.zero_point)
        for x, tensor in zip(inputs, simulator.inputs, strict=True)
    ]
    return _of_stated_shapes(tensors, simulator.tensors(*codes, given=given))


def _of_stated_shapes(
    tensors: Sequence[FileTensor], found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    for tensor in tensors:
        if found[tensor.name].shape[1:] != tensor.shape[1:]:
            raise FileError(f"{tensor.name!r} has another shape than the file states")
    return {tensor.name: found[tensor.name] for tensor in tensors}


def _with_outputs(content: bytes, names: list[str]) -> bytes:
    """The file with tensors of these names as outputs, behind those that it has."""
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    graph = model.subgraphs[0]
    index = {tensor.name.decode(): i for i, tensor in enumerate(graph.tensors)}
    outputs = [*graph.outputs, *(index[name] for name in names)]
    graph.outputs = list(dict.fromkeys(int(i) for i in outputs))
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
