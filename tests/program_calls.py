"""Runs many command lines of the programs in one process: TensorFlow's import takes seconds.

`python program_calls.py CALLS RESULTS`: CALLS is a JSON list of [program, argument, ...], each run
in a copy of the current folder; RESULTS receives what a process of its own would have left.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import traceback

from absl import flags


def run(name: str, *arguments: str) -> dict:
    """Exit code, both outputs, and the paths that appeared, changed or went."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(".", pathlib.Path(scratch, "work"))
        with contextlib.chdir(folder):
            before = files()
            with captured(1) as out, captured(2) as err:
                code = exit_code(name, arguments)
            changes = sorted({path for path, _ in before.items() ^ files().items()})
    return {"code": code, "stdout": out[0], "stderr": err[0], "changes": changes}


def exit_code(name: str, arguments: tuple[str, ...]) -> int:
    program = importlib.import_module(f"qat.programs.{name}")
    others, argv = set(flags.FLAGS), sys.argv
    sys.argv = [f"scripts/{name}.py", *arguments]
    try:
        program.run()
    except SystemExit as end:
        return end.code or 0
    except Exception:  # what an uncaught exception does to a process
        traceback.print_exc()
        return 1
    finally:
        sys.argv = argv
        for flag in set(flags.FLAGS) - others:
            delattr(flags.FLAGS, flag)
    return 0


@contextlib.contextmanager
def captured(descriptor: int):
    """The text that Python and C++ write to a file descriptor, as the only item of a list."""
    text, saved = [], os.dup(descriptor)
    stream = {1: sys.stdout, 2: sys.stderr}[descriptor]
    with tempfile.TemporaryFile() as file:
        stream.flush()
        os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            stream.flush()
            os.dup2(saved, descriptor)
            os.close(saved)
            file.seek(0)
            text.append(file.read().decode())


def files() -> dict[str, str]:
    """{path: hash of the content, "folder" for a folder} under the current folder."""
    found = {}
    for path in pathlib.Path().rglob("*"):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path)] = content
    return found


if __name__ == "__main__":
    calls = json.loads(pathlib.Path(sys.argv[1]).read_text())
    with captured(1), captured(2):  # what TensorFlow says when it is imported
        importlib.import_module("qat")
    results = [run(*call) for call in calls]
    pathlib.Path(sys.argv[2]).write_text(json.dumps(results))
