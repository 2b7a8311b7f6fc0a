# %% [markdown]
# # larger_than_memory
