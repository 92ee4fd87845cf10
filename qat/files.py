"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Mapping


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
    write_together({pathlib.Path(path): content}, check)


def write_together(
    contents: Mapping[pathlib.Path, bytes],
    check: Callable[[pathlib.Path], None] = lambda written: None,
) -> None:
    """Writes files of one folder beside their places, and renames them when all are written.

    Args:
        contents: {path: content}; existing files are replaced, the first one last.
        check: is given the first file, see `write_whole`.

    Raises:
        OSError: the folder cannot be written.
    """
    first, *others = contents
    for path in contents:
        if path.is_dir():  # found out by renaming, the others would be there already
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryDirectory(dir=first.parent, prefix=f".{first.name}.") as folder:
        beside = {path: pathlib.Path(folder, path.name) for path in contents}
        for path, content in contents.items():
            _write_through(beside[path], content)
        check(beside[first])
        for path in (*others, first):
            os.replace(beside[path], path)


def _write_through(path: pathlib.Path, content: bytes) -> None:
    """To the disk, so that a name never outlives a machine that its content did not."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: str | os.PathLike) -> str:
    """The hexadecimal SHA-256 of a file, or of the names and contents of a folder's files."""
    path, whole = pathlib.Path(path), hashlib.sha256()
    if path.is_file():
        whole.update(path.read_bytes())
    else:
        for file in sorted(each for each in path.rglob("*") if each.is_file()):
            whole.update(f"{file.relative_to(path)}\0{sha256_of(file)}\0".encode())
    return whole.hexdigest()


def zipped(members: Mapping[str, bytes]) -> bytes:
    """A zip archive of these members, stored as they are: the same bytes at any time of day."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return whole.getvalue()
