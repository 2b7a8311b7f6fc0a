"""Model cards: facts collected by the program, rendered by a template; nothing is typed by hand."""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..data.cell_store import CellStore
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer


def write_model_card(
    folder: str | Path,
    *,
    model,
    tokenizer: GeneTokenizer,
    store: CellStore,
    settings: dict[str, Any],
    metrics: dict[str, float],
    base_model: str | None = None,
) -> Path:
    """Write `README.md` of a checkpoint.

    Parameters
    ----------
    folder : str or Path
        The checkpoint.
    model : PreTrainedModel
        What is in it.
    tokenizer : GeneTokenizer
        Its tokenizer.
    store : CellStore
        The cells that it was trained on.
    settings : dict
        How it was trained.
    metrics : dict
        What came of it.
    base_model : str, optional
        The checkpoint that training began from.

    Returns
    -------
    Path
        The card.
    """
    import jinja2

    template = files("stformer_hf.training").joinpath("model_card_template.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    config = model.config
    card = environment.from_string(template).render(
        name=Path(folder).resolve().name,
        model_class=type(model).__name__,
        auto_class=type(model)._auto_class,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        config=config,
        classes=list(config.id2label.values()) if "Classification" in type(model).__name__ else [],
        tokenizer=tokenizer,
        manifest=store.manifest,
        settings=settings,
        metrics=metrics,
        base_model=base_model,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("stformer_hf", "transformers", "torch", "datasets")},
        },
    )
    path = Path(folder) / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


__all__ = ["write_model_card"]
