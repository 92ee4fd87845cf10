"""Runs a .tflite file in tflite-micro; a script of its own, because a bad file ends the process.

`python -P micro_interpreter.py FOLDER`: FOLDER holds model.tflite and request.npz (see `main`) and
receives answer.npz. It imports nothing of qat, and so starts without TensorFlow.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
from tflite_micro import runtime

_ALIGNMENT = 16  # of everything in an arena


def main(folder: pathlib.Path) -> None:
    """Answers a request.

    Request: `roomy` is an arena size that is surely enough, `tensors` the indices of those
    to record, `input_000`, … the examples. Answer: `arena`, the least arena size, and for each
    index `tensor_<index>`, all examples stacked.
    """
    model = (folder / "model.tflite").read_bytes()
    request = np.load(folder / "request.npz")
    roomy = int(request["roomy"])
    inputs = [request[name] for name in sorted(request) if name.startswith("input_")]
    recorded = record(model, inputs, request["tensors"].tolist(), roomy)
    arena = least_arena(model, roomy)
    named = {f"tensor_{index}": values for index, values in recorded.items()}
    np.savez(folder / "answer.npz", arena=arena, **named)


def record(
    model: bytes, inputs: list[np.ndarray], tensors: list[int], arena: int
) -> dict[int, np.ndarray]:
    """The tensors' values for every example of the inputs."""
    interpreter = runtime.Interpreter.from_bytes(
        model,
        arena_size=arena,
        intrepreter_config=runtime.InterpreterConfig.kPreserveAllTensors,
    )
    found: dict[int, list[np.ndarray]] = {index: [] for index in tensors}
    for example in zip(*inputs, strict=True):
        for number, values in enumerate(example):
            interpreter.set_input(values, number)
        interpreter.invoke()
        for index, values in found.items():
            values.append(interpreter.GetTensor(index, 0)["tensor_data"].copy())
    return {index: np.stack(values) for index, values in found.items()}


def least_arena(model: bytes, enough: int) -> int:
    """The smallest multiple of 16 bytes in which the model can be set up.

    Halved first: a few hundred bytes, too few for the interpreter itself, crash the process.
    """
    enough = -(-enough // _ALIGNMENT)
    while fits(model, enough // 2):
        enough //= 2
    refused = enough // 2
    while enough - refused > 1:
        middle = (enough + refused) // 2
        if fits(model, middle):
            enough = middle
        else:
            refused = middle
    return enough * _ALIGNMENT


def fits(model: bytes, blocks: int) -> bool:
    try:
        runtime.Interpreter.from_bytes(model, arena_size=blocks * _ALIGNMENT)
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
