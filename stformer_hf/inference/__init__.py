"""Apply trained models to cells: embed, annotate, map, perturb, gene networks, export and plots."""
