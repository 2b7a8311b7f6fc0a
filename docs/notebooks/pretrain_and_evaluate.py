# %% [markdown]
# # pretrain_and_evaluate
