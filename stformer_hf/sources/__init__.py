"""Any file or object of cells, opened to blocks of CSR rows, obs and a gene table."""
