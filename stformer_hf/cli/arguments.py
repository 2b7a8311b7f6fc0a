"""Command lines: a dataclass defines the flags, a YAML file sets their values, and flags override the file."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..genes.wrong_names import closest

logger = logging.getLogger(__name__)
_OWN_KEYS = ("config", "debug")
# Help of fields without a `flag`: those that mean the same in several commands.
_SHARED_HELP = {
    "layer": "location of the counts: X, raw or a layer",
    "fractional": "allow fractional counts, such as estimates (RSEM, SoupX)",
    "min_coverage": "minimum share of the model's genes in the cells (default: the model's)",
    "device": "cuda, cuda:1, mps or cpu (default: a GPU if there is one)",
    "dtype": "precision of the computation (default: that of the weights)",
    "aliases": "csv, tsv, json or parquet file of old and new gene ids",
    "unify": "symbol: merge genes with the same symbol but different ids",
    "gene_dropout": "share of a cell's genes to drop, drawn again in each epoch",
    "packing": "train on packed batches, without padding",
    "max_tokens_per_batch": "fill batches up to this many tokens, instead of a number of cells",
    "sampling": "cells of an epoch: '{by: cell_type}' balances types, '{by: batch, temperature: 2}' less so, "
    "'{shares: {a.h5ad: 0.7, b.h5ad: 0.3}}' mixes files; also weights, n_draws, replacement",
    "held_out": "share of the cells held out for evaluation; 0 trains on all of them",
    "eval_data": "files or stores to evaluate on, instead of held-out cells of the data",
    "engine": "where workers run: local, or ray (on a cluster)",
}
# Arguments of training that the commands of pretraining share.
PRETRAINING = {
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # which waits for a GPU in each step
    "eval_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}


def flag(help: str, default: Any = MISSING, **options: Any) -> Any:
    """Define a flag as a field of a dataclass, required without a default; `options` are those of argparse."""
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class OnCells:
    """Flags of the commands that write what a model says about the cells of a file."""

    data: str = flag("file of cells (h5ad, h5mu, zarr, 10x, loom, …), or a store (path or address)")
    model: str = flag("checkpoint")
    output: str = flag("file to write, .h5ad or .zarr")
    layer: str | None = None
    fractional: bool = False
    batch_size: int = flag("cells per batch", 64)
    min_coverage: float | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = flag("replace an existing file", False)

    def options(self, *own: str) -> dict[str, Any]:
        """Return the flags that the function of the command takes under the same names, except those named here."""
        return options_of(self, "data", "model", "output", "layer", "overwrite", *own)


def options_of(args: Any, *own: str) -> dict[str, Any]:
    """Return the flags of a command as options of a function, without the command's own."""
    return {name: value for name, value in vars(args).items() if name not in own}


def some_flags(args: Any, *names: str) -> dict[str, Any]:
    """Return some flags of a command as options of a function, without those that are None."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def parse(argv: list[str], arguments: type) -> Any:
    """Parse the command line of a command into its dataclass of flags; errors are those of `parse_training`."""
    return parse_training(argv, arguments, None)[0]


def parse_training(argv: list[str], arguments: type, training: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """Parse the command line of a command that trains into its dataclass of flags, and settings of the training.

    With `training`, the command's defaults for `transformers.TrainingArguments`, its fields are flags as well; return
    those that the defaults, the file and the command line set. The module of the dataclass names the command, and its
    docstring describes it. A wrong file raises a ValueError, a wrong command line and `--help` raise SystemExit.
    """
    parser = _parser(arguments, training)
    if any(flag in argv for flag in ("-h", "--help")):
        parser.parse_args(["--help"])
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    file = config_parser.parse_known_args(argv)[0].config
    config = _read_config(file) if file else {}
    if training is not None and "group_by_length" in config:  # a key of transformers 4
        if config.pop("group_by_length"):
            config.setdefault("train_sampling_strategy", "group_by_length")
        logger.warning(f'{file}: group_by_length is now train_sampling_strategy: "group_by_length".')

    own = [field.name for field in fields(arguments)]
    older = {name.lstrip("-"): field.name for field in fields(arguments) for name in field.metadata.get("aliases", ())}
    config = {older.get(key, key): value for key, value in config.items()}
    # For mappings, a flag overrides only the names that it contains.
    mappings = {name: config.pop(name) or {} for name in _mappings(arguments) if name in config}
    for name, value in mappings.items():
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {name} must be a mapping of names to values, got {value!r}.")
    training_names: list[str] = []
    training_parser = None
    if training is not None:
        from transformers import TrainingArguments

        training_parser = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False)
        training_parser.error = parser.error
        for action in training_parser._actions:  # so that only given flags are returned
            action.default = argparse.SUPPRESS
        training_names = [field.name for field in fields(TrainingArguments) if field.name not in (*own, "output_dir")]
    for key in config:
        if key not in own and key not in training_names:
            raise ValueError(f"{file}: unknown key {key!r}{closest(key, [*own, *training_names])}.")

    argv, unset = _without_null(argv, parser, *([] if training_parser is None else [training_parser]))
    for name in unset:
        config.pop(name, None)
        mappings.pop(name, None)
    required = [action for action in parser._actions if action.required]
    for action in required:  # a misspelt flag is reported before the one that it leaves missing
        action.required = False
    # The file comes first: it may hold required flags, and the last value of a repeated flag counts.
    given, rest = parser.parse_known_args([*_flags(config, own), *argv])
    for action in required:
        action.required = True
    set_training: dict[str, Any] = dict(training or {})
    if training_parser is not None:
        parsed, rest = training_parser.parse_known_args([*_flags(config, training_names), *rest])
        set_training.update(vars(parsed))
    if rest:
        known = [*own, *training_names, *_OWN_KEYS]
        parser.error(f"unknown argument {rest[0]}{closest(rest[0].lstrip('-').replace('-', '_'), known, '--')}")
    missing = ["/".join(action.option_strings) for action in required if getattr(given, action.dest) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    values = {name: getattr(given, name) for name in own}
    for name, of_file in mappings.items():
        values[name] = {**of_file, **(values[name] or {})} or None
    return arguments(**values), set_training


def changed_flags(args: Any, names: Iterable[str]) -> list[str]:
    """Return the flags, such as "--size", of the names whose values in a dataclass are not their defaults."""
    defaults = {
        option.name: option.default if option.default_factory is MISSING else option.default_factory()
        for option in fields(args)
    }
    return [f"--{name}" for name in names if getattr(args, name) != defaults[name]]


def refuse_flags_of_new(what: str, args: Any, names: Iterable[str]) -> None:
    """Raise a ValueError for flags of a new model or tokenizer (`what`), if one is loaded, which has its own."""
    given, loaded = changed_flags(args, names), getattr(args, what)
    if loaded and given:
        raise ValueError(f"{', '.join(given)}: only for a new {what}; the one at {loaded} has its own.")


def check_free(path: str | Path, overwrite: bool, flag: str = "--output") -> None:
    """Raise a FileExistsError if a path exists, unless it may be replaced."""
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another {flag}, or pass --overwrite.")


def check_names(flag: str, settings: dict[str, Any] | None, known: Iterable[str]) -> None:
    """Raise a ValueError for an unknown name in a mapping."""
    for name in settings or {}:
        if name not in known:
            raise ValueError(f"{flag}: unknown name {name!r}{closest(name, sorted(known))}.")


def _parser(arguments: type, training: dict[str, Any] | None) -> HfArgumentParser:
    epilog = None
    if training is not None:
        defaults = ", ".join(f"{key} {value}" for key, value in training.items())
        epilog = textwrap.fill(
            "Every field of transformers.TrainingArguments is a flag and a key too, such as --learning_rate or "
            f"--max_steps; the output folder is --output. Defaults here: {defaults}."
        )
    parser = HfArgumentParser(
        arguments,
        prog=f"stformer-hf {arguments.__module__.rpartition('.')[2]}",
        description=sys.modules[arguments.__module__].__doc__,
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    mappings = _mappings(arguments)
    for action in parser._actions:
        action.help = action.help or _SHARED_HELP.get(action.dest)
        shown = isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool)
        if shown and action.help and "default" not in action.help and action.default != argparse.SUPPRESS:
            action.help += " (default: %(default)s)"
        if isinstance(action, argparse._StoreFalseAction):  # --no_FLAG, the twin of a flag that is on by default
            action.help = argparse.SUPPRESS
        if action.const is True and action.nargs == "?":
            action.metavar = "true|false"
        if action.dest in mappings:
            action.type, action.metavar = _mapping, "{NAME: VALUE, ...}"
    parser.add_argument(
        "--config",
        help="YAML file of flags and their values, or the name of a recipe; flags on the command line override it, "
        "and --FLAG null unsets a key of it",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    values = _Help(parser.prog).values
    needed = [f"{action.option_strings[0]}{values(action)}" for action in parser._actions if action.required]
    parser.usage = " ".join(["%(prog)s", *needed, "[options]"])
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that shows each flag with its values once, without its twin with hyphens."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns - 2, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        twins = {flag.replace("_", "-") for flag in action.option_strings if "_" in flag}
        return ", ".join(flag for flag in action.option_strings if flag not in twins) + self.values(action)

    def values(self, action: argparse.Action) -> str:
        """Return the values of a flag, after a space, if it has some."""
        return "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())


def _without_null(argv: list[str], *parsers: argparse.ArgumentParser) -> tuple[list[str], set[str]]:
    """Return a command line without `--FLAG null`, and the names of the flags that were given so."""
    names = {flag: action.dest for parser in parsers for flag, action in parser._option_string_actions.items()}
    kept, unset = list(argv), set()
    for i in reversed(range(len(argv))):
        flag, _, value = argv[i].partition("=")
        n = 1 if value else 2  # --FLAG=null, or two words, after which comes the next flag
        alone = value == "null" or (argv[i + 1 : i + 2] == ["null"] and "".join(argv[i + 2 : i + 3])[:2] in ("", "--"))
        if flag in names and alone:
            del kept[i : i + n]
            unset.add(names[flag])
    return kept, unset


def _mappings(arguments: type) -> list[str]:
    """Return the fields whose values are mappings: `dict | None`."""
    return [name for name, kind in get_type_hints(arguments).items() if dict in get_args(kind)]


def _mapping(text: str) -> dict[str, Any]:
    """Parse a mapping in YAML's flow style, which includes JSON."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping; write it as '{{name: value}}'")
    return value


def recipe_files() -> dict[str, Path]:
    """Return the recipes by name. They are in the package, or beside it in a copy of the repository."""
    package = Path(__file__).parents[1]
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_config(file: str) -> dict[str, Any]:
    """Read a YAML file, or a recipe of this name if there is no such file."""
    path = Path(file)
    if not path.exists():
        recipes = recipe_files()
        if file not in recipes:
            raise FileNotFoundError(f"There is no file and no recipe {file}{closest(file, recipes)}.")
        path = recipes[file]
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a mapping of keys to values.")
    return config


def _flags(config: dict[str, Any], names: list[str]) -> list[str]:
    """Convert the keys of the file to a command line, so that argparse checks their types."""
    flags = []
    for key, value in config.items():
        if key not in names or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values)]
    return flags
