"""The known name closest to a wrong one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint that names the known name closest to a wrong one, or an empty string if none is close."""
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; the closest known one is {prefix}{by_lower[found[0]]}" if found else ""


__all__ = ["closest"]
