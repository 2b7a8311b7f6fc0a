"""Gene tables: read, merged and matched; and statistics of genes."""
