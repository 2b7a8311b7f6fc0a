"""The space of a hyperparameter search, and the model of a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import islice, product
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ..models.gene_bert.configuration_gene_bert import GeneBertConfig

# Arguments that Trainer reads in each trial, and their types; others are read once, when it is made.
TRAINING_NAMES = {
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
    "vocab_size",
    "type_vocab_size",
    "token_classes",
    "class_weights",
    "loss_weights",
    "vocabulary_fingerprint",
    "pad_token_id",
    "eos_token_id",
    "value_embedding",
    "max_position_embeddings",
    "sparse_prediction",
    "classifier_dropout",
    "classifier_pooling",
    "classifier_label_smoothing",
    "label_smoothing",  # losses with and without it cannot be compared
)
MODEL_NAMES = (
    "size",
    *(name for name in GeneBertConfig.__annotations__ if name not in ("on_init", *_NOT_SEARCHED)),
)
_MOST_COMBINATIONS = 1000  # configurations to check, some milliseconds each


@dataclass(frozen=True)
class Hyperparameter:
    """A name and its possible values: `choices`, or all values from `low` to `high`, both included.

    Parameters
    ----------
    name : str
        A key of `TRAINING_NAMES`, or one of `MODEL_NAMES` or `COLLATOR_NAMES`.
    low, high : int or float, optional
        Integers if both are.
    log : bool, default: False
        Sample uniformly on a logarithmic scale.
    step : int, optional
        Step between integers.
    choices : tuple of str, int, float or bool, optional

    Raises
    ------
    ValueError
        The name is unknown; neither choices nor bounds are given, or both; bounds or choices are invalid.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: int | None = None
    choices: tuple | None = None

    def __post_init__(self):
        known = [*TRAINING_NAMES, *MODEL_NAMES, *COLLATOR_NAMES]
        if self.name not in known:
            if self.name in [field.name for field in fields(TrainingArguments)]:
                raise ValueError(
                    f"space: {self.name} cannot be searched, as Trainer reads it only once; searchable arguments are "
                    f"{', '.join(TRAINING_NAMES)}."
                )
            near = get_close_matches(self.name, known, n=1, cutoff=0.5)
            hint = f"; the closest known one is {near[0]}" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"space: unknown name {self.name!r}{hint}.")
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError(
                f"space: {self.name} needs {{low: …, high: …}} (with log: true, or step: …) or {{choices: […]}}."
            )
        if self.choices is not None:
            self._check_choices()
        else:
            self._check_bounds()
        for value in self.ends:
            self._check_value(value)

    def _check_choices(self) -> None:
        if self.log or self.step is not None:
            raise ValueError(f"space: {self.name} has choices; log and step need bounds.")
        if not isinstance(self.choices, tuple) or not self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(
                f"space: choices of {self.name} must be a list of different values, got {self.choices!r}."
            )

    def _check_bounds(self) -> None:
        for bound in ("low", "high"):
            value = getattr(self, bound)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"space: {bound} of {self.name} must be a number, got {value!r}.")
        if self.low >= self.high:
            raise ValueError(f"space: low of {self.name} must be below high, got {self.low} and {self.high}.")
        if self.log and self.low <= 0:
            raise ValueError(f"space: log of {self.name} needs low above 0, got {self.low}.")
        if self.step is not None and (self.kind is not int or self.log or type(self.step) is not int or self.step < 1):
            raise ValueError(
                f"space: step of {self.name} must be an integer of at least 1, with integer bounds and without log; "
                f"got {self.step!r}."
            )
        if self.step is not None and (self.high - self.low) % self.step:
            raise ValueError(
                f"space: steps of {self.step} from {self.low} do not reach high of {self.name}, {self.high}; "
                f"use {self.high - (self.high - self.low) % self.step}."
            )

    def _check_value(self, value: Any) -> None:
        if self.name in COLLATOR_NAMES and (isinstance(value, str | bool) or not 0 <= value <= 1):
            raise ValueError(f"space: {self.name} must be a share from 0 to 1, got {value!r}.")
        if self.name not in TRAINING_NAMES:
            return
        kind = TRAINING_NAMES[self.name]
        if kind is str:
            good = isinstance(value, str)
        else:
            good = isinstance(value, int | kind) and not isinstance(value, bool) and value >= (kind is int)
        if not good:
            want = {str: "a name", int: "an integer of at least 1", float: "a number of at least 0"}[kind]
            raise ValueError(f"space: {self.name} must be {want}, got {value!r}.")

    @property
    def ends(self) -> tuple:
        """All choices, or both bounds."""
        return (self.low, self.high) if self.choices is None else self.choices

    @property
    def kind(self) -> type:
        """Type of the values: int, float, or object for other choices."""
        kinds = {type(value) for value in self.ends}
        return int if kinds == {int} else float if kinds <= {int, float} else object

    def suggest(self, trial: Any) -> Any:
        """Sample a value from an optuna trial."""
        if self.choices is not None:
            return trial.suggest_categorical(self.name, self.choices)
        if self.kind is int:
            return trial.suggest_int(self.name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def ray_domain(self) -> Any:
        """Return the equivalent domain of ray.tune, whose upper bounds are exclusive for integers."""
        from ray import tune

        if self.choices is not None:
            return tune.choice(list(self.choices))
        if self.kind is int:
            if self.step:
                return tune.choice(list(range(self.low, self.high + 1, self.step)))
            return (tune.lograndint if self.log else tune.randint)(self.low, self.high + 1)
        return (tune.loguniform if self.log else tune.uniform)(self.low, self.high)


class SearchSpace:
    """Hyperparameters by name.

    Parameters
    ----------
    space : mapping of str to mapping
        E.g. ``{"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "hidden_size": {"choices": [64, 128]}}``;
        see `Hyperparameter`.

    Raises
    ------
    ValueError
        The space is empty, or a hyperparameter is invalid (see `Hyperparameter`).
    """

    def __init__(self, space: Mapping[str, Mapping[str, Any]]):
        if not isinstance(space, Mapping) or not space:
            raise ValueError(f"space must be a mapping of names to bounds or choices, got {space!r}.")
        self.names = {name: _hyperparameter(name, entry) for name, entry in space.items()}
        self.training = [name for name in self.names if name in TRAINING_NAMES]
        self.model = [name for name in self.names if name in MODEL_NAMES]
        self.collator = [name for name in self.names if name in COLLATOR_NAMES]

    def __getitem__(self, name: str) -> Hyperparameter:
        return self.names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def suggest(self, trial: Any, names: list[str]) -> dict[str, Any]:
        """Return the values of some names: sampled from an optuna trial, or read from ray's dict.

        `model_init` is called before Trainer reads the space, when `trial.params` is still empty.
        """
        return {name: trial[name] if isinstance(trial, dict) else self[name].suggest(trial) for name in names}

    def hp_space(self, trial: Any) -> dict[str, Any]:
        """Return the training arguments of a trial for `hyperparameter_search`, or all domains for ray (no trial)."""
        if trial is None:
            return {name: self[name].ray_domain() for name in self}
        return self.suggest(trial, self.training)

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
        for values in islice(product(*(self[name].ends for name in self.model)), _MOST_COMBINATIONS):
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
            if TRAINING_NAMES[name] is not str:  # an int would truncate a share of 0.1 to 0
                setattr(args, name, self[name].kind(self[name].ends[0]))
                continue
            for value in self[name].ends:
                try:
                    type(getattr(args, name))(value)
                except ValueError as error:
                    raise ValueError(f"space: {name} {value!r}: {error}") from error


def _hyperparameter(name: str, entry: Any) -> Hyperparameter:
    keys = [field.name for field in fields(Hyperparameter)][1:]
    if not isinstance(entry, Mapping):
        raise ValueError(f"space: {name} must be a mapping with low and high, or choices, got {entry!r}.")
    for key in entry:
        if key not in keys:
            raise ValueError(f"space: unknown key {key!r} of {name}; known are {', '.join(keys)}.")
    entry = dict(entry)
    if isinstance(entry.get("choices"), list):
        entry["choices"] = tuple(entry["choices"])
        if not all(isinstance(value, str | int | float) for value in entry["choices"]):
            raise ValueError(f"space: choices of {name} must be words, numbers or booleans, got {entry['choices']!r}.")
    for bound in ("low", "high"):  # YAML reads 1e-4, without a point, as a string
        if isinstance(entry.get(bound), str):
            try:
                entry[bound] = float(entry[bound])
            except ValueError:
                raise ValueError(f"space: {bound} of {name} must be a number, got {entry[bound]!r}.") from None
    return Hyperparameter(name, **entry)


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


__all__ = ["COLLATOR_NAMES", "MODEL_NAMES", "TRAINING_NAMES", "Hyperparameter", "SearchSpace", "TrialModel"]
