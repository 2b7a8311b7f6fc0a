"""Cells at rest, rows out."""
