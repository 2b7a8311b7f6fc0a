"""Classes of this package, and their copies that transformers loads from a checkpoint with `trust_remote_code`."""

from typing import Any, TypeGuard, TypeVar

_Kind = TypeVar("_Kind")


def is_a(found: Any, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Return whether an object is of a class of `models/`, or of a copy of it.

    With `trust_remote_code=True`, transformers imports the code beside the weights, even if this package is imported:
    always for a tokenizer, and for a model that was loaded before the package was imported. `isinstance` is False for
    these copies, and so cannot decide whether a check applies.
    """
    file = kind.__module__.rpartition(".")[2]
    return any((of.__name__, of.__module__.rpartition(".")[2]) == (kind.__name__, file) for of in type(found).__mro__)
