"""Trainers, callbacks, checkpoints, objectives, starts and model cards."""
