"""The names that other systems use: SCDL, AnnDataset, PerturbGene's and STFormer's set-up and weights."""
