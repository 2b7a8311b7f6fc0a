# %% [markdown]
# # tenx_to_annotated
