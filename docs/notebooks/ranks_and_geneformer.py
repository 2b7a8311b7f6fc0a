# %% [markdown]
# # ranks_and_geneformer
