"""Convert rows to tokens to batches: collators, samplers and streams."""
