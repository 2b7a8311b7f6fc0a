"""Spatial data: neighbourhoods of cells, their models, embeddings and domains."""
