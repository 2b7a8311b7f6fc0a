"""Cells on disk: one row per cell in a Hugging Face dataset, read in blocks.

`cell_store.py` is the public class. The file format: `shards.py` defines the rows, `compact_rows.py` their compact
form, `writer.py` the manifest.
"""
