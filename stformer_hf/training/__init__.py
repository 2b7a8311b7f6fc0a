"""Batches and steps."""
