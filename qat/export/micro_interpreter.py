"""Runs a .tflite file in tflite-micro; a script of its own, because a bad file ends the process.

`python -P micro_interpreter.py FOLDER ARENA`: FOLDER holds model.tflite and request.npz (see
`main`) and receives answer.npz. It imports nothing of qat, and so starts without TensorFlow.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
from tflite_micro import runtime


def main(folder: pathlib.Path, arena: int) -> None:
    """Answers a request, and writes to stderr how much of the arena was used.

    Request: `input_000`, … examples of each input; `tensors`, indices of the tensors to record;
    `outputs`, how many there are. Answer: `tensor_<index>` for each of the tensors, all examples
    stacked; `output_<number>`, what an interpreter in its usual state gives for the first example.
    """
    model = (folder / "model.tflite").read_bytes()
    with np.load(folder / "request.npz") as request:
        inputs = [request[name] for name in sorted(request) if name.startswith("input_")]
        tensors, outputs = request["tensors"].tolist(), int(request["outputs"])
    recorded = record(model, inputs, tensors, arena) if tensors else {}
    answer = {f"tensor_{index}": values for index, values in recorded.items()}
    interpreter = runtime.Interpreter.from_bytes(model, arena_size=arena)
    invoke(interpreter, [values[0] for values in inputs])
    answer |= {f"output_{number}": interpreter.get_output(number) for number in range(outputs)}
    np.savez(folder / "answer.npz", **answer)
    interpreter.print_allocations()


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
        invoke(interpreter, example)
        for index, values in found.items():
            values.append(interpreter.GetTensor(index, 0)["tensor_data"].copy())
    return {index: np.stack(values) for index, values in found.items()}


def invoke(interpreter: runtime.Interpreter, example: list[np.ndarray]) -> None:
    """Runs one example, an array for each input."""
    for number, values in enumerate(example):
        interpreter.set_input(values, number)
    interpreter.invoke()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
