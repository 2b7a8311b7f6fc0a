"""What a figure is worth: metrics, baselines, and evaluations of embeddings."""
