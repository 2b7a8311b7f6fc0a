"""Interfaces of other systems: SCDL, AnnDataset, the set-up of STFormer, and weights of PerturbGene and Geneformer."""
