"""Messages about names: the closest known one, some of them, all of them, or those that stand for missing values."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable

logger = logging.getLogger(__name__)


def closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint that names the known name closest to a wrong one, or an empty string if none is close."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; the closest known one is {prefix}{by_lower[found[0]]}" if found else ""


def some_of(names: Iterable[object], most: int = 5) -> str:
    """Return the first names, and an ellipsis if there are more."""
    texts = list(map(str, names))
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")


def must_have(known: Collection[str], where: str, key: str | None, remedy: str = "") -> None:
    """Raise a ValueError if `known`, such as the `obsm` of an AnnData (`where`), lacks a key that is not None."""
    if key is not None and key not in known:
        has = ", ".join(map(repr, known)) or "nothing"
        raise ValueError(f"There is no {where}[{key!r}]; {where} has {has}.{remedy}")


def warn_of_missing(classes: Iterable[object], where: str) -> None:
    """Log a warning if classes have names that stand for missing values in text, such as "" or "nan"."""
    found = [repr(str(name)) for name in classes if str(name).strip().lower() in _MISSING]
    if found:
        logger.warning(
            f"{where} has the class{'es' * (len(found) > 1)} {', '.join(found)}, like any other class. If "
            "these cells have no label, make it missing: adata.obs[key].replace(name, None)."
        )


_MISSING = {"", "nan", "na", "n/a", "none", "null", "<na>"}
