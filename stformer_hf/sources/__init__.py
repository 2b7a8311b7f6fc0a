"""Open any file or object of cells, as blocks of CSR rows, obs and a gene table."""
