"""CellNeighborhood: configuration, models and count likelihoods. A checkpoint carries copies of these three files."""
