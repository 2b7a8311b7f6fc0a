"""A run in a process: python train_cells.py STORE FOLDER SETTINGS; writes what it saw to FOLDER/seen-RANK.json."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import TrainingArguments

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodForMaskedCell,
    CellStore,
    CellTrainer,
    CenterMaskSampler,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    NeighborhoodTrainer,
    STFormerPretrainer,
)
from stformer_hf.evaluation.metrics import compute_column_metrics
from stformer_hf.models.gene_bert.heads import fields_of_columns

LABELS = {"cell_type": slice(0, 2), "level": slice(2, 5)}  # label columns, and their outputs
ORDERS = {
    "random": ({}, {}),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, {}),
    "packed": ({}, {"max_tokens_per_batch": 200, "packing": True}),
    "balanced": ({"train_sampling_strategy": "group_by_length"}, {"sampling": {"by": "cell_type"}}),
    "stream": ({}, {}),
    "neighborhoods": ({}, {}),
    "labels": ({}, {}),
    "labels stream": ({}, {}),
    "objectives": (
        {},
        {
            "objectives": {"mlm": 1.0, "contrast": 0.5, "decode": 0.3, "cross_correlation": 0.2},
            "batch_key": "cell_type",
            "ema": 0.9,
        },
    ),
    "grouped stream": ({"train_sampling_strategy": "group_by_length"}, {}),
    "packed stream": ({}, {"max_tokens_per_batch": 200, "packing": True}),
}


class CountedCells(IterableAnnDataset):
    """Counts the cells that this process reads, also before they are tokenized."""

    n_read = 0

    def _read(self, pieces):
        self.n_read += sum(stop - start for _, start, stop in pieces)
        return super()._read(pieces)


def main() -> None:
    path, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    store = CellStore(path)
    whole_cell = settings["order"] == "objectives"
    tokenizer = GeneTokenizer.from_store(
        store, phenotypes=["cell_type"], bin_edges=[0.5, 1.5, 3.5], whole_cell=whole_cell
    )
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": settings.get("hidden_size", 16),
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    }
    config = GeneBertConfig.from_tokenizer(tokenizer, **sizes)
    sampling, own = ORDERS[settings["order"]]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=settings["epochs"],
        max_steps=settings.get("steps", -1),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps" if settings.get("save") else "no",
        save_steps=1,
        save_total_limit=settings.get("keep", 2),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        per_device_eval_batch_size=4,
        **sampling,
        **settings.get("arguments", {}),
    )
    if settings["order"] == "neighborhoods":
        trainer = NeighborhoodTrainer(arguments, neighborhoods(store), model=model_of_neighborhoods(store))
        evaluated = trainer.evaluate(trainer.train_dataset.select(range(21)))  # the last batches are filled up
        trainer.train()
        return write(folder, arguments, [], trainer, evaluated)
    if settings["order"].startswith("labels"):
        stream = stream_of(store, settings, arguments, obs=list(LABELS)) if "stream" in settings["order"] else None
        trainer = trainer_of_labels(store, sizes, arguments, stream)
        trainer.train(resume_from_checkpoint=checkpoint_of(settings, folder))
        return write(folder, arguments, [], trainer, trainer.evaluate(store.select(np.arange(len(store))[30:51])))
    stream = settings["order"].endswith("stream")
    cells = stream_of(store, settings, arguments, tokenizer) if stream else store
    trainer = STFormerPretrainer(
        arguments, cells, model=GeneBertForPhenotypicMLM(config), processing_class=tokenizer, **own
    )
    evaluated = trainer.evaluate(store.select(store.lengths > 0)) if settings.get("evaluate") else {}
    batches, collator = [], trainer.data_collator
    collator = collator.collator if whole_cell else collator
    read = collator._tokens

    def watch(examples):
        tokens, cell_ids = read(examples)
        if (cell_ids >= 0).all():  # else second views
            batches.append(cell_ids.tolist())
        return tokens, cell_ids

    collator._tokens = watch
    trainer.train(resume_from_checkpoint=checkpoint_of(settings, folder))
    write(folder, arguments, batches, trainer, evaluated)


def stream_of(store: CellStore, settings: dict, arguments: TrainingArguments, tokenizer=None, **others):
    tokenizer = tokenizer or GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 3.5])
    if settings.get("split"):
        others |= {"rank": arguments.process_index, "world_size": arguments.world_size}
    return CountedCells(store, tokenizer, shuffle=True, buffer_size=16, **others)


def checkpoint_of(settings: dict, folder: Path) -> str | bool:
    """Return the checkpoint of a step that is asked for; else whether to resume from the last one."""
    return str(folder / f"checkpoint-{settings['resume']}") if "resume" in settings else bool(settings.get("save"))


def trainer_of_labels(store: CellStore, sizes: dict, arguments: TrainingArguments, stream) -> CellTrainer:
    """Make the trainer of a classifier with two label columns, of which a cell may have one or none."""
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 3.5])
    fields = fields_of_columns({name: store.categories[name] for name in LABELS})
    model = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, **sizes, **fields))
    return CellTrainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForCellClassification(tokenizer, list(LABELS)),
        train_dataset=store if stream is None else stream,
        processing_class=tokenizer,
        compute_metrics=compute_column_metrics(LABELS),
    )


def neighborhoods(store: CellStore) -> CenterMaskSampler:
    places = np.random.default_rng(0).random((len(store), 2))
    metadata = pd.DataFrame(places, columns=["x", "y"]).assign(cell_label=store.obs.index)
    metadata["cell_type"] = store.obs["cell_type"].cat.codes.to_numpy()
    return CenterMaskSampler(metadata, store, 0.4, tissue_section_colname=None, max_num_cells=3)


def model_of_neighborhoods(store: CellStore) -> CellNeighborhoodForMaskedCell:
    torch.manual_seed(0)
    config = CellNeighborhoodConfig.from_size("tiny", n_genes=len(store.genes), n_cell_types=2)
    return CellNeighborhoodForMaskedCell(config)


def write(folder: Path, arguments: TrainingArguments, batches: list, trainer: CellTrainer, evaluated: dict) -> None:
    weights = hashlib.sha256()
    for values in trainer.accelerator.unwrap_model(trainer.model).state_dict().values():
        weights.update(values.numpy().tobytes())
    seen = {
        "evaluated": evaluated,
        "world_size": arguments.world_size,
        "batches": batches,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "n_read": getattr(trainer.train_dataset, "n_read", None),
        "weights": weights.hexdigest(),
    }
    (folder / f"seen-{arguments.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
