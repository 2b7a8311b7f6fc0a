# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Tissue neighbourhoods
#
# What do the cells around a cell reveal about it? We simulate a section in which the neighbours matter, train a model,
# and compare it with the plain mean of the neighbours.

# %%
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from transformers import TrainingArguments

import stformer_hf as sf
from stformer_hf.inference import plots

# %% [markdown]
# ## A section
#
# Three layers of tissue, three types of cells, 60 genes. The expression of a cell depends on its type and on its
# layer.

# %%
rng = np.random.default_rng(0)
n_cells, n_genes = 1500, 60
spatial = rng.random((n_cells, 2)) * 1000  # micrometres
layer = (spatial[:, 1] // 334).astype(int)
mixture = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]])
types = np.array([rng.choice(3, p=mixture[i]) for i in layer])
rates = np.exp(rng.normal(0, 1, (3, n_genes)))[types] * np.exp(rng.normal(0, 0.5, (3, n_genes)))[layer]
section = AnnData(
    sparse.csr_matrix(rng.poisson(rates).astype(np.float32)),
    obs=pd.DataFrame(
        {"cell_type": pd.Categorical.from_codes(types, ["A", "B", "C"]), "layer": pd.Categorical(layer.astype(str))},
        index=[f"cell{i}" for i in range(n_cells)],
    ),
    var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]),
    obsm={"spatial": spatial},
)

# %% [markdown]
# ## Train on one side, predict the other
#
# `neighbors_from="indices"` excludes held-out cells from training neighbourhoods.

# %%
right = spatial[:, 0] > 750
settings = {"k_nearest": 20, "cell_type_key": "cell_type"}
train = sf.CenterMaskSampler.from_anndata(
    section, None, indices=np.flatnonzero(~right), neighbors_from="indices", **settings
)
test = sf.CenterMaskSampler.from_anndata(section, None, indices=np.flatnonzero(right), **settings)

config = sf.CellNeighborhoodConfig.from_size("tiny", n_genes=train.n_genes, n_cell_types=train.n_cell_types)
model = sf.CellNeighborhoodForMaskedCell(config)
arguments = TrainingArguments(
    "spatial",
    num_train_epochs=5,
    per_device_train_batch_size=32,
    learning_rate=1e-3,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = sf.NeighborhoodTrainer(arguments, train, model=model, eval_dataset=test, baselines=True)
trainer.train()
for name, value in sorted(trainer.evaluate().items()):
    if "nll" in name or "loss" in name or "pearson" in name:
        print(f"{name:<45} {value:.3f}")

# %% [markdown]
# The loss is a negative log likelihood per gene. In our run it was 1.378, against 1.408 for the mean of the cell type
# and 1.589 for the mean of the neighbours: the model combines both. On few real cells a plain mean is often better.
#
# ## Domains
#
# The embedding describes the cells around a cell, without the cell itself. Grouped by k-means, it finds the layers.

# %%
sf.embed_neighborhoods(section, model, cell_type_key="cell_type", k_nearest=20)
sf.spatial_domains(section, 3)
axes = plots.sections(section, "domain", save="domains.png")
print(pd.crosstab(section.obs["layer"], section.obs["domain"]))
