# %% [markdown]
# # tissue_neighbourhoods
