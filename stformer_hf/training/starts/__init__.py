"""Initial weights of models, instead of random ones."""
