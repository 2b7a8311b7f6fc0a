"""Search hyperparameters of pretraining: sizes of the model, training arguments, mask rates.

stformer-hf search --config search_tiny --data cells.h5ad --output search
stformer-hf pretrain --config search/best.yaml --output model

Keys are those of pretrain, fixed in all trials, and `space`: a mapping of names to {low: 1, high: 4}, to
{low: 1.0e-4, high: 1.0e-2, log: true} or to {choices: [64, 128]}. The same command resumes an interrupted search.
It writes best.yaml, trials.csv, trials.png and study.db to OUTPUT; trials leave no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import flag, parse_training, some_flags
from .pretrain import TRAINING_DEFAULTS, PretrainArguments

if TYPE_CHECKING:
    import pandas as pd

    from ..search.search_space import SearchSpace

# Keys that do not change the scores, or are checked elsewhere: a study resumes even if they differ.
_FREE = ("output", "overwrite", "space", "trials", "metric", "direction", "backend", "pruner", "sampler_seed")
_FREE_TRAINING = ("logging_", "save_", "dataloader_", "report_to", "disable_tqdm", "run_name")


@dataclass
class SearchArguments(PretrainArguments):
    """Flags of `search`."""

    output: str = flag("folder of the study and its results")
    overwrite: bool = flag("replace an existing search in OUTPUT", False)
    space: dict | None = flag("names and their possible values (see above)", None)
    trials: int = flag("total number of trials, including finished and pruned ones", 8)
    metric: str = flag("metric of the evaluation, such as eval_genes_accuracy", "eval_loss")
    direction: str = flag("minimize or maximize", "minimize")
    backend: str = flag("optuna, or ray (parallel trials, cannot resume)", "optuna")
    pruner: str = flag("stops trials early, after an evaluation: median, hyperband or none", "median")
    sampler_seed: int = flag("seed of the sampled values", 0)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, training = parse_training(argv, SearchArguments, TRAINING_DEFAULTS)
    from .files import writing

    with writing(args.output):
        best = run(args, training)
    print(
        f"{args.output}: trial {best['trial']} is the best, with {args.metric} {best['score']:.4f}. Pretrain with it:"
    )
    print(f"stformer-hf pretrain --config {Path(args.output) / 'best.yaml'} --output MODEL")


def run(args: SearchArguments, training: dict[str, Any]) -> pd.Series:
    """Search and write the results; return the row of the best trial."""
    from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
    from ..search.search_space import SearchSpace, TrialModel

    for module, extra in (("optuna", "search"), ("ray", "ray")):
        if args.backend == module and find_spec(module) is None:
            raise ImportError(f'backend "{module}" needs {module}: pip install "stformer_hf[{extra}]"')
    if not args.space:
        raise ValueError("search needs a space of names and their possible values, as in recipes/search_tiny.yaml.")
    space = SearchSpace(args.space)
    if args.model and space.model:
        raise ValueError(f"space: {', '.join(space.model)}: only for a new model; that at {args.model} has its own.")
    sizes = {"size": args.size, **(args.model_config or {})}
    space.check_models(lambda **values: GeneBertConfig.from_size(**{**sizes, **values}))

    from ..search.search import best_of, search
    from .pretrain import make_model, make_trainer, prepare
    from .runs import training_arguments

    output = Path(args.output)
    given = _settings(args, training)
    store = output / "store"
    is_built = (store / "manifest.json").exists
    if is_built() and (output / "study.db").exists() and not args.overwrite:  # by an interrupted search
        args.data = [str(store)]
    arguments = training_arguments(output, training, args.overwrite)
    prepared = prepare(args, arguments)
    if is_built():
        args.data = [str(store)]
    model_init = TrialModel(space, lambda **values: make_model(args, prepared, **values))
    trainer = make_trainer(args, arguments, prepared, model_init=model_init)
    try:
        table = search(
            trainer,
            space,
            output,
            settings=given,
            **some_flags(args, "trials", "metric", "direction", "backend", "pruner", "sampler_seed", "overwrite"),
        )
    except KeyboardInterrupt:
        if args.backend == "optuna":
            print("The search is interrupted; the same command resumes it.")
        raise
    table.to_csv(output / "trials.csv", index=False)
    best = best_of(table, args.direction)
    _write_best(output / "best.yaml", args, training, space, best, len(table))
    if find_spec("matplotlib") is None:
        print('(no trials.png without matplotlib: pip install "stformer_hf[plots]")')
        return best
    from ..search.search_plot import plot_trials

    plot_trials(table, space, output / "trials.png", metric=args.metric, direction=args.direction)
    return best


def _settings(args: SearchArguments, training: dict[str, Any]) -> dict[str, Any]:
    """Return the fixed settings that scores depend on."""
    own = {option.name: getattr(args, option.name) for option in fields(args) if option.name not in _FREE}
    return own | {key: value for key, value in training.items() if not key.startswith(_FREE_TRAINING)}


def _write_best(
    path: Path, args: SearchArguments, training: dict[str, Any], space: SearchSpace, best: pd.Series, n_trials: int
) -> None:
    """Write the settings of the best trial as a config of `pretrain`."""
    import yaml

    keys: dict[str, Any] = {}
    for option in fields(PretrainArguments):
        value = getattr(args, option.name)
        if option.name not in ("output", "overwrite") and value != option.default:
            keys[option.name] = value
    keys |= training
    for name in space:
        value = best[name].item() if hasattr(best[name], "item") else best[name]
        if name in space.model and name not in ("size", "label_smoothing"):
            keys["model_config"] = {**keys.get("model_config", {}), name: value}
        else:
            keys[name] = value
    head = f"# Trial {best['trial']} of {n_trials}: {args.metric} {best['score']:.6g}, the best ({args.direction}d).\n"
    use = f"#   stformer-hf pretrain --config {path} --output model\n"
    path.write_text(head + use + yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
