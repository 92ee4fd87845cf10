"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable


def write_whole(
    path: str | os.PathLike,
    content: bytes,
    check: Callable[[pathlib.Path], None] = lambda written: None,
) -> None:
    """Writes beside the file's place, then renames; the umask decides who may read it.

    Args:
        path: in an existing folder; replaced if it exists.
        check: is given the written file before it gets its name; what it raises leaves no file.

    Raises:
        OSError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = pathlib.Path(folder, path.name)
        beside.write_bytes(content)
        check(beside)
        os.replace(beside, path)
