"""PerturbGene's command line, run with this package.

accelerate launch -m stformer_hf.cli.parse_args \
    --bin_edges 0.1 --pretrained_model_path distilbert_base.json --max_length 1024 --num_top_genes 58604 \
    --vocab_path phenotypic_tokens_map.json --included_phenotypes cell_type tissue --output_dir model \
    --eval_data_paths cells_47.h5ad --per_device_eval_batch_size 64 \
    mlm --gene_mask_prob 0.15 --phenotype_mask_prob 0.5 --train_data_paths 'cells_{0..43}.h5ad' \
    --num_hidden_layers 12 --num_attention_heads 12 --num_train_epochs 10 --per_device_train_batch_size 32 \
    --learning_rate 1e-4 --weight_decay 5e-2 --warmup_ratio 0.1 --save_steps 8000 --eval_steps 1000
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..genes.wrong_names import closest

if TYPE_CHECKING:
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from .finetune import FinetuneArguments
    from .pretrain import PretrainArguments

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([a-zA-Z])\.\.([a-zA-Z]))(?:\.\.(-?\d+))?")


class BaseConfig(argparse.Namespace):
    """PerturbGene's arguments under their own names, checked, with braces in paths expanded.

    Attributes
    ----------
    subcommand : {"mlm", "cls"} or None
    bin_edges : list of float, or dict of gene to list of float
        Edges from `--bin_edges`, or from the file `--bin_edges_path`.
    eval_data_paths : list of str
        Paths of files.
    included_phenotypes : list of str
        Categories of the vocabulary.
    max_length, num_top_genes, vocab_path, output_dir, … :
        As given.
    """

    bin_edges: Any
    included_phenotypes: list[str]
    eval_data_paths: list[str]

    def check(self) -> None:
        """Check the arguments against each other, the vocabulary and the files, and expand the paths."""
        if (self.bin_edges is None) == (self.bin_edges_path is None):
            raise ValueError("Pass one of --bin_edges and --bin_edges_path.")
        if (self.pretrained_model_path is None) == (self.model_arch is None):
            raise ValueError("Pass one of --pretrained_model_path and --model_arch.")
        for flag in ("bin_edges_path", "vocab_path", "pretrained_model_path"):
            path = getattr(self, flag)
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"--{flag}: no such file: {path}")
        if self.bin_edges_path is not None:
            self.bin_edges = _read_json("bin_edges_path", self.bin_edges_path)
        elif min(self.bin_edges) < 0:
            raise ValueError(f"--bin_edges {min(self.bin_edges)}: edges must not be below 0, as counts never are.")
        self.included_phenotypes = self.included_phenotypes or []
        vocabulary = _read_json("vocab_path", self.vocab_path)
        for name in self.included_phenotypes:
            _check_known("--included_phenotypes", name, vocabulary, self.vocab_path)
        most = self.num_top_genes + 2 + len(self.included_phenotypes)
        if self.max_length > most:
            raise ValueError(
                f"--max_length {self.max_length}: a cell has at most {most} tokens, [CLS], [EOS], "
                f"{len(self.included_phenotypes)} phenotypes and --num_top_genes {self.num_top_genes}."
            )
        self.eval_data_paths = _files("eval_data_paths", self.eval_data_paths)


class TrainConfig(BaseConfig):
    """Arguments of `mlm` and `cls`: `train_data_paths`, the size of the model, the training, the task."""

    train_data_paths: list[str]

    def check(self) -> None:
        """See `BaseConfig.check`; no file may be used for both training and evaluation."""
        super().check()
        self.train_data_paths = _files("train_data_paths", self.train_data_paths)
        evaluated = {Path(path).resolve() for path in self.eval_data_paths}
        both = evaluated.intersection(Path(path).resolve() for path in self.train_data_paths)
        if both:
            raise ValueError(f"{sorted(both)[0]} is in both --train_data_paths and --eval_data_paths.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio}: must be a share, at least 0 and below 1.")
        if self.subcommand == "cls":
            self._check_label()
            return
        for flag in ("gene_mask_prob", "phenotype_mask_prob"):
            if not 0 <= getattr(self, flag) <= 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be a probability between 0 and 1.")

    def _check_label(self) -> None:
        vocabulary, category = _read_json("vocab_path", self.vocab_path), self.phenotype_category
        _check_known("--phenotype_category", category, vocabulary, self.vocab_path)
        if category in self.included_phenotypes:
            raise ValueError(
                f"--phenotype_category {category} is among --included_phenotypes: the model would read the answer."
            )
        if self.binary_label is not None:
            _check_known("--binary_label", self.binary_label, vocabulary[category], f"{category} of {self.vocab_path}")


def parse_args(args: list[str] | None = None) -> BaseConfig:
    """Parse PerturbGene's command line.

    Parameters
    ----------
    args : list of str, optional
        Command line; by default that of the process.

    Returns
    -------
    BaseConfig
        A `TrainConfig` for `mlm` and `cls`. `run` trains with it; `to_verb` returns the arguments of `stformer-hf
        pretrain` or `finetune`.

    Raises
    ------
    ValueError
        Arguments contradict each other or the vocabulary.
    FileNotFoundError
        A file does not exist.
    SystemExit
        Arguments are unknown or missing, or `--help` is requested.

    Notes
    -----
    PerturbGene: `configs.py` and `main.py`. Unlike there, weights at `pretrained_model_path` are loaded, not just the
    configuration; edges may differ between genes; any category of the vocabulary may be classified; a file may not be
    used for both training and evaluation. `shard_size` is not needed, since cells are counted, and attention is
    torch's own with or without `use_flash_attn`.
    """
    found = vars(_parser().parse_args(args))
    config = (TrainConfig if found["subcommand"] else BaseConfig)(**found)
    config.check()
    return config


# Flag, the commands that take it, what argparse needs to know. Those without a description are TrainingArguments.
_REQUIRED = {"required": True}
_INT, _FLOAT, _PATHS = {"type": int, **_REQUIRED}, {"type": float, **_REQUIRED}, {"nargs": "+", **_REQUIRED}
_FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bin_edges", "all", {"nargs": "+", "type": float, "help": "edges of the expression bins, for all genes"}),
    ("bin_edges_path", "all", {"help": "JSON file of genes and their edges"}),
    ("pretrained_model_path", "all", {"help": "checkpoint to start from, or JSON file of an architecture"}),
    ("model_arch", "all", {"choices": ["distilbert", "gene_bert"], "help": "a new model, of DistilBERT's size"}),
    ("shard_size", "all", {"type": int, "default": 10_000, "help": "no effect"}),
    ("eval_data_paths", "all", {**_PATHS, "help": "h5ad files, braces allowed: 'cells_{0..3}.h5ad'"}),
    ("max_length", "all", {**_INT, "help": "maximum number of tokens per cell"}),
    ("num_top_genes", "all", {**_INT, "help": "number of columns to use, the first ones"}),
    ("vocab_path", "all", {**_REQUIRED, "help": "JSON file of phenotype categories and their tokens"}),
    ("included_phenotypes", "all", {"nargs": "*", "help": "categories that the model reads"}),
    ("use_flash_attn", "all", {"action": "store_true", "help": "no effect: torch's own attention is used"}),
    ("output_dir", "all", {**_REQUIRED, "help": "folder of the model"}),
    ("per_device_eval_batch_size", "all", _INT),
    ("dataloader_num_workers", "all", {"type": int, "default": 4}),
    ("auto_find_batch_size", "all", {"action": "store_true"}),
    ("train_data_paths", "mlm cls", {**_PATHS, "help": "h5ad files, braces allowed"}),
    ("num_hidden_layers", "mlm cls", {**_INT, "help": "layers of the model"}),
    ("num_attention_heads", "mlm cls", {**_INT, "help": "attention heads of each layer"}),
    ("num_train_epochs", "mlm cls", _INT),
    ("per_device_train_batch_size", "mlm cls", _INT),
    ("gradient_accumulation_steps", "mlm cls", {"type": int, "default": 1}),
    ("learning_rate", "mlm cls", _FLOAT),
    ("weight_decay", "mlm cls", _FLOAT),
    ("warmup_ratio", "mlm cls", {"type": float, "default": 0.0, "help": "share of the steps for warmup"}),
    ("save_steps", "mlm cls", _INT),
    ("eval_steps", "mlm cls", _INT),
    ("gene_mask_prob", "mlm", {**_FLOAT, "help": "share of the genes to mask"}),
    ("phenotype_mask_prob", "mlm", {**_FLOAT, "help": "share of the phenotypes to mask"}),
    ("phenotype_category", "cls", {**_REQUIRED, "help": "column of obs to predict"}),
    ("binary_label", "cls", {"help": "token of this category, such as '[lung]', to predict against the rest"}),
    ("balanced_dataset", "cls", {"action": "store_true", "help": "do not weight the classes by 1 / frequency"}),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stformer_hf.cli.parse_args",
        description="PerturbGene's command line. Arguments without a description are TrainingArguments.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="subcommand")
    mlm = commands.add_parser("mlm", description="Train to predict masked genes and phenotypes.", allow_abbrev=False)
    cls = commands.add_parser("cls", description="Train to classify cells.", allow_abbrev=False)
    parsers = {"all": parser, "mlm": mlm, "cls": cls}
    for name, takers, options in _FLAGS:
        for taker in takers.split():
            parsers[taker].add_argument(f"--{name}", **options)
    return parser


def expand_braces(text: str) -> list[str]:
    """Expand braces, also nested, as a shell does: `a_{0..2}.h5ad`, `{00..10..5}`, `{train,test}`; all must match."""
    start = text.find("{")
    if start < 0:
        if "}" in text:
            raise ValueError(f"{text}: unmatched brace.")
        return [text]
    depth, cuts = 0, [start]
    for end, letter in enumerate(text[start:], start):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 1:
            cuts.append(end)
        if depth == 0:
            break
    else:
        raise ValueError(f"{text}: unmatched brace.")
    cuts.append(end)
    inside = [text[a + 1 : b] for a, b in zip(cuts, cuts[1:], strict=False)]
    if len(inside) > 1:
        choices = [choice for part in inside for choice in expand_braces(part)]
    elif found := _RANGE.fullmatch(inside[0]):
        choices = _range(*found.groups())
    else:
        choices = ["{" + choice + "}" for choice in expand_braces(inside[0])]
    return [text[:start] + choice + rest for choice in choices for rest in expand_braces(text[end + 1 :])]


def _range(first: str, last: str, letter: str, last_letter: str, step: str | None) -> list[str]:
    a, b = (ord(letter), ord(last_letter)) if letter else (int(first), int(last))
    by = abs(int(step or 1)) or 1
    numbers = range(a, b + 1, by) if a <= b else range(a, b - 1, -by)
    if letter:
        return [chr(number) for number in numbers]
    padded = any(re.fullmatch(r"-?0\d+", end) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in numbers]


def _files(flag: str, patterns: list[str]) -> list[str]:
    """Expand the braces of paths, and check that the files exist and have a supported format."""
    from ..sources.formats import expand

    found = [path for pattern in patterns for path in expand_braces(pattern)]
    missing = [path for path in found if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"--{flag}: {len(missing)} of {len(found)} files do not exist, such as {missing[0]}.")
    if any(path.endswith(".json") for path in found):
        raise ValueError(f"--{flag}: tokenized .json files of PerturbGene are not supported; pass the h5ad files.")
    return [str(path) for path in expand(found)]


def _read_json(flag: str, path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--{flag} {path}: must be a JSON file of names and lists.")
    return content


def _check_known(flag: str, name: str, known: Collection[str], where: str) -> None:
    if name not in known:
        raise ValueError(f"{flag} {name}: {where} has {', '.join(known)}{closest(name, known)}.")


# ---------------------------------------------------------------------- the run


def run(config: BaseConfig) -> dict[str, float]:
    """Train with PerturbGene's arguments; return the metrics of the run.

    The checkpoint is saved in `config.output_dir`, the initial model in its folder `initial`, the cells in `store`. A
    folder that already holds a model raises a FileExistsError.
    """
    from accelerate import PartialState

    from . import finetune, pretrain

    args, training = to_verb(config)
    assert isinstance(config, TrainConfig) and args.model and args.eval_data  # those of `mlm` and `cls`
    state = PartialState()
    if state.is_main_process and Path(args.model).exists():
        raise FileExistsError(f"{args.model} exists. Choose another --output_dir.")
    with state.main_process_first():
        if state.is_main_process:
            make_initial_model(config)
            if config.subcommand == "cls" and config.binary_label is not None:
                _one_against_rest(config, config.train_data_paths, args.data[0])
                _one_against_rest(config, config.eval_data_paths, args.eval_data[0])
    return (pretrain if config.subcommand == "mlm" else finetune).run(args, training)


def to_verb(config: BaseConfig) -> tuple[PretrainArguments | FinetuneArguments, dict[str, Any]]:
    """Return the arguments of `stformer-hf pretrain` (for `mlm`) or `finetune` (for `cls`), and of training.

    Their model is OUTPUT_DIR/initial, made by `make_initial_model`. Any other subcommand is refused.
    """
    from ..training.defaults import FINETUNING
    from . import finetune, pretrain

    output = Path(config.output_dir)
    same: dict[str, Any] = {
        "output": str(output),
        "model": str(output / "initial"),
        "eval_data": config.eval_data_paths,
    }
    if config.subcommand == "mlm":
        args: PretrainArguments | FinetuneArguments = pretrain.PretrainArguments(
            data=config.train_data_paths,
            mlm_probability=config.gene_mask_prob,
            phenotype_mask_prob=config.phenotype_mask_prob,
            **same,
        )
        defaults = pretrain.TRAINING_DEFAULTS
    elif config.subcommand == "cls":
        args = finetune.FinetuneArguments(
            data=config.train_data_paths,
            label_key=[config.phenotype_category],
            class_weights="none" if config.balanced_dataset else "balanced",
            label_smoothing=0.0 if config.balanced_dataset else 0.1,
            **same,
        )
        if config.binary_label is not None:
            args.data, args.eval_data = [str(output / "train_cells")], [str(output / "eval_cells")]
        defaults = FINETUNING
    else:
        raise ValueError("Training needs a subcommand: mlm or cls.")
    return args, {
        **defaults,
        **{name: getattr(config, name) for name, _, options in _FLAGS if "help" not in options},
        "warmup_steps": config.warmup_ratio,  # below 1: a share
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 5,
        "logging_steps": 50,
        "logging_first_step": True,
        "seed": 42,
    }


def make_initial_model(config: TrainConfig) -> Path:
    """Make the checkpoint, with tokenizer, that training starts from, OUTPUT_DIR/initial; return its path.

    `pretrained_model_path` may be a JSON file of an architecture (DistilBERT's or GeneBert's names), a folder of
    PerturbGene's weights, or a checkpoint of this package with its tokenizer. Weights must fit the vocabulary, the
    genes and the size.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer, set_seed

    from ..compat.legacy_weights import convert_perturbgene_checkpoint
    from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
    from ..models.gene_bert.modeling_gene_bert import GeneBertForPhenotypicMLM

    if config.use_flash_attn:
        logger.warning("--use_flash_attn: torch's own attention is used, which has flash attention built in.")
    folder = Path(config.output_dir) / "initial"
    pretrained = None if config.pretrained_model_path is None else Path(config.pretrained_model_path)
    size = {"num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
    set_seed(42)
    if pretrained is not None and (pretrained / "gene_vocabulary.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        found = AutoConfig.from_pretrained(pretrained)
        for name, value in size.items():
            if getattr(found, name) != value:
                raise ValueError(f"--{name} {value}: the weights at {pretrained} have {getattr(found, name)}.")
        tokenizer.included_phenotypes = config.included_phenotypes
        of_task = GeneBertForPhenotypicMLM if config.subcommand == "mlm" else AutoModel
        model = of_task.from_pretrained(pretrained, dtype=torch.float32)
    else:
        tokenizer = _make_tokenizer(config)
        file = pretrained if pretrained is None or pretrained.suffix == ".json" else pretrained / "config.json"
        fields = _architecture(file) if file is not None and file.is_file() else {}
        fields |= {**size, "label_smoothing": 0.5 if config.subcommand == "mlm" else 0.0}
        model_config = GeneBertConfig.from_tokenizer(tokenizer, size="base", **fields)
        if file == pretrained:
            model = GeneBertForPhenotypicMLM(model_config)
        else:
            assert pretrained is not None  # else there is no file
            model = convert_perturbgene_checkpoint(pretrained, model_config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_tokenizer(config: TrainConfig) -> GeneTokenizer:
    """Make a tokenizer from the vocabulary and the first `num_top_genes` genes of the training files."""
    from ..genes.unite import unite
    from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
    from ..sources.open_source import open_source

    sources = [open_source(path) for path in config.train_data_paths]
    genes = unite([source.genes for source in sources], [source.name for source in sources]).genes
    for source in sources:
        source.matrix.close()
    return GeneTokenizer.from_perturbgene(
        config.vocab_path,
        config.bin_edges,
        list(genes.gene_ids)[: config.num_top_genes],
        included_phenotypes=config.included_phenotypes,
        symbols=genes,
        max_length=config.max_length,
    )


# Names in DistilBERT's configuration, and in GeneBertConfig.
_ARCHITECTURE = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "seq_classif_dropout": "classifier_dropout",
}


def _architecture(file: Path) -> dict[str, Any]:
    """Read the architecture of a model from its configuration; other fields belong to other vocabularies."""
    saved = _read_json("pretrained_model_path", str(file))
    fields = {_ARCHITECTURE.get(name, name): value for name, value in saved.items() if value is not None}
    known = {*_ARCHITECTURE.values(), "initializer_range", "layer_norm_eps"}
    return {name: value for name, value in fields.items() if name in known}


def _one_against_rest(config: TrainConfig, files: list[str], folder: str) -> None:
    """Build a store whose labels are `binary_label` and `other`."""
    import numpy as np
    import pandas as pd
    from anndata import read_h5ad

    from ..genes.text_files import naming
    from ..models.gene_bert.phenotype_tokens import phenotype_token
    from ..store.cell_store import CellStore

    name, wanted = config.phenotype_category, config.binary_label
    cells = []
    for file in files:
        with naming(file, "h5ad"):
            adata = read_h5ad(file, backed="r")
        if name not in adata.obs:
            raise ValueError(f"{file} has no obs column {name!r}; it has {', '.join(adata.obs)}.")
        labels = adata.obs[name]
        is_it = labels.astype(object).map(lambda label: phenotype_token(str(label))) == wanted
        classes = pd.Series(np.where(is_it, wanted[1:-1], "other"), index=labels.index).where(labels.notna())
        adata.obs[name] = pd.Categorical(classes, categories=["other", wanted[1:-1]])
        cells.append(adata)
    CellStore.build(folder, cells, obs=[name, *config.included_phenotypes])
    for adata in cells:
        adata.file.close()


def main(argv: list[str] | None = None) -> int:
    """Parse PerturbGene's command line, train, and print the metrics; return the exit status."""
    from . import guarded

    def train() -> None:
        from .runs import run_and_print

        config = parse_args(argv)
        run_and_print(config.output_dir, lambda: run(config))

    return guarded("stformer_hf.cli.parse_args", train)


if __name__ == "__main__":
    raise SystemExit(main())
