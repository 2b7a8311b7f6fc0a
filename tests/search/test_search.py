"""A search: the space, what a trial is, pruning, interruptions, both backends."""

import math
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainingArguments

from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, STFormerPretrainer
from stformer_hf.search.search import best_of, search
from stformer_hf.search.search_plot import plot_trials
from stformer_hf.search.search_space import SearchSpace, TrialModel

optuna = pytest.importorskip("optuna")

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "hidden_size": {"choices": [8, 16]},
    "mlm_probability": {"low": 0.1, "high": 0.9},
}


class Watch(TrainerCallback):
    """Notes what each trial trains; calls `at(n)` after the first step of the n-th."""

    def __init__(self, at=None):
        self.trials, self.at, self.trainer = [], at, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > 1:
            return
        self.trials.append(
            {
                "hidden_size": model.config.hidden_size,
                "num_hidden_layers": model.config.num_hidden_layers,
                "learning_rate": args.learning_rate,
                "warmup_steps": args.warmup_steps,
                "mlm_probability": self.trainer.data_collator.mlm_probability,
                "evaluated with": self.trainer._eval_collator.mlm_probability,
            }
        )
        if self.at is not None:
            self.at(len(self.trials))


@pytest.fixture
def load_study():
    """Load the study of a search, and close its file at the end of the test."""
    opened = []

    def load(output):
        opened.append(optuna.storages.RDBStorage(f"sqlite:///{output}/study.db"))
        return optuna.load_study(study_name="search", storage=opened[-1])

    yield load
    for storage in opened:
        storage.remove_session()
        storage.engine.dispose()


@pytest.fixture
def make_trainer(store, tokenizer, tmp_path):
    def make(space=SPACE, watch=None, eval_steps=2, **settings):
        def make_model(**sizes):
            sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, **sizes}
            config = GeneBertConfig.from_tokenizer(tokenizer, intermediate_size=16, **sizes)
            return GeneBertForPhenotypicMLM(config)

        space = SearchSpace(space)
        arguments = TrainingArguments(
            str(tmp_path / "search"),
            **{
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "eval_strategy": "steps",
                "eval_steps": eval_steps,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                **settings,
            },
        )
        trainer = STFormerPretrainer(
            arguments,
            store,
            model_init=TrialModel(space, make_model),
            processing_class=tokenizer,
            eval_dataset=store.select(np.arange(8)),
            callbacks=[watch] if watch else None,
        )
        if watch:
            watch.trainer = trainer
        return trainer, space, tmp_path / "search"

    return make


# ---------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "mapping of names"),
        ({"hiden_size": {"choices": [8]}}, "unknown name 'hiden_size'; the closest known one is hidden_size"),
        ({"learning_rat": {"low": 1, "high": 2}}, "the closest known one is learning_rate"),
        ({"label_smoothing_factor": {"low": 0.0, "high": 0.1}}, "Trainer reads it only once"),
        ({"vocab_size": {"low": 1, "high": 2}}, "unknown name 'vocab_size'"),
        ({"learning_rate": 1e-3}, "must be a mapping with low and high"),
        ({"learning_rate": {"min": 1e-3, "high": 1}}, "unknown key 'min'"),
        ({"learning_rate": {"low": 1e-3}}, "learning_rate: high must be a number, got None"),
        ({"learning_rate": {}}, "needs {low: …, high: …}"),
        ({"learning_rate": {"low": 1e-3, "high": 1, "choices": [1e-3]}}, "or {choices"),
        (
            {"learning_rate": {"low": 1e-2, "high": 1e-3}},
            "learning_rate: `low <= high` must hold, but got (low=0.01, high=0.001)",
        ),
        ({"learning_rate": {"low": 0.0, "high": 1e-3, "log": True}}, "`low > 0` must hold for `log=True`"),
        ({"learning_rate": {"low": -1.0, "high": 1e-3}}, "at least 0, got -1.0"),
        ({"learning_rate": {"low": "small", "high": 1e-3}}, "learning_rate: low must be a number, got 'small'"),
        ({"learning_rate": {"low": math.nan, "high": 1e-3}}, "must be a number, got nan"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-2, "step": 1}}, "learning_rate: step must be an integer"),
        ({"learning_rate": {"choices": []}}, "`choices` must contain one or more elements"),
        ({"learning_rate": {"choices": [[0.1], 0.2]}}, "words, numbers or booleans"),
        ({"learning_rate": {"choices": [0.1], "log": True}}, "log and step need bounds"),
        ({"max_steps": {"low": 1.5, "high": 3.5}}, "max_steps: must be an integer"),
        ({"per_device_train_batch_size": {"low": 0, "high": 3}}, "at least 1, got 0"),
        ({"lr_scheduler_type": {"choices": [1]}}, "lr_scheduler_type: must be a name"),
        ({"mlm_probability": {"low": 0.1, "high": 1.1}}, "must be a share from 0 to 1, got 1.1"),
    ],
)
def test_a_wrong_space_is_an_error_at_the_door(space, words):
    with pytest.raises(ValueError) as error:
        SearchSpace(space)
    assert words in str(error.value)


def test_yaml_reads_1e_4_as_a_word_and_the_space_as_a_number():
    assert SearchSpace({"learning_rate": {"low": "1e-4", "high": 1}}).distributions["learning_rate"].low == 1e-4


@given(low=st.integers(1, 20), n_steps=st.integers(1, 9), step=st.none() | st.integers(1, 7), log=st.booleans())
def test_integers_stay_within_their_bounds_and_steps(low, n_steps, step, log):
    log, width = log and step is None, n_steps * (step or 1)
    space = SearchSpace({"num_hidden_layers": {"low": low, "high": low + width, "log": log, "step": step}})
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    value = space.suggest(trial, list(space))["num_hidden_layers"]
    assert type(value) is int
    assert value in range(low, low + width + 1, step or 1)


def test_both_backends_draw_from_the_same_values():
    pytest.importorskip("ray", reason="ray is not installed")
    space = SearchSpace(
        {
            **SPACE,
            "num_hidden_layers": {"low": 1, "high": 3},
            "intermediate_size": {"low": 8, "high": 24, "step": 8},
            "max_steps": {"low": 1, "high": 4, "log": True},
        }
    )
    domains = space.hp_space(None)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask(), list(space)) for _ in range(100)]
    for name, domain in domains.items():
        of_ray, of_optuna = {domain.sample() for _ in range(200)}, {values[name] for values in drawn}
        if name in space.integers():
            assert of_ray == of_optuna
        else:
            low, high = space.distributions[name].low, space.distributions[name].high
            assert all(low <= value <= high for value in of_ray | of_optuna)


def test_all_ends_of_the_model_are_tried_at_the_door():
    space = SearchSpace({"hidden_size": {"choices": [8, 12]}, "num_attention_heads": {"choices": [2, 8]}})
    with pytest.raises(
        ValueError, match="invalid model with hidden_size 12, num_attention_heads 8: .* not a multiple"
    ):
        space.check_models(GeneBertConfig)
    SearchSpace({"hidden_size": {"choices": [8, 16]}, "num_attention_heads": {"choices": [2, 8]}}).check_models(
        GeneBertConfig
    )


# ---------------------------------------------------------------------- a trial


def test_size_arguments_and_masks_follow_the_trial_and_evaluation_does_not(make_trainer, load_study, capfd):
    watch = Watch()
    space = {**SPACE, "num_hidden_layers": {"low": 1, "high": 2}, "warmup_steps": {"low": 0.1, "high": 0.6}}
    trainer, space, output = make_trainer(space, watch)
    assert trainer.args.warmup_steps == 0 and type(trainer.args.warmup_steps) is int  # Trainer would cast to it
    table = search(trainer, space, output, trials=3, pruner="none")
    seen = pd.DataFrame(watch.trials)
    for name in space:
        assert seen[name].tolist() == table[name].tolist()
        assert table[name].nunique() > 1
    assert set(seen["evaluated with"]) == {0.15}
    assert (table["state"] == "COMPLETE").all()
    assert table["trial"].tolist() == [1, 2, 3]
    # The score is of the last step, also where eval_steps=2 does not divide it; no checkpoint is written.
    assert load_study(output).trials[0].last_step == 3
    assert {path.name for path in output.iterdir()} == {"study.db"}
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("trial ")]
    assert len(lines) == 3
    assert f"(best {table['score'].min():.4f})" in lines[-1] and f"{table['score'][2]:.4f}" in lines[-1]


def test_hyperparameter_search_works_as_transformers_documents_it(make_trainer):
    trainer, space, _ = make_trainer({"num_hidden_layers": {"choices": [1, 2]}}, save_strategy="steps", save_steps=3)
    trainer.model_init.collator = trainer.data_collator
    best = trainer.hyperparameter_search(hp_space=space.hp_space, n_trials=2, backend="optuna", direction="minimize")
    assert best.hyperparameters["num_hidden_layers"] in (1, 2)
    with pytest.raises(ValueError, match="'loss' means 'minimize'"):
        trainer.hyperparameter_search(hp_space=space.hp_space, direction="maximize", backend="optuna")
    assert os.path.exists(f"{trainer.args.output_dir}/run-1/checkpoint-3/model.safetensors")


@pytest.mark.parametrize("metric", [None, "genes_accuracy"])
def test_the_default_objective_is_one_metric_and_not_the_sum_of_all(make_trainer, metric):
    seen = []

    class Evaluations(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics)

    settings = {} if metric is None else {"metric_for_best_model": metric}
    trainer, space, _ = make_trainer(SPACE, eval_steps=3, **settings)
    trainer.add_callback(Evaluations())
    trainer.model_init.collator = trainer.data_collator
    best = trainer.hyperparameter_search(hp_space=space.hp_space, n_trials=2, backend="optuna")
    scores = [metrics[f"eval_{metric or 'loss'}"] for metrics in seen]
    assert len(scores) == 2 and best.objective == (min(scores) if metric is None else max(scores))


def test_an_objective_that_the_evaluation_does_not_give_is_named(make_trainer):
    trainer, space, _ = make_trainer(metric_for_best_model="gene_accuracy")
    trainer.model_init.collator = trainer.data_collator
    with pytest.raises(
        ValueError, match="has no metric 'eval_gene_accuracy'; the closest known one is eval_genes_accuracy"
    ):
        trainer.hyperparameter_search(hp_space=space.hp_space, n_trials=1, backend="optuna")


def test_a_trial_whose_model_does_not_fit_the_tokenizer_is_an_error(make_trainer):
    trainer, space, output = make_trainer()
    make = trainer.model_init.make_model
    trainer.model_init.make_model = lambda **sizes: GeneBertForPhenotypicMLM(
        GeneBertConfig(**{**make(**sizes).config.to_dict(), "vocab_size": 5})
    )
    with pytest.raises(ValueError, match="The processing_class does not fit the model"):
        search(trainer, space, output, trials=1)


def test_what_cannot_be_and_what_diverges_is_pruned_with_the_reason(make_trainer):
    trainer, space, output = make_trainer({"hidden_size": {"choices": [9, 10, 12]}})
    make = trainer.model_init.make_model

    def make_model(**sizes):
        model = make(**sizes)
        if sizes.get("hidden_size") == 10:
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
        return model

    trainer.model_init.make_model = make_model
    table = search(trainer, space, output, trials=8, pruner="none")
    assert set(table["hidden_size"]) >= {9, 10, 12}
    odd, broken = table["hidden_size"] % 2 == 1, table["hidden_size"] == 10
    assert table["reason"][odd].str.contains("is not a multiple of num_attention_heads 2").all()
    assert table["reason"][broken].str.contains("eval_loss is nan").all()
    assert (table["state"] == np.where(odd | broken, "PRUNED", "COMPLETE")).all()
    assert best_of(table, "minimize")["hidden_size"] == 12
    with pytest.raises(ValueError, match="None of .* trials is complete: invalid model with hidden_size"):
        best_of(table[odd], "minimize")


def test_pruned_trials_are_those_behind_the_median(make_trainer, load_study):
    trainer, space, output = make_trainer({"learning_rate": SPACE["learning_rate"]}, eval_steps=1)
    table = search(trainer, space, output, trials=7)
    study = load_study(output)
    n_pruned = 0
    for i, trial in enumerate(study.trials):
        before = [t.intermediate_values for t in study.trials[:i] if t.state.name == "COMPLETE"]
        behind = None
        for step, _ in sorted(trial.intermediate_values.items()):
            known = [values[step] for values in before if step in values]
            best = min(value for at, value in trial.intermediate_values.items() if at <= step)
            if len(before) >= 3 and best > np.median(known):
                behind = step
                break
        assert (trial.state.name == "PRUNED") == (behind is not None)
        assert trial.last_step == (behind or 3)
        n_pruned += behind is not None
    assert n_pruned
    assert len(table) == 7 and (table["state"] == "PRUNED").sum() == n_pruned


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])  # a kill leaves a trial running, as SystemExit does
def test_an_interrupted_search_goes_on_to_the_trials_it_would_have_had(make_trainer, load_study, tmp_path, how):
    def stop(n):
        if n == 2:
            raise how

    short = {"max_steps": 2, "eval_steps": 1}
    trainer, space, output = make_trainer(watch=Watch(stop), **short)
    with pytest.raises(how):
        search(trainer, space, output, trials=3, pruner="none")
    stopped = load_study(output).trials
    states = [trial.state.name for trial in stopped]
    assert states == ["COMPLETE", "FAIL" if how is KeyboardInterrupt else "RUNNING"]
    trainer, space, output = make_trainer(**short)
    table = search(trainer, space, output, trials=3, pruner="none")
    study = load_study(output)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[2].params
    trainer, space, _ = make_trainer(**short)
    whole = search(trainer, space, tmp_path / "whole", trials=3, pruner="none")
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), whole.drop(columns="seconds"))
    # All are done: nothing is run, or drawn.
    trainer, space, output = make_trainer(watch=(watch := Watch()))
    assert len(search(trainer, space, output, trials=3, pruner="none")) == 3
    assert not watch.trials


def test_a_study_of_something_else_is_not_gone_on_with(make_trainer):
    trainer, space, output = make_trainer()
    search(trainer, space, output, trials=1, settings={"data": ["a"]})

    def again(space=SPACE, **settings):
        trainer, space, output = make_trainer(space)
        return search(trainer, space, output, **{"trials": 1, "settings": {"data": ["a"]}, **settings})

    with pytest.raises(ValueError, match="a search with another data"):
        again(settings={"data": ["b"]})
    with pytest.raises(ValueError, match="another metric"):
        again(metric="eval_genes_accuracy")
    with pytest.raises(ValueError, match="another direction"):
        again(direction="maximize")
    with pytest.raises(ValueError, match="another space"):
        again({**SPACE, "hidden_size": {"choices": [8, 16, 32]}})
    assert len(again()) == 1
    assert len(again({"hidden_size": {"choices": [8]}}, overwrite=True)) == 1
    (output / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="study.db is not a study"):
        again()


def test_wrong_settings_are_errors_at_the_door(make_trainer):
    trainer, space, output = make_trainer()
    for settings, words in (
        ({"direction": "down"}, "direction must be one of minimize, maximize, got 'down'"),
        ({"backend": "wandb"}, "backend must be one of optuna, ray"),
        ({"pruner": "best"}, "pruner must be one of median, hyperband, none"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"metric": "eval_los"}, "no metric 'eval_los'; the closest known one is eval_loss"),
    ):
        with pytest.raises(ValueError, match=words):
            search(trainer, space, output, **{"trials": 1, **settings})
    trainer, space, output = make_trainer(eval_strategy="no")
    with pytest.raises(ValueError, match='Pruner "median" needs evaluations'):
        search(trainer, space, output, trials=1)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="none are held out"):
        search(trainer, space, output, trials=1)
    trainer, space, output = make_trainer({"lr_scheduler_type": {"choices": ["linear", "cosin"]}})
    with pytest.raises(ValueError, match="lr_scheduler_type 'cosin'"):
        search(trainer, space, output, trials=1)


def test_only_one_process_searches_in_a_folder(make_trainer):
    from stformer_hf.store.replacing import locked

    trainer, space, output = make_trainer()
    with locked(output / "study.db"), pytest.raises(BlockingIOError, match="Another process is writing"):
        search(trainer, space, output, trials=1)


# ---------------------------------------------------------------------- the plot, and ray


def test_the_plot_copes_with_pruned_failed_and_far_trials(tmp_path):
    pytest.importorskip("matplotlib")
    space = SearchSpace({**SPACE, "num_hidden_layers": {"low": 1, "high": 4}})
    table = pd.DataFrame(
        {
            "trial": range(1, 8),
            "state": ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE", "FAILED"],
            "score": [2.0, 2.5, np.nan, 1.0, 1e6, 1.5, np.nan],
            "reason": None,
            "learning_rate": [1e-4, 1e-3, np.nan, 1e-2, 1e-1, 1e-2, 1e-2],
            "hidden_size": pd.array([8, 16, None, 8, 8, 16, 8], "Int64"),
            "mlm_probability": 0.2,
            "num_hidden_layers": pd.array([1, 2, None, 3, 4, 1, 1], "Int64"),
        }
    )
    plot_trials(table, space, tmp_path / "trials.png")
    plot_trials(table.iloc[2:3], space, tmp_path / "none.png")
    for name in ("trials", "none"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow  # ray's processes import for half a minute
def test_ray_searches_the_same_space_and_ends(make_trainer):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    except Exception as error:
        pytest.skip(f"ray cannot start here: {error}")
    try:
        trainer, space, output = make_trainer({**SPACE, "hidden_size": {"low": 8, "high": 9}})
        table = search(trainer, space, output, trials=3, backend="ray")
        assert len(table) == 3 and set(table["hidden_size"]) == {8, 9}
        assert (table["state"] == np.where(table["hidden_size"] == 8, "COMPLETE", "FAILED")).all()
        assert table["reason"][table["hidden_size"] == 9].str.contains("not a multiple").all()
        assert best_of(table, "minimize")["hidden_size"] == 8
        trainer, space, output = make_trainer()
        with pytest.raises(FileExistsError, match='use backend "optuna"'):
            search(trainer, space, output, trials=2, backend="ray")
    finally:
        ray.shutdown()
