"""GeneBert: configuration, models and tokenizer. A checkpoint carries copies of these files.

`gene_columns.py` finds the gene of each column of a matrix, `gene_matcher.py` that gene in the vocabulary;
`bin_encoder.py` and `rank_encoder.py` make the tokens. `heads.py` has the losses.
"""
