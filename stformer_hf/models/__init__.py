"""Everything that a checkpoint needs, and nothing else."""
