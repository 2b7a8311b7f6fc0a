"""Metrics, baselines, and evaluations of embeddings."""
