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
            found[name] = getattr(_imported(module), name)
        except ImportError as error:
            raise UserError(f"--custom_objects: {module} cannot be imported: {error}") from error
        except AttributeError as error:
            raise UserError(f"--custom_objects: {module} has no {name!r}") from error
    return found


def _imported(module: str) -> Any:
    """A program's own folder is on the path, that of the user who calls it need not be."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
