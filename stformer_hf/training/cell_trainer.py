"""`transformers.Trainer` for cells, with an order of batches that no number of processes and no resumption changes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import BestRun, seed_worker

from ..batches.collate import CellCollator
from ..batches.draws import WeightedDraw
from ..batches.empty_cells import sampling_of_full_cells, without_empty_cells
from ..batches.length_sampler import EvenBatchSampler, LengthGroupedSampler, known_lengths
from ..batches.lengths import load_example_lengths
from ..batches.parts import as_selection, as_token_rows, bases, gather
from ..batches.repeats import NumberedRepeats, RepeatedRows
from ..batches.samplers import BlockShuffleSampler, RowSampler
from ..batches.stream_batches import StreamBatches, StreamOrder, only, part_of
from ..batches.token_budget import TokenBudgetBatchSampler
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.remote_code import is_a
from ..store.block_order import ORDER
from ..store.cell_store import CellStore
from .argument_checks import check_arguments
from .callbacks import SetEpoch
from .cell_checksum import describe_cells
from .identity import check_stores_together, check_tokenizers, check_tokens, fit_classes, fit_datasets
from .label_fit import fit_head_to_labels
from .model_card import write_model_card
from .resumable_trainer import ResumableTrainer
from .scores import score_of
from .streams import read_stream

logger = logging.getLogger(__name__)
_MORE_CELLS = 1.5  # in a batch of one size, than fit on average


class CellTrainer(ResumableTrainer):
    """Trainer for stores of cells and the collators of this package.

    It differs from Trainer as follows:

    - The order of the cells is a function of (seed, epoch), whatever the number of processes. Each cell is seen once
      per epoch, unless `sampling` says otherwise. Cells without counts are left out.
    - The collator gets all columns, and the number of the epoch.
    - Evaluation and prediction keep the order of the dataset and use the collator's `for_evaluation()`, so that losses
      are comparable. The evaluation loss is the mean over all labels, whatever the size of the batches.
    - `resume_from_checkpoint=True` resumes from the last complete checkpoint.
    - SIGTERM and Ctrl-C save a checkpoint after the current step and end `train`, with the signal in
      `trainer.interrupted`; a second Ctrl-C interrupts at once.
    - Half-precision weights are trained in float32.
    - For masked models, `<class>_loss` and `<class>_accuracy` are logged for each class of tokens (genes, and each
      phenotype category): mean cross entropy in nats, without smoothing and weights, and share of correct predictions.

    Parameters
    ----------
    train_dataset, eval_dataset : CellStore, datasets.Dataset, IterableAnnDataset, or another dataset
        Cells; or tokenized cells, rows with `input_ids` and `token_type_ids` (and preferably `cell_id`); or a Subset
        (`random_split`) or ConcatDataset of these, whose stores have the same genes. Masks depend on the row of a cell
        in its store, so cells with the same row in two stores get the same masks.

        Each process reads all cells of a stream and trains on its part, so that a step has the same cells on any
        number of processes; if it is split (`rank=args.process_index`, `world_size=args.world_size`), each process
        reads only its part. On resumption, it continues where the checkpoint stopped. A stream with an unknown number
        of batches needs `max_steps`, and its epochs differ from those in the log (as they do if cells without counts
        are left out).
    lengths : sequence of int, or path of a .json or .pkl, optional
        Number of tokens of each training row, for `train_sampling_strategy="group_by_length"` and
        `max_tokens_per_batch`; not needed for a store, or a dataset with a column `length`.
    max_tokens_per_batch : int, optional
        Fill batches up to this many tokens, padding included, instead of a number of cells
        (`per_device_train_batch_size`). With packing and `args.torch_compile`, batches have at most 1.5 times as many
        cells as fit on average, and are filled up to one size, so that the model is compiled once. For a stream, or
        without `torch_compile`, pass a collator with `pad_packed_to` to do so.
    sampling : mapping, optional
        Which cells an epoch reads, with any order of batches: the arguments of `WeightedDraw.from_dataset`, `by` (a
        column of obs), `temperature`, `shares`, `weights`, `n_draws` and `replacement`. For example
        {"by": "cell_type"} for balanced types, {"by": "batch", "temperature": 2}, or {"shares": {"a": 0.7, "b": 0.3}}
        for the stores of a ConcatDataset. A cell that is drawn several times in an epoch is masked anew each time, if
        it has a `cell_id`. Not for a stream.
    model, args, data_collator, **kwargs
        All other arguments of Trainer, in its order.

    Raises
    ------
    ValueError
        The tokenizer (`processing_class`) does not fit the model; batches are packed, but the model cannot keep cells
        apart, or one process uses multiple GPUs; the lengths or `sampling` do not fit the dataset; the labels do not
        fit the head of a classifier; a store is passed without a collator.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        lengths: Any = None,
        max_tokens_per_batch: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: without_empty_cells(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = without_empty_cells(eval_dataset)
        self._train_batches: EvenBatchSampler | TokenBudgetBatchSampler | NumberedRepeats | None = None
        self._stream: StreamBatches | None = None
        self._lengths = load_example_lengths(lengths) if isinstance(lengths, (str, Path)) else lengths
        self.max_tokens_per_batch = max_tokens_per_batch
        self.sampling = sampling_of_full_cells(sampling, train_dataset)
        self._drawn: tuple[Any, WeightedDraw] | None = None  # the dataset, and the draw of its rows
        if isinstance(model, torch.nn.DataParallel):
            model = model.module  # which is checked; Trainer wraps it itself for several GPUs
        if data_collator is None and isinstance(as_selection(train_dataset), CellStore):
            raise ValueError(
                "A store needs a data_collator: DataCollatorForPhenotypicMLM, DataCollatorForGeneRankMLM or "
                "DataCollatorForCellClassification, with the tokenizer."
            )
        super().__init__(model, args, data_collator, without_empty_cells(train_dataset), eval_dataset, **kwargs)
        self.data_collator = self._check_identities(self.model)
        collator = self.data_collator
        self._eval_collator = collator.for_evaluation() if hasattr(collator, "for_evaluation") else collator
        check_arguments(self)
        self._draw(self.train_dataset)  # refused here if it does not fit
        self.card_facts: dict[str, Any] = {}
        self.add_callback(SetEpoch(self))
        if hasattr(collator, "set_epoch"):
            collator.set_epoch(0)  # for batches that are read before training

    def _check_identities(self, model: Any) -> Any:
        """Check that model, tokenizer, collator and datasets agree, and copy what one of them lacks from the others.

        Return the collator, with the model's numbers of the classes. A ValueError says which of them disagree.
        """
        collator, (train, *others) = self.data_collator, self._own_datasets()
        check_tokenizers(model, self.processing_class, collator)
        fit_datasets(model, train, others)
        self._check_dataset(train, model, collator)
        collator = fit_classes(model, collator, train)  # first, so that the others are compared with its names
        for dataset in others:
            self._check_dataset(dataset, model, collator)
        return collator

    def _own_datasets(self) -> list[Any]:
        """Return the training cells, and those of each evaluation."""
        others = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [self.train_dataset, *others]

    def _check_dataset(self, dataset: Any, model: Any, collator: Any) -> None:
        """Check that the tokens, the stores and the labels of a dataset fit the model."""
        if dataset is None:
            return
        check_tokens(dataset, model, getattr(collator, "tokenizer", None) or self.processing_class)
        check_stores_together(dataset)
        of_training = dataset is self.train_dataset
        fit_head_to_labels(model, collator, dataset, all_read=not (of_training and self.sampling))

    def create_accelerator_and_postprocess(self) -> None:
        """Create it as Trainer does, without DDP's search for unused parameters if there are none."""
        super().create_accelerator_and_postprocess()
        if self.args.ddp_find_unused_parameters is None and self._uses_every_parameter():
            self.accelerator.ddp_handler.find_unused_parameters = False

    def _uses_every_parameter(self) -> bool:
        """Whether every loss depends on every parameter of the model; False if it is not known."""
        config = getattr(self.model, "config", None)
        return config is not None and getattr(config, "model_type", None) == "gene_bert" and not config.cell_decoder

    # ------------------------------------------------------------------ batches

    @property
    def _token_budget(self) -> int | None:
        """`max_tokens_per_batch`, lowered in proportion when `auto_find_batch_size` lowers the batch size."""
        if self.max_tokens_per_batch is None:
            return None
        return self.max_tokens_per_batch * self._train_batch_size // self.args.train_batch_size

    @property
    def seed_of_order(self) -> int:
        """Seed of the order of the cells: `args.data_seed`, or else `args.seed`."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _is_packed(self) -> bool:
        return getattr(self.data_collator, "packing", False)

    def get_train_sampler(self) -> Sampler | None:
        """Return the sampler of the training rows.

        Returns
        -------
        TokenBudgetBatchSampler, LengthGroupedSampler, BlockShuffleSampler, RowSampler or None
            Batches of rows with `max_tokens_per_batch`; else rows, grouped by length if `train_sampling_strategy` is
            "group_by_length", or shuffled if it is "random" (a RowSampler with `sampling`). None for a stream.
        """
        dataset = self.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            return None
        args, seed, draw = self.args, self.seed_of_order, self._draw(dataset)
        budget = self._token_budget
        if budget is not None:
            lengths = self._n_tokens(dataset)
            return TokenBudgetBatchSampler(
                lengths,
                budget,
                packing=self._is_packed(),
                max_cells=self._fix_size(lengths),
                seed=seed,
                world_size=args.world_size,
                drop_last=args.dataloader_drop_last,
                draw=draw,
            )
        if args.train_sampling_strategy == "group_by_length":
            in_a_step = self._train_batch_size * args.world_size * args.gradient_accumulation_steps
            return LengthGroupedSampler(self._n_tokens(dataset), in_a_step, seed=seed, draw=draw)
        if args.train_sampling_strategy == "sequential":
            return SequentialSampler(dataset)
        return BlockShuffleSampler(dataset, 1, seed) if draw is None else RowSampler(draw, seed)

    @property
    def _has_fixed_size(self) -> bool:
        """Whether all packed batches are filled up to one size, so that the model is compiled once."""
        collator = self.data_collator
        if not isinstance(collator, CellCollator) or not collator.packing or self.max_tokens_per_batch is None:
            return False
        return collator.pad_packed_to is not None or (
            self.args.torch_compile and not isinstance(self.train_dataset, IterableDataset)
        )

    def _fix_size(self, lengths: np.ndarray) -> int | None:
        """Set the size of the collator's packed batches; return their maximum number of cells, None for any."""
        budget = self._token_budget
        if budget is None or not self._has_fixed_size:
            return None
        n_cells = math.ceil(_MORE_CELLS * budget / np.maximum(lengths, 1).mean())
        self.data_collator.pad_packed_to = budget, n_cells
        return n_cells

    def _draw(self, dataset: Any) -> WeightedDraw | None:
        """Return the draw of `sampling` from the training rows; None without it."""
        if self.sampling is None or dataset is None:
            return None
        if self._drawn is None or self._drawn[0] is not dataset:
            self._drawn = dataset, WeightedDraw.from_dataset(dataset, **self.sampling)
        return self._drawn[1]

    def _n_tokens(self, dataset: Any) -> np.ndarray:
        """Return the number of tokens of each row: int array (n_rows,); an upper bound for the cells of a store."""
        if self._lengths is None:
            return gather(dataset, self._n_tokens_of)
        lengths = known_lengths(self._lengths, self.args.length_column_name)
        if len(lengths) != len(dataset):
            raise ValueError(f"{len(lengths)} lengths for {len(dataset)} rows: recompute them for this dataset.")
        return lengths

    def _n_tokens_of(self, dataset: Any) -> np.ndarray:
        tokenizer = self.processing_class
        if not isinstance(dataset, CellStore) or not is_a(tokenizer, GeneTokenizer):
            return known_lengths(dataset, self.args.length_column_name)
        if tokenizer.neighborhood:
            return np.full(len(dataset), tokenizer.max_length)
        others = tokenizer.add_cls + tokenizer.add_eos + len(tokenizer.included_phenotypes)
        return np.minimum(dataset.lengths + others, tokenizer.max_length)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Sampler] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        if is_training:
            return self._get_training_batches(dataset, batch_size)
        if not any(dataset is own for own in self._own_datasets()):  # evaluate and predict accept any dataset
            model = self.accelerator.unwrap_model(self.model)
            self._check_dataset(dataset, model, self._eval_collator)
            fit_datasets(model, None, [dataset])
        if isinstance(dataset, IterableDataset) and self.args.world_size > 1:
            raise ValueError(
                f"{type(dataset).__name__}: multiple processes cannot evaluate on a stream, because some cells would "
                "count twice. Evaluate on a CellStore or a datasets.Dataset."
            )
        args, collator = self.args, self._eval_collator
        dataset = as_token_rows(dataset) if isinstance(collator, CellCollator) else as_selection(dataset)
        # Every cell is evaluated, in order, and gets a prediction; the collator takes what it needs, such as cell_id.
        settings: dict[str, Any] = {"dataloader_drop_last": False, "remove_unused_columns": False}
        settings["train_sampling_strategy"] = "sequential"
        own = {name: getattr(args, name) for name in settings}
        args.__dict__.update(settings)
        self.data_collator, collator = collator, self.data_collator
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, False, dataloader_key)
        finally:
            args.__dict__.update(own)
            self.data_collator = collator

    def _get_training_batches(self, dataset: Any, batch_size: int) -> DataLoader:
        args, collator, n_workers = self.args, self.data_collator, self.args.dataloader_num_workers
        sampler: Any
        if isinstance(collator, CellCollator):
            dataset = as_token_rows(dataset)
        if isinstance(dataset, IterableDataset):
            if n_workers > 1:
                logger.warning(
                    f"dataloader_num_workers={n_workers} is lowered to 1: each worker would read the whole stream."
                )
                n_workers = 1
            self._stream, sampler = read_stream(
                dataset,
                args,
                batch_size,
                collator,
                max_tokens_per_batch=self._token_budget,
                packing=self._is_packed(),
                max_cells=collator.pad_packed_to[1] if self._has_fixed_size else None,
                seed=self.seed_of_order,
                tokenizer=self.processing_class,
                mark=self._stream_mark,
            )
            dataset, collator = self._stream, only
        else:
            sampler = self.get_train_sampler()
        if not isinstance(sampler, (StreamOrder, TokenBudgetBatchSampler)):
            # accelerate's own sampler would fill the last batches with rows of earlier ones.
            sampler = EvenBatchSampler(
                sampler, batch_size, world_size=args.world_size, drop_last=args.dataloader_drop_last
            )
        draw = self._draw(self.train_dataset)
        if draw is not None:
            dataset, sampler = RepeatedRows(dataset, len(draw)), NumberedRepeats(sampler, len(dataset))
        self._train_batches = sampler
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=n_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=n_workers, rank=args.process_index),
            # A generator of its own: new workers draw from torch's, which dropout depends on, persistent ones do not.
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare inputs as Trainer does; counts keep their dtype even if DeepSpeed casts to half precision."""
        names = ("masked_expression", "observed_expression", "observed_values", "cell_counts")
        counts = {name: inputs[name] for name in names if name in inputs}
        if not counts:
            return super()._prepare_inputs(inputs)
        others = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in counts})
        return {**{name: value.to(self.args.device) for name, value in counts.items()}, **others}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Draw batches as Trainer does, and record where in a stream the next batch begins."""
        for batch in (drawn := super().get_batch_samples(epoch_iterator, num_batches, device))[0]:
            mark = batch.pop("stream_mark", None)
            self._stream_mark = self._stream_mark if mark is None else json.loads(mark)
        return drawn

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, the collator and the datasets (called by Trainer's loop)."""
        datasets = [base for base in bases(self.train_dataset) if not isinstance(base, IterableDataset)]
        for part in (self._train_batches, self.data_collator, *datasets):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self._stream is not None:
            self._stream.mark = self._stream_mark  # for a worker that starts now

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Make the model of a trial as Trainer does, and check it as the first one."""
        model = super().call_model_init(trial)
        if getattr(self, "_eval_collator", None) is not None:  # not yet set when the trainer is made
            self._check_identities(model)
        if getattr(self, "is_in_train", False):
            self._prepare_weights(model)
        return model

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search hyperparameters as Trainer does; the default objective is `args.metric_for_best_model`, or the loss.

        Trainer's own default is the sum of all metrics, losses and accuracies alike. The default direction follows
        from `args.greater_is_better`.

        Raises
        ------
        ValueError
            `direction` contradicts `args.greater_is_better`; during the search: the evaluation does not compute the
            metric.
        """
        if compute_objective is None:
            metric = self.args.metric_for_best_model or "loss"
            best = "maximize" if self.args.greater_is_better else "minimize"
            if direction not in (None, best):
                raise ValueError(
                    f"direction={direction!r}, and args.greater_is_better={self.args.greater_is_better} of "
                    f"{metric!r} means {best!r}: leave direction out, or pass compute_objective."
                )
            metric = metric if metric.startswith("eval_") else f"eval_{metric}"
            compute_objective, direction = partial(score_of, metric=metric), best
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", *args, **kwargs
        )

    # ------------------------------------------------------------------ the run

    def _order(self) -> dict[str, Any]:
        """Return the arguments that decide which cells are in each step."""
        args, by_cells = self.args, self.max_tokens_per_batch is None
        draw, sampling = self._draw(self.train_dataset), None
        if draw is not None:
            how = "with" if draw.replacement else "without"
            weights = draw.settings()["weights"]
            sampling = f"{len(draw)} draws {how} replacement (checksum of the weights {weights})"
        strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
        order: dict[str, Any] = {
            "seed": self.seed_of_order,
            "train_sampling_strategy": strategy,
            "max_tokens_per_batch": self._token_budget,
            # Their number of cells is limited; absent from the checkpoints of earlier versions.
            "filled up to one size": self._has_fixed_size or None,
            "sampling": sampling,
            "parts of the stream": None if (n_parts := part_of(self.train_dataset)[1]) == 1 else n_parts,
        }
        if self._cells is not None:
            order["train_dataset"] = self._cells
        if by_cells and strategy == "random":
            # Checkpoints of earlier versions have the rows in another random order.
            order["random order"] = ORDER if isinstance(self.get_train_sampler(), BlockShuffleSampler) else None
        name, size = "gradient_accumulation_steps * processes", args.gradient_accumulation_steps * args.world_size
        if by_cells:
            name, size = f"per_device_train_batch_size * {name}", self._train_batch_size * size
        return {**order, name: size}

    @cached_property
    def _cells(self) -> str | None:
        """Checksum of the training cells; None if they have none."""
        return describe_cells(self.train_dataset)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        *,
        dataset_tags: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Write this package's card (`write_model_card`) into `output_dir`; an edited card is kept.

        Parameters
        ----------
        language, license, tags, finetuned_from, dataset_tags
            As in Trainer; they override `language`, `license`, `tags`, `base_model` and `datasets` of `card_facts`.
            All others that Trainer passes are ignored: the card takes the name and the task from the model.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "base_model": finetuned_from,
            "datasets": dataset_tags,
        }
        model = self.accelerator.unwrap_model(self.model)
        facts = {
            "store": self.train_dataset if isinstance(self.train_dataset, CellStore) else None,
            "name": self.hub_model_id or self.args.hub_model_id,
            "base_model": getattr(model.config, "_name_or_path", None) or None,
            **self.card_facts,
            **{name: value for name, value in given.items() if value},
        }
        write_model_card(self.args.output_dir, model=model, tokenizer=self.processing_class, trainer=self, **facts)
