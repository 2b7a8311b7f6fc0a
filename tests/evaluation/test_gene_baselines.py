"""Baselines of masked genes against a plain loop, and at the positions of the trainer's evaluation."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import of_epoch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

from stformer_hf import (
    CellStore,
    DataCollatorForCellClassification,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    STFormerPreCollator,
    STFormerPretrainer,
)
from stformer_hf.evaluation import gene_baselines
from stformer_hf.evaluation.gene_baselines import WIDTHS, masked_gene_baselines
from stformer_hf.training import pretrainer


def rank_tokenizer(genes, **kwargs) -> GeneTokenizer:
    medians = np.random.default_rng(0).lognormal(0, 0.3, len(genes)).tolist()
    medians[1] = None
    return GeneTokenizer(list(genes), scheme="rank", medians=medians, **kwargs)


def cells_of(batch, scheme) -> list[dict]:
    """The tokens of a padded batch, a cell at a time, in plain numbers."""
    cells = []
    for row in range(len(batch["input_ids"])):
        cells.append({name: batch[name][row].tolist() for name in ("input_ids", "token_type_ids", "labels")})
    return cells


# ---------------------------------------------------------------------- ranks, written out


def plain_rank_baselines(train_tokens, masked_train, masked_held_out, tokenizer):
    """B0 to B3 gene by gene, in float64; the tokens of the training cells are (id, type) pairs."""
    genes = {int(token): i for i, token in enumerate(tokenizer.gene_token_ids)}
    n, offset = len(genes), tokenizer.gene_token_type_offset
    counts = np.ones((2, n))
    for token, kind in train_tokens:
        if token in genes:
            counts[kind - offset, genes[token]] += 1
    b1 = counts / counts.sum(1, keepdims=True)
    log_medians = np.log(tokenizer.medians)

    def nll(cells, width):
        losses = []
        for cell in cells:
            positions = list(enumerate(zip(cell["input_ids"], cell["token_type_ids"], cell["labels"], strict=True)))
            for at, (token, kind, label) in positions:
                if token != tokenizer.mask_token_id or label not in genes:
                    continue
                p = b1[kind - offset]
                seen = [
                    (place, genes[other])
                    for place, (other, its, of) in positions
                    if its == kind and other in genes and of in (-100, other)
                ]
                b2 = p.copy()
                b2[[gene for _, gene in seen]] = 0
                b2 /= b2.sum()
                nearest = sorted(seen, key=lambda pair: (abs(pair[0] - at), pair[0]))[:8]
                weights = np.zeros(n)
                rounded = np.round(log_medians * 10 / width)
                for _, gene in nearest:
                    for other in range(n):
                        distance = abs(rounded[gene] - rounded[other])
                        if distance <= 50:  # False for NaN
                            weights[other] += np.exp(-0.5 * (distance / 10) ** 2)
                q = b2 * weights
                b3 = 0.9 * q / q.sum() + 0.1 * b2 if q.sum() > 0 else b2
                own = genes[label]
                losses.append([-np.log(1 / n), -np.log(p[own]), -np.log(b2[own]), -np.log(b3[own])])
        return np.array(losses)

    of_widths = [nll(masked_train, width)[:, 3].mean() for width in WIDTHS]
    width = WIDTHS[int(np.argmin(of_widths))]
    names = ["b0_nll", "b1_nll", "b2_nll", "b3_nll"]
    return {**dict(zip(names, nll(masked_held_out, width).mean(0), strict=True)), "b3_width": width}


def test_ranks_equal_a_plain_loop_for_store_subset_and_dataset(store):
    tokenizer = rank_tokenizer(store.gene_ids, phenotypes={"cell_type": ["B cell", "T cell"]})
    collator = of_epoch(DataCollatorForGeneRankMLM(tokenizer, mlm_probability=0.3, seed=5))
    filled = np.flatnonzero(store.lengths > 0)
    train, held_out = filled[:40], filled[40:]
    tokens = tokenizer.encode_cells(store.__getitems__(train))
    pairs = list(zip(tokens.input_ids.tolist(), tokens.token_type_ids.tolist(), strict=True))
    masked = [cells_of(collator(store.__getitems__(rows)), "rank") for rows in (train, held_out)]
    expected = plain_rank_baselines(pairs, *masked, tokenizer)
    found = masked_gene_baselines(store.select(range(41)), store.select(held_out), collator, batch_size=7)
    assert found == pytest.approx(expected, rel=1e-12)

    encoded = tokenizer(store.__getitems__(filled))
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids")}
    dataset = Dataset.from_dict({**columns, "cell_id": filled})
    for cells in (store, dataset):
        parts = Subset(cells, (filled[:40] if cells is store else np.arange(40)).tolist()), None
        rest = held_out if cells is store else np.arange(40, len(filled))
        assert masked_gene_baselines(parts[0], Subset(cells, rest.tolist()), collator) == pytest.approx(
            expected, rel=1e-12
        )


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=5),
    st.floats(0.2, 0.9),
    st.integers(0, 1000),
)
def test_ranks_with_neighbourhoods_equal_a_plain_loop(sizes, share, seed):
    tokenizer = rank_tokenizer([f"g{i}" for i in range(14)], neighborhood=True)
    collator = of_epoch(DataCollatorForGeneRankMLM(tokenizer, mlm_probability=share, seed=seed))
    rng, cells = np.random.default_rng(seed), []
    for own, around in sizes:
        draw = [rng.permutation(tokenizer.gene_token_ids)[:size].tolist() for size in (own, around)]
        ids = [tokenizer.cls_token_id, *draw[0], tokenizer.sep_token_id, *draw[1], tokenizer.eos_token_id]
        cells.append({"input_ids": ids, "token_type_ids": [0, *[1] * own, 0, *[2] * around, 0], "cell_id": len(cells)})
    dataset = Dataset.from_list(cells)
    masked = cells_of(collator(cells), "rank")
    pairs = [pair for cell in cells for pair in zip(cell["input_ids"], cell["token_type_ids"], strict=True)]
    if not any(token == tokenizer.mask_token_id for cell in masked for token in cell["input_ids"]):
        with pytest.raises(ValueError, match="there is nothing to score"):
            masked_gene_baselines(dataset, dataset, collator)
        return
    found = masked_gene_baselines(dataset, dataset, collator, batch_size=2)
    assert found == pytest.approx(plain_rank_baselines(pairs, masked, masked, tokenizer), rel=1e-9)


def test_a_vocabulary_without_medians_has_no_b3():
    tokenizer = STFormerPreCollator({"<pad>": 0, "<mask>": 1, **{f"g{i}": i + 2 for i in range(30)}})
    dataset = Dataset.from_dict({"input_ids": [list(range(2 + i, 22 + i)) for i in range(10)]})
    found = masked_gene_baselines(dataset, dataset, DataCollatorForGeneRankMLM(tokenizer))
    assert list(found) == ["b0_nll", "b1_nll", "b2_nll"]
    assert found["b0_nll"] == pytest.approx(np.log(30)) and found["b2_nll"] < found["b1_nll"]


def test_whole_cells_show_the_genes_that_are_cut_off(store):
    tokenizer = rank_tokenizer(store.gene_ids, max_length=9)
    collator = of_epoch(DataCollatorForGeneRankMLM(tokenizer, mlm_probability=0.4))
    filled = np.flatnonzero(store.lengths > 0)
    train, held_out = store.select(filled[:40]), store.select(filled[40:])

    def cells(rows, whole):
        """The tokens of cells; of whole ones also those that are cut off, without labels."""
        masked = cells_of(collator(store.__getitems__(rows)), "rank")
        tokens = tokenizer.encode_cells(store.__getitems__(rows), max_length=999)
        for cell, start, stop in zip(masked, tokens.indptr, tokens.indptr[1:], strict=False):
            cut = tokens.input_ids[start:stop][8:-1].tolist() if whole else []
            cell["input_ids"] += cut
            cell["token_type_ids"] += [1] * len(cut)
            cell["labels"] += [-100] * len(cut)
        return masked

    tokens = tokenizer.encode_cells(store.__getitems__(filled[:40]))
    pairs = list(zip(tokens.input_ids, tokens.token_type_ids, strict=True))
    found = {}
    for whole in (False, True):
        found[whole] = masked_gene_baselines(train, held_out, collator, whole_cells=whole, batch_size=7)
        plain = plain_rank_baselines(pairs, cells(filled[:40], whole), cells(filled[40:], whole), tokenizer)
        assert found[whole] == pytest.approx(plain, rel=1e-9)
    assert found[True]["b1_nll"] == found[False]["b1_nll"]
    assert found[True]["b2_nll"] < found[False]["b2_nll"] - 0.05


# ---------------------------------------------------------------------- bins, written out


@pytest.mark.parametrize("share", [0.15, 0.6])
def test_bins_equal_a_plain_loop(store, tokenizer, share):
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=share, seed=2)
    filled = np.flatnonzero(store.lengths > 0)
    train, held_out = filled[:40], filled[40:]
    n_bins, first = tokenizer.n_bins, tokenizer.first_bin_id

    def labels(cells):
        for number, cell in enumerate(cells):
            for token, kind, label in zip(cell["input_ids"], cell["token_type_ids"], cell["labels"], strict=True):
                if label >= first and token == tokenizer.mask_token_id:
                    yield number, kind, label - first

    of_gene, of_all = {}, np.ones(n_bins)
    for epoch in range(8):
        collator.set_epoch(epoch)
        for _, gene, bin_ in labels(cells_of(collator(store.__getitems__(train)), "binned")):
            of_gene.setdefault(gene, np.zeros(n_bins))[bin_] += 1
            of_all[bin_] += 1
    of_all /= of_all.sum()
    collator.set_epoch(0)
    cells, losses, n_absent = cells_of(collator(store.__getitems__(held_out)), "binned"), [], 0
    collator.set_epoch(3)  # of no consequence: evaluation masks as in epoch 0
    for number, gene, bin_ in labels(cells):
        counts = of_gene.get(gene, np.zeros(n_bins))
        by_gene = (counts[bin_] + of_all[bin_]) / (counts.sum() + 1)
        shown = [token - first for token in cells[number]["input_ids"] if token >= first]
        by_cell = of_all[0]
        if bin_:
            rest = (shown.count(bin_) + of_all[bin_] / (1 - of_all[0])) / (len(shown) + 1)
            by_cell = (1 - of_all[0]) * rest
        losses.append([np.log(n_bins), -np.log(by_gene), -np.log(by_cell)])
        n_absent += bin_ == 0
    found = masked_gene_baselines(store.select(train), store.select(held_out), collator, batch_size=7)
    names = ["uniform_nll", "gene_marginal_nll", "cell_marginal_nll"]
    assert found == pytest.approx(dict(zip(names, np.mean(losses, 0), strict=True)), rel=1e-12)
    assert n_absent > 5  # genes that are swapped in are among those scored
    assert collator.epoch == 3


# ---------------------------------------------------------------------- what cannot be


def test_what_cannot_be_scored_is_refused(store, tokenizer):
    collator = DataCollatorForPhenotypicMLM(tokenizer)
    with pytest.raises(ValueError, match="a IterableDataset does not support"):
        masked_gene_baselines(store, IterableDataset.from_generator(lambda: iter([{}])), collator)
    with pytest.raises(ValueError, match="There are no cells"):
        masked_gene_baselines(store, store.select([3]), collator)
    ranks = rank_tokenizer([f"g{i}" for i in range(9)], add_cls=False, add_eos=False)
    twice = Dataset.from_dict({"input_ids": [[4, 5, 6, 7, 8, 9, 4, 5, 6]] * 4, "token_type_ids": [[1] * 9] * 4})
    with pytest.raises(ValueError, match="a gene twice"):
        masked_gene_baselines(twice, twice, DataCollatorForGeneRankMLM(ranks, mlm_probability=0.5))


def test_few_training_cells_are_told(store, tokenizer, caplog):
    collator = DataCollatorForPhenotypicMLM(tokenizer)
    found = masked_gene_baselines(store, store, collator, max_train_cells=10)
    assert "10 of 59 training cells" in caplog.text
    assert found["gene_marginal_nll"] != masked_gene_baselines(store, store, collator)["gene_marginal_nll"]


# ---------------------------------------------------------------------- in the trainer


def arguments(folder, **changes) -> TrainingArguments:
    common = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**common, "per_device_eval_batch_size": 8, "logging_steps": 1, **changes})


def constant_model(tokenizer, log_p: dict[int, float]) -> GeneBertForPhenotypicMLM:
    """A model that gives every masked token the same probabilities."""
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )
    model = GeneBertForPhenotypicMLM(config)
    torch.nn.init.zeros_(model.mlm_head.decoder.weight)
    model.mlm_head.decoder.bias.data.fill_(-1e4)
    for token, value in log_p.items():
        model.mlm_head.decoder.bias.data[token] = value
    return model


def test_a_model_of_gene_frequencies_scores_b1_and_none_is_computed_twice(store, tmp_path, monkeypatch):
    tokenizer = rank_tokenizer(store.gene_ids, phenotypes={"cell_type": ["B cell", "T cell"]})
    tokens = tokenizer.encode_cells(store.__getitems__(range(30))).input_ids
    counts = np.array([(tokens == token).sum() + 1 for token in tokenizer.gene_token_ids])
    log_p = np.log(counts / counts.sum())
    model = constant_model(tokenizer, dict(zip(tokenizer.gene_token_ids.tolist(), log_p, strict=True)))
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return masked_gene_baselines(*args, **kwargs)

    monkeypatch.setattr(pretrainer, "masked_gene_baselines", counted)
    trainer = STFormerPretrainer(
        arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=0.0),
        store.select(range(30)),
        model=model,
        processing_class=tokenizer,
        eval_dataset=store.select(range(30, 60)),
        mlm_probability=0.3,
        baselines=True,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2 and len(calls) == 1
    for entry in logged:
        assert entry["eval_genes_nll"] == pytest.approx(entry["eval_b1_nll"], rel=1e-5)
        assert entry["eval_b0_nll"] == pytest.approx(np.log(40))
        assert {"eval_b2_nll", "eval_b3_nll", "eval_b3_width", "eval_genes_loss"} <= entry.keys()
        assert entry["eval_context_swap_gap"] == pytest.approx(0, abs=1e-6)
    # Chosen genes that are not masked count in the loss of the evaluation, and not here.
    assert abs(entry["eval_genes_nll"] - entry["eval_genes_loss"]) > 1e-4


def test_a_model_of_uniform_bins_scores_the_uniform_baseline(store, tokenizer, tmp_path):
    model = constant_model(tokenizer, {tokenizer.first_bin_id + i: 0.0 for i in range(tokenizer.n_bins)})
    for sets in ({"x": store.select(range(20)), "y": store.select(range(20, 60))}, store):
        trainer = STFormerPretrainer(
            arguments(tmp_path), store, model=model, processing_class=tokenizer, eval_dataset=sets, baselines=True
        )
        found = trainer.evaluate()
        for prefix in ("eval_x", "eval_y") if isinstance(sets, dict) else ("eval",):
            assert found[f"{prefix}_genes_nll"] == pytest.approx(np.log(4), rel=1e-6)
            assert found[f"{prefix}_uniform_nll"] == pytest.approx(np.log(4))
            assert {f"{prefix}_gene_marginal_nll", f"{prefix}_cell_marginal_nll"} <= found.keys()
    assert found["eval_genes_nll"] == pytest.approx(found["eval_genes_loss"], rel=1e-6)


def test_beside_a_model_of_whole_cells_the_baselines_see_the_genes_that_are_cut_off(store, tmp_path):
    tokenizer = GeneTokenizer(store.gene_ids, whole_cell=True, max_length=6, bin_edges=[0.5, 2.5])
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )
    model, settings = GeneBertForPhenotypicMLM(config), {"processing_class": tokenizer, "mlm_probability": 0.5}
    trainer = STFormerPretrainer(
        arguments(tmp_path), store, model=model, eval_dataset=store, baselines=True, **settings
    )
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5, seed=trainer.args.seed)
    found, name = trainer.evaluate(), "cell_marginal_nll"
    of_tokens, of_cells = (masked_gene_baselines(store, store, collator, whole_cells=w)[name] for w in (False, True))
    assert found[f"eval_{name}"] == pytest.approx(of_cells) and abs(of_cells - of_tokens) > 0.01


def test_the_token_ids_of_stformer_have_baselines_and_no_objectives(tmp_path):
    tokens = {"<pad>": 0, "<mask>": 1, **{f"g{i}": i + 2 for i in range(20)}}
    rng = np.random.default_rng(0)
    dataset = Dataset.from_dict({"input_ids": [np.sort(rng.permutation(20)[:12]) + 2 for _ in range(24)]})
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model, settings = BertForMaskedLM(BertConfig(vocab_size=22, **small)), {"mlm_probability": 0.5}
    trainer = STFormerPretrainer(
        arguments(tmp_path), dataset, tokens, model=model, eval_dataset=dataset, baselines=True, **settings
    )
    found = trainer.evaluate()
    collator = DataCollatorForGeneRankMLM(STFormerPreCollator(tokens), seed=trainer.args.seed, **settings)
    expected = masked_gene_baselines(dataset, dataset, collator)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert np.isfinite(found["eval_context_swap_gap"])
    with pytest.raises(ValueError, match="make the tokenizer with whole_cell=True"):
        STFormerPretrainer(arguments(tmp_path), dataset, tokens, model=model, objectives={"contrast": 1.0})


def test_baselines_need_cells_and_a_masking_collator(store, tokenizer, config, tmp_path):
    model = GeneBertForPhenotypicMLM(config)
    for cells, words in ((None, "train_dataset is None"), (iter([]), "is a stream")):
        with pytest.raises(ValueError, match=words):
            STFormerPretrainer(arguments(tmp_path), cells, model=model, processing_class=tokenizer, baselines=True)
    plain = GeneTokenizer(tokenizer.genes, bin_edges=tokenizer.bin_edges)
    collator = DataCollatorForCellClassification(plain, "cell_type")
    with pytest.raises(ValueError, match="got DataCollatorForCellClassification"):
        STFormerPretrainer(arguments(tmp_path), store, model=model, data_collator=collator, baselines=True)


_EVALUATE = """
import json, sys, torch
from transformers import TrainingArguments
from stformer_hf import CellStore, GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer, STFormerPretrainer
torch.set_num_threads(1)
store = CellStore(sys.argv[1])
tokenizer = GeneTokenizer.from_store(store, scheme="rank", medians=[1 + i / 7 for i in range(40)])
torch.manual_seed(0)
config = GeneBertConfig.from_tokenizer(
    tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
)
args = TrainingArguments(
    sys.argv[2], per_device_eval_batch_size=int(sys.argv[3]), use_cpu=True, report_to="none", disable_tqdm=True
)
trainer = STFormerPretrainer(
    args, store, model=GeneBertForPhenotypicMLM(config), processing_class=tokenizer, eval_dataset=store, baselines=True
)
found = trainer.evaluate()
with open(f"{sys.argv[2]}/{args.world_size}-{args.process_index}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_processes_report_what_one_does(store, tmp_path, monkeypatch):
    script = tmp_path / "evaluate_cells.py"
    script.write_text(_EVALUATE)
    arguments = [str(script), str(store.path), str(tmp_path), "8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # 59 cells: the last batch of two processes is filled up with cells that were there before.
    two = subprocess.Popen([*launcher, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(script))
    printed, _ = two.communicate(timeout=120)
    assert two.returncode == 0, printed.decode()
    one, *two = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]
    names = [name for name in one if name.endswith("nll") or "gap" in name]
    assert len(names) == 8
    for found in two:
        assert {name: found[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)


# ---------------------------------------------------------------------- real cells


def test_blood_cells_cost_what_was_published(shared_data, tmp_path, monkeypatch):
    store = CellStore.build(tmp_path / "store", [shared_data / "tenx" / "1K_pbmc_citeseq.h5"])
    tokenizer = GeneTokenizer.from_token_dictionary(
        shared_data / "geneformer" / "token_dictionary.pkl",
        shared_data / "geneformer" / "gene_median_dictionary.pkl",
        symbols=shared_data / "geneformer" / "gene_name_id_dict.pkl",
    )
    cells = np.random.default_rng(0).permutation(np.flatnonzero(store.lengths > 0))
    monkeypatch.setattr(gene_baselines, "WIDTHS", (0.05,))
    parts = [store.select(np.sort(part)) for part in np.split(cells, [len(cells) * 4 // 5])]
    found = masked_gene_baselines(*parts, DataCollatorForGeneRankMLM(tokenizer))
    published = {"b0_nll": 10.14, "b1_nll": 8.89, "b2_nll": 8.54, "b3_nll": 7.45}
    assert {name: found[name] for name in published} == pytest.approx(published, abs=0.1)
