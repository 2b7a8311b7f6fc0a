"""`stformer-hf VERB …`: one thin command a verb. Heavy imports happen inside the verbs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from .. import __version__

VERBS = {
    "demo": "cells in, a pretrained and fine-tuned model, embeddings, plots and a report out",
    "build": "make a CellStore from files of cells",
    "medians": "estimate the gene medians by which rank tokens are ordered",
    "tokenize": "write the tokens of a store as a Hugging Face dataset",
    "pretrain": "train a GeneBert to predict masked genes and phenotypes",
    "pretrain_neighborhood": "train a CellNeighborhood model to predict cells from those around them",
    "search": "search the settings of a pretraining",
    "finetune": "train a classifier of cells",
    "annotate": "label the cells of a file with a classifier",
    "embed": "write an embedding of every cell of a file, or of the cells around it",
    "evaluate": "compare embeddings with each other and with simple baselines",
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Parameters
    ----------
    argv : list of str, optional
        The command line without the program's name.

    Returns
    -------
    int
        Exit status: 0, 1 for an error, 2 for a wrong command line, 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: stformer-hf VERB [options]      (stformer-hf VERB --help tells the options)\n")
        print("\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()))
        print("\nEach verb takes --config FILE.yaml, which any flag overrides, and --debug for tracebacks.")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        from .arguments import closest

        print(f"stformer-hf: error: no verb {verb!r}{closest(verb, VERBS)}", file=sys.stderr)
        return 2
    return guarded(f"stformer-hf {verb}", lambda: import_module(f".{verb}", __name__).main(rest), "--debug" in rest)


def guarded(name: str, run: Callable[[], object], debug: bool = False, interrupted: str = "interrupted") -> int:
    """Run a command, and tell an error in a line.

    Parameters
    ----------
    name : str
        Of the command.
    run : callable
    debug : bool, default: False
        Let errors through, with their traceback.
    interrupted : str
        What Ctrl-C says.

    Returns
    -------
    int
        Exit status: 0, 1 for an error, 130 if interrupted.
    """
    try:
        run()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
        print(f"{name}: error: {kind}{error}", file=sys.stderr)
        print("(--debug shows the traceback)", file=sys.stderr)
        return 1
    return 0
