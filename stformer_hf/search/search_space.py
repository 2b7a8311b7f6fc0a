"""The space of a hyperparameter search, and the model of a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice, product
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainingArguments

from ..genes.wrong_names import closest
from ..models.gene_bert.configuration_gene_bert import GeneBertConfig

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

# Arguments that Trainer reads in each trial, and their types; others are read once, when it is made.
TRAINING_NAMES: dict[str, type[float] | type[int] | type[str]] = {
    "learning_rate": float,
    "weight_decay": float,
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_epsilon": float,
    "max_grad_norm": float,
    "num_train_epochs": float,
    "warmup_steps": float,
    "max_steps": int,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "lr_scheduler_type": str,
    "optim": str,
}
COLLATOR_NAMES = ("mlm_probability", "phenotype_mask_prob", "gene_dropout")
# Fields of a configuration that the tokenizer, or the task, determines.
_NOT_SEARCHED = (
    *("vocab_size", "type_vocab_size", "token_classes", "class_weights", "loss_weights", "vocabulary_fingerprint"),
    *("pad_token_id", "eos_token_id", "value_embedding", "max_position_embeddings", "sparse_prediction"),
    *("classifier_dropout", "classifier_pooling", "classifier_label_smoothing"),
    "label_smoothing",  # losses with and without it cannot be compared
)
MODEL_NAMES = (
    "size",
    *(name for name in GeneBertConfig.__annotations__ if name not in ("on_init", *_NOT_SEARCHED)),
)
_KEYS = ("low", "high", "log", "step", "choices")
_MOST_COMBINATIONS = 1000  # configurations to check, some milliseconds each


class SearchSpace:
    """Hyperparameters by name, each a distribution of optuna.

    Parameters
    ----------
    space : mapping of str to mapping
        Names of `TRAINING_NAMES`, `MODEL_NAMES` or `COLLATOR_NAMES`, and their possible values: ``choices`` (words,
        numbers or booleans), or all values from ``low`` to ``high``, both included, integers if both are. Bounds may
        have ``log`` (sample uniformly on a logarithmic scale); integers may have ``step``. E.g.
        ``{"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "hidden_size": {"choices": [64, 128]}}``.

    Raises
    ------
    ValueError
        The space is empty; a name is unknown; neither choices nor bounds are given, or both; choices or bounds are
        invalid.
    """

    def __init__(self, space: Mapping[str, Mapping[str, Any]]):
        if not isinstance(space, Mapping) or not space:
            raise ValueError(f"space must be a mapping of names to bounds or choices, got {space!r}.")
        self.distributions = {name: _distribution(name, entry) for name, entry in space.items()}
        self.training = [name for name in space if name in TRAINING_NAMES]
        self.model = [name for name in space if name in MODEL_NAMES]
        self.collator = [name for name in space if name in COLLATOR_NAMES]

    def __iter__(self) -> Iterator[str]:
        return iter(self.distributions)

    def suggest(self, trial: Any, names: list[str]) -> dict[str, Any]:
        """Return the values of some names: sampled from an optuna trial, or read from ray's dict.

        `model_init` is called before Trainer reads the space, when `trial.params` is still empty.
        """
        if isinstance(trial, dict):
            return {name: trial[name] for name in names}
        return {name: _suggest(trial, name, self.distributions[name]) for name in names}

    def hp_space(self, trial: Any) -> dict[str, Any]:
        """Return the training arguments of a trial for `hyperparameter_search`, or all domains for ray (no trial)."""
        if trial is None:
            return {name: _ray_domain(distribution) for name, distribution in self.distributions.items()}
        return self.suggest(trial, self.training)

    def integers(self) -> list[str]:
        """Return the names whose values are all integers."""
        return [name for name, values in self.distributions.items() if {type(v) for v in _ends(values)} == {int}]

    def check_models(self, make_config: Callable[..., Any]) -> None:
        """Make a configuration for every combination of choices and bounds (the first 1,000).

        Parameters
        ----------
        make_config : callable
            Takes fields of the configuration; raises if they are invalid.

        Raises
        ------
        ValueError
            A combination is invalid, such as a hidden size that is not a multiple of the heads.
        """
        ends = (_ends(self.distributions[name]) for name in self.model)
        for values in islice(product(*ends), _MOST_COMBINATIONS):
            sizes = dict(zip(self.model, values, strict=True))
            try:
                make_config(**sizes)
            except Exception as error:
                raise ValueError(f"space: invalid model with {in_words(sizes)}: {error}") from error

    def prepare(self, args: TrainingArguments) -> None:
        """Prepare the arguments for Trainer, which casts each value to the type of the previous one.

        Raises
        ------
        ValueError
            Trainer does not know an optimizer or a schedule.
        """
        for name in self.training:
            ends = _ends(self.distributions[name])
            if TRAINING_NAMES[name] is not str:  # an int would truncate a share of 0.1 to 0
                setattr(args, name, int(ends[0]) if name in self.integers() else float(ends[0]))
                continue
            for value in ends:
                try:
                    type(getattr(args, name))(value)
                except ValueError as error:
                    raise ValueError(f"space: {name} {value!r}: {error}") from error


def _distribution(name: str, entry: Any) -> Distribution:
    """Return the distribution of a name of the space, checked."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    _check_name(name)
    if not isinstance(entry, Mapping):
        raise ValueError(f"space: {name} must be a mapping with low and high, or choices, got {entry!r}.")
    for key in entry:
        if key not in _KEYS:
            raise ValueError(f"space: unknown key {key!r} of {name}; known are {', '.join(_KEYS)}.")
    entry = {key: value for key, value in entry.items() if value is not None}
    if ("choices" in entry) == ("low" in entry or "high" in entry):
        raise ValueError(f"space: {name} needs {{low: …, high: …}} (with log: true, or step: …) or {{choices: […]}}.")
    try:
        if "choices" in entry:
            if len(entry) > 1:
                raise ValueError("log and step need bounds, not choices")
            if not isinstance(entry["choices"], list | tuple):
                raise ValueError(f"choices must be a list, got {entry['choices']!r}")
            if not all(isinstance(value, str | int | float) for value in entry["choices"]):
                raise ValueError(f"choices must be words, numbers or booleans, got {entry['choices']!r}")
            distribution: Distribution = CategoricalDistribution(entry["choices"])
        else:
            entry |= {bound: _number(bound, entry.get(bound)) for bound in ("low", "high")}
            whole = type(entry["low"]) is type(entry["high"]) is int
            if "step" in entry and not (whole and type(entry["step"]) is int):
                raise ValueError(f"step must be an integer, with integer bounds, got {entry['step']!r}")
            distribution = (IntDistribution if whole else FloatDistribution)(**entry)
        for value in _ends(distribution):
            _check_value(name, value)
    except ValueError as error:
        raise ValueError(f"space: {name}: {error}") from error
    return distribution


def _check_name(name: str) -> None:
    known = [*TRAINING_NAMES, *MODEL_NAMES, *COLLATOR_NAMES]
    if name in known:
        return
    if name in [field.name for field in fields(TrainingArguments)]:
        raise ValueError(
            f"space: {name} cannot be searched, as Trainer reads it only once; searchable arguments are "
            f"{', '.join(TRAINING_NAMES)}."
        )
    hint = closest(name, known) or f"; known are {', '.join(known)}"
    raise ValueError(f"space: unknown name {name!r}{hint}.")


def _number(bound: str, value: Any) -> float:
    """Return a bound; YAML reads 1e-4, without a point, as a string."""
    try:
        number = float(value) if isinstance(value, str) else value
        if not isinstance(number, bool) and math.isfinite(number):
            return number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{bound} must be a number, got {value!r}")


def _check_value(name: str, value: Any) -> None:
    if name in COLLATOR_NAMES and (isinstance(value, str | bool) or not 0 <= value <= 1):
        raise ValueError(f"must be a share from 0 to 1, got {value!r}")
    if name not in TRAINING_NAMES:
        return
    kind = TRAINING_NAMES[name]
    if kind is str:
        good = isinstance(value, str)
    else:
        numbers = int if kind is int else int | float
        good = isinstance(value, numbers) and not isinstance(value, bool) and value >= (kind is int)
    if not good:
        want = {str: "a name", int: "an integer of at least 1", float: "a number of at least 0"}[kind]
        raise ValueError(f"must be {want}, got {value!r}")


def _ends(distribution: Distribution) -> Sequence[Any]:
    """Return all choices, or both bounds."""
    return distribution.choices if hasattr(distribution, "choices") else (distribution.low, distribution.high)


def _suggest(trial: Any, name: str, values: Distribution) -> Any:
    """Sample a value from an optuna trial."""
    if hasattr(values, "choices"):
        return trial.suggest_categorical(name, values.choices)
    if type(values.low) is int:
        return trial.suggest_int(name, values.low, values.high, step=values.step, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def _ray_domain(values: Distribution) -> Any:
    """Return the equivalent domain of ray.tune, whose upper bounds are exclusive for integers."""
    from optuna.distributions import FloatDistribution
    from ray import tune

    if hasattr(values, "choices"):
        return tune.choice(list(values.choices))
    if isinstance(values, FloatDistribution):
        return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
    if values.step > 1:
        return tune.choice(list(range(values.low, values.high + 1, values.step)))
    return (tune.lograndint if values.log else tune.randint)(values.low, values.high + 1)


class TrialModel:
    """`model_init` of a search: make the model of a trial, and apply its settings to the training collator.

    Parameters
    ----------
    space : SearchSpace
    make_model : callable
        Takes fields of the model's configuration; without any, it makes the model that Trainer inspects first.

    Notes
    -----
    If a model within the bounds of the space is invalid, the trial is pruned with the reason. Evaluation keeps the
    settings that its collator was made with, so that the scores of trials are comparable.
    """

    def __init__(self, space: SearchSpace, make_model: Callable[..., PreTrainedModel]):
        self.space, self.make_model = space, make_model
        self.collator: Any = None

    def __call__(self, trial: Any) -> PreTrainedModel:
        """Make the model of an optuna trial, of ray's dict, or without a trial."""
        if trial is None:
            return self.make_model()
        sizes = self.space.suggest(trial, self.space.model)
        for name, value in self.space.suggest(trial, self.space.collator).items():
            setattr(self.collator, name, value)
        try:
            return self.make_model(**sizes)
        except ValueError as error:
            prune(trial, f"invalid model with {in_words(sizes)}: {error}", error)


def prune(trial: Any, reason: str, error: Exception | None = None) -> None:
    """End an optuna trial without a score; with ray, it fails."""
    if isinstance(trial, dict):
        raise ValueError(reason) from error
    import optuna

    trial.set_user_attr("reason", reason)
    raise optuna.TrialPruned(reason) from error


def in_words(values: Mapping[str, Any]) -> str:
    """Format names and values on one line."""
    return ", ".join(
        f"{name} {value:.4g}" if type(value) is float else f"{name} {value}" for name, value in values.items()
    )
