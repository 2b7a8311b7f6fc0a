"""Tissue, from neighbourhoods of cells to domains."""
