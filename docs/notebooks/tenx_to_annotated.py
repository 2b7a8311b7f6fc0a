# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # From 10x to annotated cells
#
# This notebook reads an output folder of Cell Ranger, and adds a label and an embedding to each cell. It uses 700
# blood cells that scanpy ships, so that it runs offline; replace them with your own folder.

# %%
import gzip
from pathlib import Path

import scanpy as sc
from scipy.io import mmwrite

import stformer_hf as sf
from stformer_hf.cli.demo import load_cells, split_cells
from stformer_hf.inference import plots

# %% [markdown]
# ## Input
#
# Three quarters of the cells have labels. We write the others as Cell Ranger does: `matrix.mtx.gz`, `features.tsv.gz`
# and `barcodes.tsv.gz`.

# %%
cells, _ = load_cells()
labelled, unlabelled = split_cells(cells, seed=0)

folder = Path("filtered_feature_bc_matrix")
folder.mkdir(exist_ok=True)
with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
    mmwrite(file, unlabelled.X.T.astype(int))
with gzip.open(folder / "features.tsv.gz", "wt") as file:
    file.writelines(f"{gene}\t{gene}\tGene Expression\n" for gene in unlabelled.var_names)
with gzip.open(folder / "barcodes.tsv.gz", "wt") as file:
    file.writelines(f"{barcode}\n" for barcode in unlabelled.obs_names)

# %% [markdown]
# ## Train a classifier
#
# The classifier starts from linear models of the cells. By default, cross-validation within the labelled cells decides
# whether it is trained further; `num_train_epochs=0` skips this, to be quick here.

# %%
classifier = sf.finetune(labelled, "bulk_labels", output="classifier", num_train_epochs=0)

# %% [markdown]
# ## Annotate
#
# scanpy reads the folder. The tokenizer matches genes by identifier and logs the share of the model's genes that it
# finds.

# %%
adata = sc.read_10x_mtx(folder)
sf.annotate(adata, "classifier")
sf.embed(adata, "classifier")
adata

# %%
adata.obs["stformer_label"].value_counts()

# %% [markdown]
# `stformer_score` is the probability of the label. Look at uncertain cells before you use the labels.

# %%
certain = adata.obs["stformer_score"] > 0.8
print(f"{certain.mean():.0%} of the cells have a score above 0.8")

# %% [markdown]
# ## Is it right?
#
# Here we know the answer. Logistic regression on all genes is the baseline.

# %%
from stformer_hf.evaluation.cell_baselines import predict_logistic_regression

true = unlabelled.obs["bulk_labels"].astype(str).to_numpy()
linear = predict_logistic_regression(labelled.X, labelled.obs["bulk_labels"].astype(str), unlabelled.X)
print(f"this classifier     {(adata.obs['stformer_label'].astype(str).to_numpy() == true).mean():.3f}")
print(f"logistic regression {(linear == true).mean():.3f}")

# %%
axes = plots.umap(adata, "stformer_label", save="annotated.png")

# %% [markdown]
# If you have many such folders, build a store from them directly:

# %%
store = sf.CellStore.build("cells", folder)
print(len(store), "cells")
