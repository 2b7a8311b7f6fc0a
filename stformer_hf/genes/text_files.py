"""Read text files unchanged: gzip is detected by content, names are never converted, and errors name the file."""

from __future__ import annotations

import csv
import errno
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import pandas as pd

_UNCHANGED = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}  # for `read_csv`
_OF_THE_SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE}  # errors that no file causes


@contextmanager
def naming(path: str | Path, wanted: str = "") -> Iterator[None]:
    """Make every error in reading a file name the file, and its expected contents, such as `a table`.

    A ValueError replaces any error that does not name the file, such as a missing key or bytes that are not text, but
    not errors of memory, missing packages or the network.
    """
    try:
        yield
    except (MemoryError, ImportError, ConnectionError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_SYSTEM):
            raise
        kind, what = type(error), f" as {wanted}" if wanted else ""
        if kind in (ValueError, FileNotFoundError, PermissionError) and Path(path).name in str(error):
            raise
        if kind is ValueError:
            raise ValueError(f"{path}{' cannot be read' * bool(wanted)}{what}: {error}") from error
        raise ValueError(
            f"{path} cannot be read{what}: {kind.__name__}: {str(error).rstrip('.')}. It is damaged, or its name has "
            "the wrong suffix: copy or download it again, or rewrite it."
        ) from error


def existing_file(path: str | Path) -> Path:
    """Return the path of an existing file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def open_text(path: str | Path) -> BufferedIOBase:
    """Open a file that may be compressed with gzip, regardless of its name."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else open(path, "rb")


def suffix_of(path: Path) -> str:
    """Return the suffix of a file without compression, such as `.csv` for `a.csv.gz`."""
    return Path(path.stem if path.suffix == ".gz" else path).suffix.lower()


def read_text_table(path: str | Path, header: bool = True) -> pd.DataFrame:
    """Read a csv or tsv file; all values stay unchanged strings, since `nan` is a gene of the fruit fly.

    Fields are separated by tabs if the first line has one, else by commas, else by semicolons; missing fields at the
    end of a line are empty. Without `header`, the first line is a row, and the columns are numbered.
    """
    with open_text(path) as file:
        first = file.readline()
    separator = next((mark for mark in "\t,;" if mark.encode() in first), ",")
    with open_text(path) as file:
        return pd.read_csv(file, sep=separator, header=0 if header else None, **_UNCHANGED)


def read_columns(path: str | Path, n: int = 1) -> pd.DataFrame:
    """Read the first n columns of a tsv file without a header, such as `features.tsv`; lines may have any length.

    Values are strings, and quotes have no meaning. Empty lines are skipped, fields that a line lacks are empty, and
    columns that no line has are left out.
    """
    if n > 1:
        with open_text(path) as file:
            n = min(n, 1 + max((line.count(b"\t") for line in file), default=0))
    with open_text(path) as file:
        return pd.read_csv(
            file, sep="\t", header=None, names=range(n), usecols=range(n), quoting=csv.QUOTE_NONE, **_UNCHANGED
        )
