"""Files of older systems: vocabularies, medians and lengths, from JSON, text and pickles that may hold only data."""

import builtins
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY = np._core if hasattr(np, "_core") else np.core  # renamed by numpy 2


def _latin1(text: str, encoding: str) -> bytes:  # so pickles of protocol 2 write bytes
    return text.encode("latin1")


def _no_defaults(*_) -> dict:
    return {}


# What a pickle may ask for: containers, numbers, and numpy's scalars and arrays. Everything else could run code.
_ALLOWED: dict[tuple[str, str], Callable] = {
    **{
        (module, name): getattr(builtins, name)
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "bool", "str", "bytes")
    },
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): _no_defaults,
    ("_codecs", "encode"): _latin1,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{
        (f"numpy.{core}.{module}", name): getattr(getattr(_NUMPY, module), name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "scalar"), ("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    },
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Give what a pickle asks for, if it is allowed."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only plain containers, numbers and strings are loaded"
            )
        return _ALLOWED[module, name]


def load_pickle(path: str | os.PathLike) -> Any:
    """Load a pickle of plain containers, numbers and strings; numpy scalars and arrays of numbers may be among them.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    object

    Raises
    ------
    ValueError
        The pickle names anything else (nothing of it was run), or is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _DataUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is refused: {error}.") from error


def load_mapping(source: Mapping | str | os.PathLike) -> dict:
    """Read a mapping: one in memory, a .json or .pkl file, or a text file whose line numbers are the values.

    Parameters
    ----------
    source : mapping, str or Path

    Returns
    -------
    dict
        Keys are strings.

    Raises
    ------
    ValueError
        A file of another kind, or that holds something else.
    """
    if isinstance(source, Mapping):
        found = source
    else:
        path = Path(source)
        if path.suffix in (".pkl", ".pickle"):
            found = load_pickle(path)
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            found = {line.strip(): number for number, line in enumerate(lines) if line.strip()}
        else:
            raise ValueError(f"{path}: a mapping is read from .json, .pkl or .txt files.")
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} holds a {type(found).__name__}, and a mapping is needed.")
    return {str(key): value for key, value in found.items()}


__all__ = ["load_mapping", "load_pickle"]
