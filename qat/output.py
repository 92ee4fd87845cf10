"""The output folder of a run: what it holds, and that a run that fails early leaves none."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from qat import figures
from qat.errors import UserError

FILES = (
    "float_model.keras",
    "qat_model.keras",
    "model.tflite",
    "model.cc",
    "model.h",
    "recipe.json",
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


def clear(path: pathlib.Path) -> None:
    """Removes what an earlier run left in the folder."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)


def drop_checkpoints(path: pathlib.Path) -> None:
    """Removes the checkpoints of a run that is done."""
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
