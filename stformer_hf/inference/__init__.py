"""Apply trained models to cells: embed, annotate, plots."""
