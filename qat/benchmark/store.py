"""The folder of a benchmark: finished runs, float checkpoints, and who is at work on what.

    OUTPUT_DIR/terms.json                   what all its runs share
    OUTPUT_DIR/seed0/float_model.keras      the checkpoint that all runs of this seed start from
    OUTPUT_DIR/seed0/test/w4a4+3.json       a finished run: 3 epochs, measured on test

Several processes may work in one folder: each run and each checkpoint has a lock, which the
operating system gives back when its owner dies.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qat.benchmark.plan import Run, Terms
from qat.errors import UserError
from qat.files import write_whole
from qat.output import output_folder
from qat.report import to_json


class Store:
    """The folder as runs under these terms, measured on this split, see it; not made yet.

    Raises:
        UserError: the folder holds runs under other terms.
    """

    def __init__(self, folder: pathlib.Path, terms: Terms, split: str):
        self.folder, self.split = folder, split
        self.terms = dataclasses.asdict(terms)
        self._require_terms()

    def make(self) -> None:
        """Makes the folder, if it is not there.

        Raises:
            UserError: it cannot be made or written, or another process made it for other terms.
        """
        with output_folder(self.folder):
            if not self._terms_file.exists():
                write_whole(self._terms_file, to_json(self.terms))
            self._require_terms()

    @property
    def _terms_file(self) -> pathlib.Path:
        return self.folder / "terms.json"

    def _require_terms(self) -> None:
        if not self._terms_file.is_file():
            return
        found = _read(self._terms_file)
        for key, value in self.terms.items():
            if found.get(key) != value:
                raise UserError(
                    f"--output_dir={self.folder} holds runs with --{key}={found.get(key)}, not "
                    f"{value}: they cannot be compared; use another folder"
                )

    def float_model(self, seed: int) -> pathlib.Path:
        """The path of the seed's float checkpoint."""
        return self.folder / f"seed{seed}" / "float_model.keras"

    def path(self, run: Run) -> pathlib.Path:
        """The path of a run's result."""
        name = f"{_file_name(run.method)}+{run.epochs}.json"
        return self.folder / f"seed{run.seed}" / self.split / name

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a finished run found; None if it is not finished, or failed."""
        path = self.path(run)
        found = _read(path) if path.exists() else None
        return None if found is None or found["error"] else found

    def write(self, run: Run, result: dict[str, Any]) -> None:
        """Keeps the result of a run, in place of an earlier one."""
        write_whole(self.path(run), to_json(result))

    def finish(self, run: Run, attempt: Callable[[Run], dict[str, Any]]) -> bool:
        """Sees to it that the run is finished; False if another process is at it."""
        with self.claimed(self.path(run), wait=False) as mine:
            if mine and self.result(run) is None:
                self.write(run, attempt(run))
            return mine

    def results(self) -> list[dict[str, Any]]:
        """All results in the folder that are of this split, failed ones too, seed by seed."""
        seeds = sorted(self.folder.glob("seed*"), key=lambda path: (len(path.name), path.name))
        return [
            _read(path) for seed in seeds for path in sorted((seed / self.split).glob("*.json"))
        ]

    @contextmanager
    def claimed(self, path: pathlib.Path, *, wait: bool) -> Iterator[bool]:
        """Keeps other processes from making the file `path`; False if one of them is making it.

        Args:
            wait: until the other process is done; then always True.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # The lock's file stays: another process may hold it open, and would lock a dead one.
            yield True


def _file_name(method: str) -> str:
    """The method's name with a digest for what a file's name should not hold."""
    plain = re.sub(r"[^\w.=-]+", "_", method)
    if plain == method:
        return plain
    return f"{plain[:80]}-{hashlib.sha256(method.encode()).hexdigest()[:8]}"


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged; delete it: {error}") from error
