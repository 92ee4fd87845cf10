"""TFDS builders by name: found, and on first use prepared, else a DataError of one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Iterator

import requests
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import downloader

import qat.digits  # noqa: F401 - registers the dataset "digits"
from qat.errors import QatError


class DataError(QatError):
    """A dataset that cannot be had, read or used as image classification, and what to do."""


def find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """TFDS's builder of the dataset, whose files may not be there yet; raises DataError."""
    place = data_dir or tfds.core.constants.DATA_DIR
    try:
        with _quiet_tfds():
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.partition("/")[0], known, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise DataError(
            f"TFDS knows no dataset {name!r}, and {place} holds none; {hint}All names: "
            "https://www.tensorflow.org/datasets/catalog/overview ('digits' needs no network)"
        ) from error
    except Exception as error:  # bad names, configs and versions, missing packages, damaged files
        reason = str(error).rpartition('}": ')[2]  # less the call that TFDS repeats in front
        raise DataError(
            f"dataset {name!r} cannot be opened in {place}: {one_line(reason)}"
        ) from error


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the dataset's files are there."""
    return builder.data_path.exists() and builder.is_prepared()


def prepare(
    name: str, builder: tfds.core.DatasetBuilder, data_dir: str | None
) -> tfds.core.DatasetBuilder:
    """Downloads and prepares the dataset; raises DataError."""
    logging.info("Preparing dataset %s in %s", name, builder.data_path)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    reason, cause = f"{builder.data_path} is incomplete, delete it", None
    try:
        with _quiet_tfds():
            builder.download_and_prepare(download_config=config)
    except requests.ConnectionError as error:
        url = error.request.url if error.request else "the network"
        reason, cause = f"no connection to {url}", error
    except Exception as error:  # downloads, generators and file systems raise almost anything
        reason, cause = f"{type(error).__name__}: {error}", error
    # Asked anew, because another process may have been first: TFDS renames a finished folder into
    # place, and whoever comes second fails with the data there.
    builder = find_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    raise DataError(
        f"dataset {name!r} could not be prepared ({one_line(reason)}); pass a writable --data_dir,"
        f" or one that holds it already (`tfds build {name} --data_dir=DIR` makes it where there is"
        " a network); 'digits' needs no network"
    ) from cause


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """No prints of TFDS on stdout, bars on a terminal only, and an early end without a network.

    Ten retries with growing pauses, TFDS's own number, take over three minutes to fail.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, 2
    urllib3 = logging.logging.getLogger("urllib3.connectionpool")
    level = urllib3.level
    urllib3.setLevel("ERROR")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        urllib3.setLevel(level)
        downloader.MAX_RETRIES = retries


def one_line(reason: object, limit: int = 200) -> str:
    """The reason without line breaks, cut off after so many characters."""
    line = " ".join(str(reason).split())
    return line if len(line) <= limit else f"{line[:limit]}..."
