"""The registry of formats: what a reader returns, and how files are recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from ..genes.gene_table import GeneTable
from .matrices import Matrix


@dataclass
class Layer:
    """One matrix of a source that may hold counts.

    Attributes
    ----------
    name : str
        `X`, `raw` or the name of a layer; in 10x files a feature type or a genome.
    matrix : Matrix
        Cells by genes.
    genes : callable () -> GeneTable
        Reads the genes of its columns.
    obs : callable () -> DataFrame
        Reads the table of its rows.
    neighbors : callable (key) -> Matrix, optional
        Opens a graph of its cells (`obsp`); KeyError if there is none of that name.
    whole : Matrix, optional
        The matrix with all its columns, if this layer has only those of one feature type.
    """

    name: str
    matrix: Matrix
    genes: Callable[[], GeneTable]
    obs: Callable[[], pd.DataFrame]
    neighbors: Callable[[str], Matrix] | None = None
    whole: Matrix | None = None


@dataclass(frozen=True)
class Format:
    """A format: its name, a function that recognises its files, and its reader.

    With `remote`, the reader also takes addresses of folders on a server.
    """

    name: str
    matches: Callable[[Path], bool]
    read: Callable[[Any], Any]
    remote: bool = False


FORMATS: list[Format] = []
Reader = TypeVar("Reader", bound=Callable[..., Any])


def reads(name: str, matches: Callable[[Path], bool], remote: bool = False) -> Callable[[Reader], Reader]:
    """Register the decorated function as the reader of a format."""

    def register(read: Reader) -> Reader:
        FORMATS.append(Format(name, matches, read, remote))
        return read

    return register


def find_format(path: Path | str) -> Format | None:
    """Return the format of a file or folder, or (str) of an address, see `formats.remote_folder`; None if unknown."""
    return next((known for known in FORMATS if (known.remote if isinstance(path, str) else known.matches(path))), None)
