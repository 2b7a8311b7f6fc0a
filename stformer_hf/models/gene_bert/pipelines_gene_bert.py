"""Pipelines of transformers that read the cells of an AnnData: cell-embedding and cell-classification."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pipelines import Pipeline

from .heads import default_pooling, label_columns_of, output_names, pool, problem_of
from .tokenized_cells import TokenizedCells, take

_BATCH_SIZE = 64

_Parameters = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # of preprocess, _forward and postprocess


class _CellPipeline(Pipeline):
    """Tokenizes cells, and passes them to the model in batches of similar length."""

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False
    _reads_phenotypes = False

    def __call__(
        self, cells: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """Read cells, or each AnnData of a list: see the class. Workers are not used, as tokenizing is fast."""
        size = batch_size or self._batch_size or _BATCH_SIZE
        # Each AnnData is a batch of transformers, which would pad several to one length.
        return super().__call__(cells, batch_size=1, num_workers=0, cells_per_batch=size, **kwargs)

    def _sanitize_parameters(self, **of_cells: Any) -> _Parameters:
        wrong = set(of_cells) - {"cells_per_batch", "layer", "fractional"}
        if wrong:
            raise TypeError(f"The pipeline has no option {', '.join(sorted(wrong))}.")
        return of_cells, {}, {}

    def preprocess(
        self, cells: Any, cells_per_batch: int = _BATCH_SIZE, layer: str | None = None, fractional: bool = False
    ) -> dict[str, Any]:
        """Tokenize all cells, and return their batches and the number of genes of each cell."""
        tokens = self.tokenizer.encode_cells(
            cells, layer=layer, fractional=fractional, for_inference=not self._reads_phenotypes
        )
        of_genes = self.tokenizer.get_gene_tokens_mask(tokens.input_ids)
        n_genes = np.diff(np.concatenate([[0], np.cumsum(of_genes)])[tokens.indptr])
        return {"n_genes": n_genes, "batches": self._batches(tokens, cells_per_batch)}

    def _batches(self, tokens: TokenizedCells, size: int) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        order = np.argsort(-np.diff(tokens.indptr), kind="stable")
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            padded = self.tokenizer.pad_tokens(take(tokens, rows))
            yield rows, {name: torch.from_numpy(array) for name, array in padded.items()}

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        results: torch.Tensor | None = None
        n_genes = model_inputs["n_genes"]
        for rows, batch in model_inputs["batches"]:
            found = self._read({name: of.to(self.device) for name, of in batch.items()}, **options).float().cpu()
            if results is None:
                results = found.new_empty(len(n_genes), found.shape[1])
            results[rows] = found
        if results is None:
            raise ValueError("There are no cells.")
        return {"results": results, "n_genes": n_genes}

    @abstractmethod
    def _read(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the results of a batch of n cells, Tensor (n, d)."""


class CellEmbeddingPipeline(_CellPipeline):
    """Embed cells: `pipeline("cell-embedding", model=…)(adata)` returns float32 (n_cells, hidden_size).

    The pooling is that of the checkpoint (see `GeneBertConfig.pooling`), or `pooling="cls"` or `"mean"`. Phenotypes
    are masked. `layer`, `fractional` and `batch_size` (64) are those of the tokenizer, and cells per batch.
    """

    def _sanitize_parameters(self, pooling: str | None = None, **of_cells: Any) -> _Parameters:
        return super()._sanitize_parameters(**of_cells)[0], {} if pooling is None else {"pooling": pooling}, {}

    def _read(self, batch: dict[str, torch.Tensor], pooling: str | None = None) -> torch.Tensor:
        encoder = getattr(self.model, self.model.base_model_prefix, self.model)
        hidden = encoder(**batch).last_hidden_state  # type: ignore[misc]
        pooling = pooling or default_pooling(self.model.config)
        return pool(hidden, batch["token_type_ids"], batch["attention_mask"], pooling)

    def postprocess(self, model_outputs: dict[str, Any]) -> np.ndarray:
        """Return the embedding of all cells, in their order."""
        return model_outputs["results"].numpy()


class CellClassificationPipeline(_CellPipeline):
    """Classify cells: `pipeline("cell-classification", model=…)(adata)` returns a list with one dict per cell.

    Each dict has the `label`, the most probable class, and its `score`; they are None and NaN for a cell without a
    gene that the model knows. With `top_k`, there is a list of that many classes per cell instead; for several labels
    per cell, and for numbers, always a list of all outputs. For several label columns, there is one dict per cell with
    the results of each column. Phenotypes are read if the model was trained with them.

    Raises a ValueError for a PEFT adapter, which transformers loads without the names and readers of its classes, and
    for classes without names, which a head has that was not trained.
    """

    _reads_phenotypes = True

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        names = [str(name) for name in model.config.id2label.values()]
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "transformers loads a PEFT adapter without the names of its classes: pass the folder to annotate, or "
                "a model and tokenizer from load_model and load_tokenizer of stformer_hf.training.loading."
            )
        if problem_of(model.config) != "regression" and names == [f"LABEL_{i}" for i in range(len(names))]:
            raise ValueError(
                f"The outputs of {type(model).__name__} have no names, but {', '.join(names[:3])}, as those of a head "
                "that was not trained: train one first (stformer-hf finetune), or name them (model.config.id2label)."
            )
        super().__init__(model, *args, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, **of_cells: Any) -> _Parameters:
        return super()._sanitize_parameters(**of_cells)[0], {}, {} if top_k is None else {"top_k": top_k}

    def _read(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, problem = self.model(**batch).logits.float(), problem_of(self.model.config)
        if problem == "regression":
            return logits
        if problem == "multi_label_classification":
            return logits.sigmoid()
        columns = label_columns_of(self.model.config)
        return torch.cat([logits[:, column.outputs].softmax(-1) for column in columns], dim=-1)

    def postprocess(self, model_outputs: dict[str, Any], top_k: int | None = None) -> list:
        """Name the outputs of all cells, in their order."""
        results, n_genes, config = model_outputs["results"].numpy(), model_outputs["n_genes"], self.model.config
        found = {
            column.name: self._named(results[:, column.outputs], output_names(config, column), n_genes, top_k)
            for column in label_columns_of(config)
        }
        if None in found:
            return found[None]
        return [dict(zip(found, of_cell, strict=True)) for of_cell in zip(*found.values(), strict=True)]

    def _named(self, results: np.ndarray, names: list[str], n_genes: np.ndarray, top_k: int | None) -> list:
        of_classes = problem_of(self.model.config) == "single_label_classification"
        found = []
        for row, n in zip(results, n_genes, strict=True):
            best = np.argsort(-row, kind="stable")[: top_k or 1] if of_classes else range(len(row))
            outputs = [{"label": names[i], "score": float(row[i])} for i in best]
            if n == 0:
                outputs = [{"label": None if of_classes else of["label"], "score": float("nan")} for of in outputs]
            found.append(outputs[0] if of_classes and top_k is None else outputs)
        return found
