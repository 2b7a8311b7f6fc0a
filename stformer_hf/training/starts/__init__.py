"""Weights that a model starts from, in place of random ones."""
