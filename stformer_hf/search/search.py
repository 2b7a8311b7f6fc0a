"""Hyperparameter search with `Trainer.hyperparameter_search`: the study, its results and their table.

A trial trains a new model with values of the space, and is scored by a metric on held-out cells. The held-out cells
and their masks are the same in all trials.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..store.replacing import locked
from ..training.cell_trainer import CellTrainer
from ..training.log_lines import LogLines
from ..training.scores import score_of
from .search_space import SearchSpace, TrialModel, in_words, prune

PRUNERS = ("median", "hyperband", "none")


def search(
    trainer: CellTrainer,
    space: SearchSpace,
    output: str | Path,
    *,
    trials: int = 8,
    metric: str = "eval_loss",
    direction: str = "minimize",
    backend: str = "optuna",
    pruner: str = "median",
    sampler_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Search hyperparameters, printing one line per trial.

    With optuna, the study is kept in OUTPUT/study.db, and a search resumes from there until it has `trials` trials,
    including pruned ones; an interrupted trial is marked as failed, and repeated with the same values. With ray,
    trials run in parallel, each on one CPU (and one GPU, if there are any), and a search cannot be resumed.

    Parameters
    ----------
    trainer : CellTrainer
        Made with a `TrialModel` as `model_init`. No checkpoints are written, whatever its arguments.
    space : SearchSpace
        The space of the `TrialModel`.
    output : str or Path
        Folder for study.db, or ray's folder.
    trials : int, default: 8
        Total number of trials.
    metric : str, default: "eval_loss"
        Metric of the evaluation.
    direction : {"minimize", "maximize"}, default: "minimize"
    backend : {"optuna", "ray"}, default: "optuna"
    pruner : {"median", "hyperband", "none"}, default: "median"
        Rule to stop trials early, after an evaluation; with ray, "hyperband" is ASHA.
    sampler_seed : int, default: 0
        Seed of the sampled values. A resumed search samples the same values as an uninterrupted one.
    settings : mapping, optional
        Other settings that scores depend on (JSON values); a study with other settings is not resumed.
    overwrite : bool, default: False
        Replace an existing search in the folder.

    Returns
    -------
    pandas.DataFrame
        One row per trial: `trial` (from 1), `state` (COMPLETE, PRUNED or FAILED), `score`, `seconds`, `reason`, then
        the values.

    Raises
    ------
    ValueError
        A setting is invalid; the study has another space, metric or setting; no trial has a score; the evaluation
        does not compute the metric.
    BlockingIOError
        Another process searches in the folder.
    FileExistsError
        With ray: the folder holds a search.
    """
    for name, value, known in (
        ("direction", direction, ("minimize", "maximize")),
        ("backend", backend, ("optuna", "ray")),
        ("pruner", pruner, PRUNERS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    args = trainer.args
    if trainer.eval_dataset is None:
        raise ValueError(f"{metric} is measured on held-out cells, but none are held out: set held_out above 0.")
    if args.world_size > 1:
        raise ValueError('A search runs in one process, without accelerate launch; backend "ray" uses multiple CPUs.')
    if pruner != "none" and args.eval_strategy == "no":
        raise ValueError(
            f'Pruner "{pruner}" needs evaluations during training: set eval_strategy to steps, with eval_steps '
            'below max_steps, or pruner to "none".'
        )
    if not isinstance(trainer.model_init, TrialModel):
        raise ValueError("The trainer of a search needs model_init=TrialModel(space, make_model).")
    output = Path(output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    space.prepare(args)
    args.save_strategy = "no"
    trainer.model_init.collator = trainer.data_collator
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if backend == "optuna":
        trainer.add_callback(_StepBar())
    with locked(output / "study.db"):
        if overwrite:
            (output / "study.db").unlink(missing_ok=True)
            shutil.rmtree(output / "ray", ignore_errors=True)
        run = _with_optuna if backend == "optuna" else _with_ray
        return run(trainer, space, output, trials, metric, direction, pruner, sampler_seed, dict(settings or {}))


def best_of(table: pd.DataFrame, direction: str) -> pd.Series:
    """Return the row of the best trial among the complete ones.

    Raises
    ------
    ValueError
        No trial is complete.
    """
    complete = table[(table["state"] == "COMPLETE") & table["score"].notna()]
    if complete.empty:
        reasons = "; ".join(table["reason"].dropna().unique()[:3])
        raise ValueError(f"None of {len(table)} trials is complete{': ' + reasons if reasons else ''}.")
    scores = complete["score"]
    return complete.loc[scores.idxmin() if direction == "minimize" else scores.idxmax()]


class _StepBar(LogLines):
    """Progress bar of steps, without lines of metrics."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Write nothing."""


def _tell(
    number: int, trials: int, values: Mapping[str, Any], outcome: str, scores: list[float], direction: str
) -> None:
    best = f"{(min if direction == 'minimize' else max)(scores):.4f}" if scores else "none yet"
    tqdm.write(f"trial {number} of {trials}: {in_words(values)}: {outcome} (best {best})")


# ---------------------------------------------------------------------- optuna


def _with_optuna(trainer: CellTrainer, space: SearchSpace, output: Path, *settings: Any) -> pd.DataFrame:
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # trials are printed here
    path = output / "study.db"
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    except (sqlalchemy.exc.DatabaseError, RuntimeError) as error:
        raise ValueError(f"{path} is not a study of optuna: {error}") from error
    try:
        return _continue_study(trainer, space, path, storage, *settings)
    finally:
        storage.remove_session()
        storage.engine.dispose()  # closes the file


def _continue_study(
    trainer: Any,
    space: SearchSpace,
    path: Path,
    storage: Any,
    trials: int,
    metric: str,
    direction: Any,
    pruner: str,
    sampler_seed: int,
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    import optuna

    state = optuna.trial.TrialState
    study = optuna.create_study(storage=storage, study_name="search", direction=direction, load_if_exists=True)
    values = {name: repr(distribution) for name, distribution in space.distributions.items()}
    _check_settings(study, path, {"metric": metric, "direction": direction, "space": values, **settings})
    for trial in study.get_trials(deepcopy=False, states=(state.RUNNING,)):  # the last one of a killed search
        study.tell(trial.number, state=state.FAIL)
    train = trainer.train

    def train_or_prune(*args: Any, trial: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, trial=trial, **kwargs)
        except torch.OutOfMemoryError as error:
            prune(trial, "out of memory", error)

    def objective(metrics: dict[str, float]) -> float:
        score = score_of(metrics, metric)
        if not math.isfinite(score):
            prune(trainer._trial, f"{metric} is {score}")
        return score

    trainer.train = train_or_prune
    n_done = len(_finished(study))
    try:
        for number in tqdm(
            range(n_done, trials), "trials", total=trials, initial=n_done, disable=trainer.args.disable_tqdm
        ):
            # One at a time, seeded by its number, so that a resumed search samples what an uninterrupted one would.
            seed = np.random.SeedSequence([sampler_seed, number]).generate_state(1)
            try:
                trainer.hyperparameter_search(
                    hp_space=space.hp_space,
                    compute_objective=objective,
                    n_trials=1,
                    direction=direction,
                    backend="optuna",
                    study_name=study.study_name,
                    storage=storage,
                    load_if_exists=True,
                    sampler=optuna.samplers.TPESampler(seed=int(seed[0])),
                    pruner=_pruner(pruner),
                )
            except ValueError:
                # Trainer asks for the best trial even if all were pruned; best_of explains why.
                if len(_finished(study)) == number:
                    raise
            trial = study.trials[-1]
            outcome = f"{trial.value:.4f}" if trial.state == state.COMPLETE else f"pruned, {_reason(trial)}"
            completed = study.get_trials(deepcopy=False, states=(state.COMPLETE,))
            scores = [one.value for one in completed if one.value is not None]
            _tell(number + 1, trials, trial.params, outcome, scores, direction)
    finally:
        del trainer.train
    return _table(_rows(study), space)


def _check_settings(study: Any, path: Path, wanted: dict[str, Any]) -> None:
    """Write the settings into a new study; an older one must have the same."""
    wanted = json.loads(json.dumps(wanted))
    if not study.trials:
        study.set_user_attr("settings", wanted)
    found = study.user_attrs.get("settings", {})
    other = [key for key in (*wanted, *(set(found) - set(wanted))) if found.get(key) != wanted.get(key)]
    if other:
        raise ValueError(
            f"{path} is a search with another {other[0]} ({found.get(other[0])!r}, now {wanted.get(other[0])!r})"
            f"{', and other ' + ', '.join(other[1:]) if other[1:] else ''}: scores would not be comparable. Choose "
            "another --output, or start a new search with --overwrite."
        )


def _finished(study: Any) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def _pruner(name: str) -> Any:
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    return optuna.pruners.HyperbandPruner() if name == "hyperband" else optuna.pruners.NopPruner()


def _reason(trial: Any) -> str | None:
    reason = trial.user_attrs.get("reason")
    if reason is None and trial.state.name != "COMPLETE" and trial.last_step is not None:
        reason = f"at step {trial.last_step} with {trial.intermediate_values[trial.last_step]:.4f}"
    return reason


def _rows(study: Any) -> list[dict[str, Any]]:
    return [
        {
            "trial": number,
            "state": trial.state.name,
            "score": trial.value,
            "seconds": trial.duration.total_seconds(),
            "reason": _reason(trial),
            **trial.params,
        }
        for number, trial in enumerate(_finished(study), 1)
    ]


def _table(rows: list[dict[str, Any]], space: SearchSpace) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["trial", "state", "score", "seconds", "reason", *space])
    whole = dict.fromkeys(space.integers(), "Int64")  # pruned trials may lack values
    return table.astype({"score": float, "seconds": float, **whole})


# ---------------------------------------------------------------------- ray


def _with_ray(
    trainer: CellTrainer,
    space: SearchSpace,
    output: Path,
    n_trials: int,
    metric: str,
    direction: str,
    pruner: str,
    sampler_seed: int,
    settings: Mapping[str, Any],
) -> pd.DataFrame:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
    from ray.tune.search.basic_variant import BasicVariantGenerator

    folder = output / "ray"
    if folder.exists():
        raise FileExistsError(
            f'{folder} holds a search with ray, which cannot be resumed: use backend "optuna", which can, choose '
            "another --output, or start a new search with --overwrite."
        )

    ended: list[tuple[Any, str]] = []

    class Lines(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._tell(trial, "COMPLETE")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._tell(trial, "FAILED")  # the reason is set after this

        def _tell(self, trial: Any, state: str) -> None:
            ended.append((trial, state))
            scores = [one.last_result["objective"] for one, state in ended if state == "COMPLETE"]
            outcome = f"{scores[-1]:.4f}" if state == "COMPLETE" else "failed"
            _tell(len(ended), n_trials, trial.config, outcome, scores, direction)

    worst = math.inf if direction == "minimize" else -math.inf

    def objective(metrics: dict[str, float]) -> float:
        score = score_of(metrics, metric)
        return score if math.isfinite(score) else worst

    scheduler = {
        "median": lambda: MedianStoppingRule(metric="objective", mode=direction[:3], grace_period=1),
        "hyperband": lambda: ASHAScheduler(metric="objective", mode=direction[:3]),
    }.get(pruner)
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        trainer.hyperparameter_search(
            hp_space=space.hp_space,
            compute_objective=objective,
            n_trials=n_trials,
            direction=direction,
            backend="ray",
            name="ray",
            storage_path=str(output),
            search_alg=BasicVariantGenerator(random_state=sampler_seed),
            callbacks=[Lines()],
            verbose=0,
            raise_on_failed_trial=False,
            reuse_actors=True,  # a new process takes seconds to import
            **({"scheduler": scheduler()} if scheduler else {}),
        )
    except AttributeError:
        # Trainer reads the best trial, and there may be none; best_of explains why.
        if len(ended) < n_trials or any(state == "COMPLETE" for _, state in ended):
            raise
    finally:
        if started:
            ray.shutdown()
    rows = [
        {
            "trial": number,
            "state": state,
            "score": (trial.last_result or {}).get("objective"),
            "seconds": (trial.last_result or {}).get("time_total_s"),
            "reason": str(error).strip().split("\n")[-1] if (error := trial.get_error()) is not None else None,
            **trial.config,
        }
        for number, (trial, state) in enumerate(ended, 1)
    ]
    return _table(rows, space)
