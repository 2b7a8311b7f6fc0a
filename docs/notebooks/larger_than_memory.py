# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Larger than memory, and several processes
#
# Nothing in this notebook holds all cells in memory, so it works for millions of cells. Files are written block by
# block into a store, which is read through memory maps, or they are streamed.

# %%
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from torch.utils.data import DataLoader

import stformer_hf as sf

# %% [markdown]
# ## Files
#
# Four files of 2,000 simulated cells. Each has its own genes, in its own order.

# %%
rng = np.random.default_rng(0)
for i in range(4):
    genes = rng.permutation(1200)[:1000]
    counts = sparse.random(2000, 1000, density=0.1, random_state=i, format="csr", dtype=np.float32)
    counts.data = rng.poisson(2, counts.nnz).astype(np.float32) + 1
    AnnData(
        counts,
        obs=pd.DataFrame({"donor": f"donor{i}"}, index=[f"cell{i}_{j}" for j in range(2000)]),
        var=pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in genes]),
    ).write_h5ad(f"donor{i}.h5ad")

# %% [markdown]
# ## One store, built in parts
#
# On a cluster, each machine builds its part. `join` combines the parts without copying. Genes are matched by
# identifier.

# %%
files = sorted(map(str, Path(".").glob("donor*.h5ad")))
for i in range(2):
    sf.CellStore.build(f"part{i}", files, obs=["donor"], part=(i, 2), overwrite=True)
atlas = sf.CellStore.join("atlas", ["part0", "part1"], overwrite=True)
print(len(atlas), "cells,", len(atlas.genes), "genes")

# %% [markdown]
# ## Read it
#
# `BlockShuffleSampler` reads blocks of neighbouring rows, which is faster on slow disks.

# %%
loader = DataLoader(atlas, batch_size=64, sampler=sf.BlockShuffleSampler(atlas), collate_fn=sf.collate_cells)
print(sum(1 for _ in loader), "batches")
split = atlas.train_test_split(0.25, by="donor")  # a whole donor is held out
print(sorted(split["test"].obs["donor"].astype(str).unique()))

# %% [markdown]
# ## Or stream the files
#
# Without a store, `IterableAnnDataset` reads each cell once per epoch, whatever the number of workers.

# %%
tokenizer = sf.GeneTokenizer.from_store(atlas, bin_edges=[0.5, 2.5, 4.5], max_length=64)
stream = sf.IterableAnnDataset(files, tokenizer, shuffle=True)
batches = DataLoader(stream, batch_size=64, collate_fn=sf.DataCollatorForPhenotypicMLM(tokenizer))
print(next(iter(batches))["input_ids"].shape)

# %% [markdown]
# ## Several processes
#
# A training script is the same for one process and for many.

# %%
Path("train.py").write_text("""
import stformer_hf as sf
from transformers import TrainingArguments


def main():
    atlas = sf.CellStore("atlas")
    tokenizer = sf.GeneTokenizer.from_store(atlas, bin_edges=[0.5, 2.5, 4.5], max_length=64)
    model = sf.GeneBertForPhenotypicMLM(sf.GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    arguments = TrainingArguments(
        "model",
        max_steps=5,
        per_device_train_batch_size=16,
        train_sampling_strategy="group_by_length",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = sf.STFormerPretrainer(arguments, atlas, model=model, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
""")
Path("cpu_2.yaml").write_text("""
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU  # torchrun; without a GPU it talks through gloo
use_cpu: true
mixed_precision: "no"
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
rdzv_backend: static
main_training_function: main
""")
launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "cpu_2.yaml", "train.py"]
print(subprocess.run(launch, check=True, capture_output=True, text=True).stdout[-200:])

# %% [markdown]
# On GPUs, use `ddp.yaml`, `fsdp2.yaml` or `deepspeed_zero2.yaml` of `recipes/accelerate` instead of `cpu_2.yaml`.
