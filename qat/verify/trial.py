"""One run of a .tflite file on zeros, in a process of its own that may crash.

LiteRT checks a file's offsets, not whether its graph makes sense: wild shapes, options and indices
that pass make it abort, crash, compute for hours or ask for terabytes. No reader can foresee all of
that, so `python trial.py RESOLVER < FILE` finds out. Nothing of qat is imported here: that would
import TensorFlow, which takes seconds.
"""

from __future__ import annotations

import resource
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

REFUSED = 3  # 1 and 2 are the exit codes of Python's own errors
MEMORY_GIB = 2  # beside twice the file


def run(content: bytes, resolver: str) -> None:
    """Allocates and invokes once, within MEMORY_GIB.

    Args:
        content: of the file. resolver: the name of an `OpResolverType`.

    Raises:
        ValueError, RuntimeError, MemoryError: the interpreter refuses it.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, MEMORY_GIB * 2**30 + 2 * len(content))
    interpreter = Interpreter(
        model_content=content, experimental_op_resolver_type=OpResolverType[resolver]
    )
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        zeros = np.zeros(detail["shape"], detail["dtype"])
        interpreter.set_tensor(detail["index"], zeros)
    interpreter.invoke()
    for detail in interpreter.get_output_details():
        interpreter.get_tensor(detail["index"])


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, hard))


def main() -> None:
    """Exits with REFUSED, and the reason on stdout, if the interpreter raises."""
    content, resolver = sys.stdin.buffer.read(), sys.argv[1]
    try:
        run(content, resolver)
    except Exception as error:  # whatever the bindings make of an absurd file
        print(type(error).__name__, error)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
