"""Read files of older systems (vocabularies, medians, lengths) from JSON, text and pickles that hold only data."""

import builtins
import gzip
import json
import os
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

# Names of the special tokens in existing vocabularies, by role.
_NAMES_OF_ROLES = {
    "cls_token": ("<cls>", "[CLS]"),
    "eos_token": ("<eos>", "[EOS]"),
    "mask_token": ("<mask>", "[MASK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "sep_token": ("<sep>", "[SEP]"),
}


class _Dtype:
    """Stands in for numpy.dtype: numbers and strings of a fixed size; other state in the pickle is ignored."""

    __slots__ = ("numpy",)

    def __init__(self, code: object, *_: object):
        if not (isinstance(code, str) and _PLAIN_TYPE.fullmatch(code)):
            raise pickle.UnpicklingError(
                f"it holds numpy data of type {code!r}, but only numbers and strings are loaded"
            )
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray; `load_pickle` replaces it by the array."""

    __slots__ = ("numpy",)

    def __init__(self) -> None:
        self.numpy = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        self.numpy = _from_bytes(data, dtype, shape, "F" if by_columns else "C")


def _stand_in(function: Callable) -> Any:
    """Return an object that calls a function: a pickle could give attributes to the function itself."""
    return type("_StandIn", (), {"__slots__": (), "__call__": staticmethod(function)})()


def _from_bytes(data: object, dtype: object, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    if not (isinstance(dtype, _Dtype) and isinstance(data, (bytes, bytearray))):
        raise pickle.UnpicklingError("it holds numpy data that are not plain bytes")
    return np.frombuffer(bytes(data), dtype.numpy).reshape(shape, order=order).copy()


# Names that a pickle may refer to: containers, numbers, and stand-ins for the names in numpy's pickles. Numpy's own
# objects would read flags and addresses from the file. Everything else could run code.
_PLAIN_TYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16)|[SU]\d+)")
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (module, name): getattr(builtins, name)
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "bool", "str", "bytes")
    },
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): _stand_in(lambda *_: {}),
    # Pickles of protocol 2 write bytes with it.
    ("_codecs", "encode"): _stand_in(lambda text, encoding: text.encode("latin1")),
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "scalar", _stand_in(lambda dtype, data: _from_bytes(data, dtype, (1,), "C")[0])),
            ("multiarray", "_reconstruct", _stand_in(lambda *_: _Array())),
            ("numeric", "_frombuffer", _stand_in(lambda *given: _from_bytes(*given[:4]))),
        )
    },
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a pickle refers to, if it is allowed."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, but only plain containers, numbers and strings are loaded"
            )
        return _ALLOWED[module, name]


def _plain(value: Any) -> Any:
    """Replace stand-ins by arrays, and check that no other objects are left."""
    if isinstance(value, _Array):
        return value.numpy
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_plain(inner) for inner in value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic, np.ndarray)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")


def load_pickle(path: str | os.PathLike) -> Any:
    """Load a pickle of plain containers, numbers and strings, including numpy scalars and arrays of numbers.

    Raises a ValueError if the file is damaged, or refers to anything else; no code of the file is run.
    """
    try:
        with open(path, "rb") as file:
            return _plain(_DataUnpickler(file).load())
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is refused: {error}.") from error


def load_mapping(source: Mapping | str | os.PathLike) -> dict:
    """Read a mapping from memory, a .json or .pkl file, or a text file whose line numbers are the values.

    Text and JSON may be compressed with gzip. Keys become strings. Raises a ValueError for another format, or if a
    file holds something else.
    """
    if isinstance(source, Mapping):
        found = source
    else:
        path = Path(source)
        suffix = Path(path.stem if path.suffix == ".gz" else path).suffix
        if path.suffix in (".pkl", ".pickle"):
            found = load_pickle(path)
        elif suffix == ".json":
            text = _read_text(path)
            try:
                found = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}.") from error
        elif suffix == ".txt":
            lines = _read_text(path).splitlines()
            found = {line.strip(): number for number, line in enumerate(lines) if line.strip()}
        else:
            raise ValueError(f"{path}: a mapping must be a .json, .pkl or .txt file.")
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} holds a {type(found).__name__}, but a mapping is needed.")
    return {str(key): value for key, value in found.items()}


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not text, or is damaged: {error}.") from error


def read_token_dictionary(
    token_dictionary: Mapping[str, int] | str | os.PathLike,
) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """Read a vocabulary of STFormer or Geneformer: ids by token, special tokens by role, genes by ascending id."""
    ids = {}
    for token, value in load_mapping(token_dictionary).items():
        if isinstance(value, (bool, str)) or value is None or value != int(value):
            raise ValueError(f"The id of {token!r} must be an integer, got {value!r}.")
        ids[token] = int(value)
    special_tokens = {role: name for role, names in _NAMES_OF_ROLES.items() for name in names if name in ids}
    if not {"pad_token", "mask_token"} <= set(special_tokens):
        raise ValueError("The token dictionary lacks <pad> or <mask>.")
    genes = sorted(ids.keys() - {name for names in _NAMES_OF_ROLES.values() for name in names}, key=ids.__getitem__)
    return ids, special_tokens, genes
