"""A classifier of cells that is ready to train, and its trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..batches.collators import DataCollatorForCellClassification
from ..batches.parts import as_selection
from ..genes.wrong_names import must_have
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..store.cell_store import CellStore
from .adapting import adapt, layer_rates
from .calibration import OutOfFold
from .cell_heads import read_heads
from .cell_trainer import CellTrainer
from .loading import unwrap
from .starts.cell_features import run_cells
from .starts.classifier_start import ClassifierStart

logger = logging.getLogger(__name__)


@dataclass
class Finetuning:
    """A classifier that is ready to train.

    Attributes
    ----------
    model : PreTrainedModel
        Initialised, with its tokenizer at `model.tokenizer`.
    cells : CellStore
        Training cells, with counts and labels.
    num_train_epochs : float
        As chosen, or as given.
    start : dict of str to ClassifierStart, optional
        Start of a model that reads whole cells, by label column (None if there are not several).
    new_embedding, balanced, twins
        As for `start_classifier`.
    label_key, lora, freeze, layer_decay, sampling
        As for `finetune`.
    out_of_fold : OutOfFold, or dict of str to OutOfFold, optional
        Predictions of training cells by models trained as this one will be; by label column if there are several. None
        if there are none: it does not start at linear models, or the number of epochs was passed.
    temperature : float or list of float, optional
        Temperature of the trained model, as in its configuration; that of the start by default.
    facts : dict
        Settings for the model card.
    """

    model: PreTrainedModel
    tokenizer: GeneTokenizer
    cells: CellStore
    label_key: str | list[str]
    num_train_epochs: float
    start: dict[str | None, ClassifierStart] | None = None
    new_embedding: bool = True
    balanced: bool = False
    twins: np.ndarray | None = None
    lora: int | None = None
    freeze: int = 0
    layer_decay: float = 1.0
    sampling: Mapping[str, Any] | None = None
    out_of_fold: OutOfFold | dict[str, OutOfFold] | None = None
    temperature: float | list[float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def known(self, cells: CellStore) -> CellStore:
        """Select the cells that have a number, or labels that the model knows; the number left out is logged."""
        for name in [self.label_key] if isinstance(self.label_key, str) else self.label_key:
            must_have(cells.obs, "obs", name, " (held-out cells)")
        heads, unknown = read_heads(unwrap(self.model)), []
        names = [head.column or self.label_key for head in heads]
        if all(isinstance(name, str) and name in cells.categories for name in names):
            labels = [cells.obs[name] for name in names]
            knows = [of.isin(head.names).to_numpy() for head, of in zip(heads, labels, strict=True)]
            others = [~is_known & of.notna().to_numpy() for is_known, of in zip(knows, labels, strict=True)]
            known = np.any(knows, axis=0) & ~np.any(others, axis=0)
            unknown = [name for of, other in zip(labels, others, strict=True) for name in of[other].unique()]
        elif getattr(unwrap(self.model).config, "label_columns", None):
            numeric = next(name for name in names if name not in cells.categories)
            raise ValueError(
                f"{numeric!r} of the held-out cells is not categorical, but the model predicts classes of it. Build "
                f"the store with classes=[{numeric!r}], or make it categorical, adata.obs[key].astype('category')."
            )
        else:
            numbers = cells.obs[self.label_key].to_numpy(np.float32)
            known = np.isfinite(numbers.reshape(len(cells), -1)).all(axis=1)
        if known.all():
            return cells
        logger.warning(
            f"{(~known).sum()} of {len(cells)} held-out cells are not evaluated: they have no {self.label_key!r}, or "
            f"a value that no training cell has ({', '.join(map(str, unknown[:10])) or 'none here'})."
        )
        return cells.select(known)

    def trainer(
        self,
        arguments: TrainingArguments,
        eval_cells: CellStore | None = None,
        *,
        gene_dropout: float = 0.0,
        packing: bool = False,
        **kwargs: Any,
    ) -> CellTrainer:
        """Make the trainer; `kwargs` are those of `CellTrainer`."""
        arguments.num_train_epochs = self.num_train_epochs
        self.model = adapt(self.model, self.lora, self.freeze)
        if self.temperature is not None:
            kwargs["callbacks"] = [*kwargs.get("callbacks", []), SetTemperature(self.temperature)]
        if self.layer_decay != 1:
            kwargs["optimizer_cls_and_kwargs"] = layer_rates(self.model, arguments, self.layer_decay)
        trainer = CellTrainer(
            model=self.model,
            args=arguments,
            data_collator=DataCollatorForCellClassification(
                self.tokenizer, self.label_key, seed=arguments.seed, gene_dropout=gene_dropout, packing=packing
            ),
            train_dataset=self.cells,
            eval_dataset=None if eval_cells is None else self.known(as_selection(eval_cells)),
            processing_class=self.tokenizer,
            sampling=self.sampling,
            **kwargs,
        )
        trainer.out_of_fold = self.out_of_fold
        trainer.card_facts["settings"] = self.facts
        return trainer

    def save_choice(self, trainer: CellTrainer) -> None:
        """Write what was chosen, and why, to `fine_tuning.json` in the output folder of its trainer."""
        if trainer.is_world_process_zero():
            folder = Path(str(trainer.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            chosen = {**self.facts, "num_train_epochs": self.num_train_epochs}
            (folder / "fine_tuning.json").write_text(json.dumps(chosen, indent=1), encoding="utf-8")


class SetTemperature(TrainerCallback):
    """Set the temperature of a model when its training ends."""

    def __init__(self, temperature: float | list[float]):
        self.temperature = temperature

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """Set it."""
        unwrap(model).config.temperature = self.temperature


def predict(model: PreTrainedModel, tokenizer: GeneTokenizer, cells: CellStore) -> np.ndarray:
    """Compute the logits of cells: float64 array (n, num_labels), in the order of the cells.

    For several label columns, those of a column are its `CellHead.outputs`; see `read_heads`.
    """
    return run_cells(model, tokenizer, cells, lambda batch: model(**batch).logits, 128)
