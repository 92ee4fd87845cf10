"""Custom objects from the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from qat.errors import UserError


def parse_custom_objects(names: Iterable[str]) -> dict[str, Any]:
    """{NAME: object} of "module:NAME" strings; modules in the working folder are found too.

    Raises:
        UserError: another form, a module that cannot be imported, a name that it lacks.
    """
    found = {}
    for each in names:
        module, _, name = each.partition(":")
        if not (module and name):
            raise UserError(f"--custom_objects: need module:NAME, got {each!r}")
        try:
            imported = _imported(module)
        except Exception as error:  # whatever the user's code does
            raise UserError(
                f"--custom_objects: {module} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(imported, name):
            raise UserError(f"--custom_objects: {module} has no {name!r}")
        found[name] = getattr(imported, name)
    return found


def _imported(module: str) -> Any:
    """A program's own folder is on the path, that of the user who calls it need not be."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
