"""Gradients of models that read sparse counts on several processes, whose batches hold unequal numbers of counts.

Run by test_whole_cell_ecosystem.py, under torch.distributed.run.
"""

import copy
import sys

import numpy as np
import torch
import torch.distributed as dist
from scipy import sparse
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodForMaskedCell,
    GeneBertConfig,
    GeneBertForClassification,
    GeneTokenizer,
    collate_neighborhoods,
)
from stformer_hf.batches.collate import pack, pad
from stformer_hf.space.center_mask_sampler import NeighborhoodBatch


def batch_of(tokenizer, rank: int, packing: bool) -> dict:
    """Cells of a rank: of the second, more of them and with more genes."""
    rng = np.random.default_rng(rank)
    counts = rng.poisson([0.3, 3][rank], ([3, 5][rank], 40))
    batch = (pack if packing else pad)(tokenizer.encode_cells(counts), tokenizer)
    return {**batch, "labels": torch.arange(len(counts)) % 2}


def neighborhoods_of(rank: int) -> dict:
    """Neighbourhoods of a rank, with sparse expression."""
    rng, cuts = np.random.default_rng(rank), np.cumsum([[0, 3, 0, 5], [0, 7, 2, 1]][rank])
    counts = sparse.csr_matrix(rng.poisson(0.5, (cuts[-1] + 3, 40)).astype(np.float32))
    types = np.zeros(cuts[-1], np.int64), np.zeros(3, np.int64)
    return collate_neighborhoods(NeighborhoodBatch(cuts, counts, *types), packed=True)


def compare(model: torch.nn.Module, layers: str, batches: list[dict]) -> None:
    """Compare DDP and FSDP2 with the mean of the ranks' gradients, computed in each process."""
    rank, single = dist.get_rank(), copy.deepcopy(model)
    sum(single(**batch).loss for batch in batches).div(len(batches)).backward()
    wanted = {name: p.grad for name, p in single.named_parameters()}
    own = single(**batches[rank]).loss.detach()

    replica = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    replica(**batches[rank]).loss.backward()
    for name, p in replica.module.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4, msg=lambda m, of=name: f"{of}: {m}")

    for policy in ({}, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}):
        sharded = copy.deepcopy(model)
        for layer in sharded.get_submodule(layers):
            fully_shard(layer, **policy)
        fully_shard(sharded, **policy)
        loss = sharded(**batches[rank]).loss
        loss.backward()
        if policy:
            torch.testing.assert_close(loss.detach(), own, atol=2e-2, rtol=2e-2)
            continue
        torch.testing.assert_close(loss.detach(), own, atol=1e-5, rtol=1e-5)
        for name, p in sharded.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), wanted[name], atol=1e-6, rtol=1e-4)


def main() -> None:
    """Compare a classifier of whole cells, padded and packed, and a model of neighbourhoods."""
    dist.init_process_group("gloo")
    ranks = range(dist.get_world_size())
    tokenizer = GeneTokenizer([f"g{i}" for i in range(40)], whole_cell=True, max_length=12)
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(
        tokenizer, "tiny", num_labels=2, wide_head=True, residual_init="normal", hidden_dropout_prob=0.0
    )
    model = GeneBertForClassification(config)
    torch.nn.init.normal_(model.wide_head.genes.weight, std=0.1)
    for packing in (False, True):
        compare(model, "gene_bert.layers", [batch_of(tokenizer, of, packing) for of in ranks])
    model = CellNeighborhoodForMaskedCell(CellNeighborhoodConfig.from_size("tiny", n_genes=40))
    compare(model, "cell_neighborhood.encoder", [neighborhoods_of(of) for of in ranks])
    dist.destroy_process_group()
    sys.stdout.write("the same\n")


if __name__ == "__main__":
    main()
