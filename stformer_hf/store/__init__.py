"""Cells on disk: one row per cell in a Hugging Face dataset, read in blocks.

`cell_store.py` is the public class, whose base in `reader.py` reads; `writer.py` builds stores. The file format:
`shards.py` defines the rows, `compact_rows.py` their compact form, `manifest.py` the other files.
"""
