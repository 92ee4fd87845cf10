"""The output folder of a run: what it holds, and that a run that fails early leaves none."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from absl import logging

from qat import figures
from qat.errors import UserError
from qat.files import write_whole

FILES = (
    "float_model.keras",
    "qat_model.keras",
    "model.tflite",
    "model.cc",
    "model.h",
    "recipe.json",
    "run.json",
    "report.json",
    "report.md",
    *figures.NAMES,
)
FOLDERS = ("checkpoints", "tensorboard")


@contextmanager
def output_folder(path: pathlib.Path) -> Iterator[None]:
    """Makes the folder; a run that fails before it has written anything leaves none behind.

    Raises:
        UserError: it cannot be made or written.
    """
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--output_dir={path} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        if not existed and not any(path.iterdir()):
            path.rmdir()


@contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of the folder; the system unlocks it when this one ends or dies.

    Raises:
        UserError: another process is in it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"--output_dir={path} is in use by another process; wait for it, or use another folder"
        ) from error
    except OSError as error:  # some network file systems have no locks for folders
        logging.warning("--output_dir=%s cannot be locked: %s", path, error.strerror)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def run_folder(path: pathlib.Path, *, wanted: bool = True) -> Iterator[None]:
    """`output_folder`, `locked`; nothing on machines that do not write."""
    if not wanted:
        yield
        return
    with output_folder(path), locked(path):
        yield


def require_input_elsewhere(path: pathlib.Path, given: str, flag: str) -> None:
    """Refuses an input that is one of the folder's own files, which a run removes first.

    Raises:
        UserError: it is.
    """
    places = {place.resolve() for place in (pathlib.Path(given), *pathlib.Path(given).parents)}
    if not places.isdisjoint((path / name).resolve() for name in (*FILES, *FOLDERS)):
        raise UserError(
            f"{flag}={given} is a file that a run with --output_dir={path} replaces; take another "
            "folder, or move the file"
        )


def begin(path: pathlib.Path, flags: dict[str, Any], *, resume: bool) -> None:
    """Removes what an earlier run left, or makes sure that it is this run that is resumed.

    What a run was started with is kept in run.json, by which its folder is known.

    Args:
        flags: {name: what JSON can hold}, all that the trained weights depend on.

    Raises:
        UserError: the run that is resumed was started with another flag; without run.json, files
            by the names of a run's.
    """
    file = path / "run.json"
    if not file.exists():
        _require_no_files_of_others(path)
    flags = json.loads(json.dumps(flags))
    if not resume:
        clear(path)
    if resume and file.exists():
        before = json.loads(file.read_text())
        for name, value in flags.items():
            if before.get(name) != value:
                started, asked = (f"{each}"[:60] for each in (before.get(name), value))
                raise UserError(
                    f"--resume: {path} was started with --{name}={started}, not {asked}; use the "
                    "same flags, or another --output_dir"
                )
        return
    write_whole(file, json.dumps(flags).encode())


def _require_no_files_of_others(path: pathlib.Path) -> None:
    # A recipe may lie where its run is to be.
    names = [
        name for name in (*FILES, *FOLDERS) if name != "recipe.json" and (path / name).exists()
    ]
    if names:
        raise UserError(
            f"--output_dir={path} holds {', '.join(names)}, which a run replaces, and no run.json: "
            "they may be no run's; move them away, or use another folder"
        )


def clear(path: pathlib.Path) -> None:
    """Removes what an earlier run left in the folder."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)


def drop_checkpoints(path: pathlib.Path) -> None:
    """Removes the checkpoints of a run that is done."""
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
