"""Open any file or object of cells, as blocks of CSR rows, obs and a gene table.

Each `…_files.py` reads some formats and registers them with `registry.py`; `loom_files.py` is the shortest example.
"""
