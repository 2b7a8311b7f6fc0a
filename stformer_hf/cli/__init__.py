"""`stformer-hf COMMAND …`: one thin module per command, which imports heavy modules only when it runs."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from importlib import import_module

from .. import __version__

VERBS = {
    "demo": "pretrain, fine-tune, annotate and embed 700 cells, with plots and a report",
    "build": "build a CellStore from files of cells",
    "medians": "estimate the gene medians that order rank tokens",
    "tokenize": "write the tokens of a store as a Hugging Face dataset",
    "pretrain": "train a GeneBert to predict masked genes and phenotypes",
    "pretrain_neighborhood": "the same as pretrain --kind neighborhood: predict cells of tissue from their neighbours",
    "recipes": "list or copy the recipes, which are configurations for pretraining, fine-tuning and search",
    "search": "search hyperparameters of pretraining",
    "finetune": "train a classifier of cells",
    "annotate": "label the cells of a file with a classifier",
    "map": "label the cells of a file by their nearest neighbours in a labelled reference",
    "embed": "embed the cells of a file, or their neighbourhoods",
    "export": "export a classifier or an encoder to ONNX",
    "info": "describe a file, a store or a model, and how well cells and a model fit",
    "models": "list the models in folders and in the cache of the Hub",
    "doctor": "print versions, devices, threads, the attention backend and missing extras",
    "perturb": "change the counts of genes, and measure how far the cells move in the embedding of a model",
    "evaluate": "compare embeddings with one another and with simple baselines",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; `argv` is the command line without the program's name.

    Return the exit status: 0, 1 for an error, 2 for a wrong command line, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(len(verb) for verb in VERBS)  # `map` is the module of a command once it has run
        print("usage: stformer-hf COMMAND [options]      (stformer-hf COMMAND --help lists the options)\n")
        print("\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()))
        print("\nEach command takes --config (a YAML file or a recipe; flags override it) and --debug (tracebacks).")
        print("In the names of flags, hyphens and underscores are the same.")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        from ..genes.wrong_names import closest

        print(f"stformer-hf: error: unknown command {verb!r}{closest(verb, VERBS)}", file=sys.stderr)
        return 2
    module = f"{__name__}.{verb}"
    return guarded(f"stformer-hf {verb}", lambda: import_module(module).main(rest), "--debug" in rest, module=module)


def guarded(
    name: str,
    run: Callable[[], object],
    debug: bool = False,
    interrupted: str = "interrupted",
    module: str = "",
) -> int:
    """Run a command, and print an error in one line, or `interrupted` on Ctrl-C; with `debug`, errors are raised.

    Functions name their arguments in errors, as in `layer='counts'`; if such a name is a flag of the command's
    `module`, the flag is printed. Return the exit status: 0, 1 for an error, 130 if interrupted.
    """
    _show_messages()
    _spin_briefly()
    try:
        run()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
        print(f"{name}: error: {kind}{as_flags(str(error), _flags_of(module))}", file=sys.stderr)
        print("(--debug shows the traceback)", file=sys.stderr)
        return 1
    finally:
        if "torch" in sys.modules:  # else there is no group, and importing it takes seconds
            from ..training.process_group import leave_process_group

            leave_process_group()
    return 0


def _show_messages() -> None:
    """Print what the package logs, also where it is not a warning: about data that were left out, and long waits.

    Of several processes, only the first prints what is not a warning.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.INFO)
    if logging.lastResort is not None:  # prints messages to stderr, by default from warnings on
        logging.lastResort.setLevel(logging.INFO)


def _spin_briefly() -> None:
    """Let threads of OpenMP that wait for one another give up their core after a thirtieth of the default time.

    Where other processes want the cores, a thread that spins keeps the one that it waits for from running. libgomp,
    the OpenMP of torch's wheels for Linux, reads the setting when torch is imported. What the user has set holds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _flags_of(module: str) -> set[str]:
    """Return the names of the flags that the dataclasses of a command's module define; none if it is not imported."""
    kinds = vars(sys.modules[module]).values() if module in sys.modules else ()
    return {field.name for kind in kinds if is_dataclass(kind) for field in fields(kind)}


def as_flags(message: str, flags: Collection[str]) -> str:
    """Return a message with arguments such as `layer='counts'` as flags, `--layer counts`; calls stay as they are."""

    def replaced(found: re.Match) -> str:
        name, value = found["name"], found["value"]
        if name not in flags:
            return found[0]
        bare = value[1:-1] if value[:1] in "'\"" else value
        return f"--{name}" + ("" if bare == "True" else f" {value if ' ' in bare else bare}")

    return _ARGUMENT.sub(replaced, message)


# A call, which is left alone, or a name and its value.
_ARGUMENT = re.compile(
    r"""[\w.]+\([^()]*=[^()]*\)|(?<![\w./?&,=-])(?P<name>[a-z]\w*)=(?P<value>'[^']*'|"[^"]*"|\[[^\]]*\]|[^\s,;:.)'"=/&]+(?:\.\d+)?)"""
)
