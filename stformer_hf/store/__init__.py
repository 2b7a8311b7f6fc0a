"""Cells on disk: one row per cell in a Hugging Face dataset, read in blocks."""

from . import cell_store as _cell_store  # noqa: F401  (registers stores as a format of `sources`)
