"""Metrics against scikit-learn, and what the trainer gathers for them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction, TrainingArguments

from stformer_hf import GeneBertForPhenotypicMLM, GeneTokenizer, STFormerPretrainer
from stformer_hf.evaluation import metrics
from stformer_hf.evaluation.metrics import (
    compute_classification_metrics,
    compute_column_metrics,
    compute_phenotype_metrics,
    load_metric,
    preprocess_logits_for_metrics,
    preprocess_logits_with_nll,
)

FOLDER = Path(metrics.__file__).parent


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_eval_batch_size=7, use_cpu=True, report_to="none", disable_tqdm=True, **changes
    )


# ---------------------------------------------------------------------- modules of evaluate


def test_cell_classification_is_scikit_learns_batch_by_batch():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, 200), rng.integers(0, 6, 200)
    metric = load_metric("cell_classification")
    for start in range(0, 200, 33):
        metric.add_batch(predictions=predicted[start : start + 33], references=true[start : start + 33])
    found = metric.compute()
    assert found == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(true, predicted),
            "macro_precision": sklearn_metrics.precision_score(true, predicted, average="macro", zero_division=0),
            "macro_recall": sklearn_metrics.recall_score(true, predicted, average="macro", zero_division=0),
            "macro_f1": sklearn_metrics.f1_score(true, predicted, average="macro", zero_division=0),
        }
    )
    precision, recall = found["macro_precision"], found["macro_recall"]
    assert found["macro_f1"] != pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    some = metric.compute(predictions=predicted, references=true, labels=[0, 2])
    assert some["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(true, predicted, labels=[0, 2], average="macro", zero_division=0)
    )


def test_each_label_column_is_scored_on_the_cells_that_have_it():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 6)), np.stack([rng.integers(0, 2, 40), rng.integers(0, 3, 40)], axis=1)
    labels[rng.random((40, 2)) < 0.3] = -100
    columns = {"a": slice(0, 2), "b": slice(2, 5), "c": slice(5, 6)}
    labels = np.column_stack([labels, np.full(40, -100)])
    found = compute_column_metrics(columns)(EvalPrediction((logits, None), labels))
    own = {}
    for (name, outputs), of in zip(columns.items(), labels.T, strict=True):
        own[name] = compute_classification_metrics(EvalPrediction(logits[:, outputs], of))
        for figure, value in own[name].items():
            assert found[f"{name}_{figure}"] == pytest.approx(value, nan_ok=True)
    assert np.isnan(found["c_accuracy"])
    for figure in ("accuracy", "macro_f1"):
        assert found[figure] == pytest.approx((own["a"][figure] + own["b"][figure]) / 2)


def test_what_has_no_label_is_left_out():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(8, 5, 3)), rng.integers(0, 3, (8, 5))
    labelled = rng.random((8, 5)) < 0.6
    predicted = logits.argmax(-1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels[labelled], predicted[labelled]),
        "macro_f1": sklearn_metrics.f1_score(labels[labelled], predicted[labelled], average="macro"),
    }
    labels[~labelled] = -100
    for predictions in (logits, (logits, rng.normal(size=(8, 5, 16)))):  # hidden states may come with the logits
        assert compute_classification_metrics(EvalPrediction(predictions, labels)) == pytest.approx(expected)
    found = load_metric("cell_classification").compute(predictions=predicted.ravel(), references=labels.ravel())
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    labels[:] = -100
    assert np.isnan(list(compute_classification_metrics(EvalPrediction(logits, labels)).values())).all()
    nothing = load_metric("cell_classification").compute(predictions=predicted.ravel(), references=labels.ravel())
    assert len(nothing) == 4 and np.isnan(list(nothing.values())).all()


def test_masked_genes_takes_flat_positions_and_rows():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(6, 9, 5)))
    labels = torch.tensor(np.where(rng.random((6, 9)) < 0.4, rng.integers(0, 5, (6, 9)), -100))
    predicted, nll = preprocess_logits_with_nll(logits, labels)
    at = (labels != -100).numpy()
    probabilities = logits.softmax(-1).numpy()[at]
    expected = {
        "nll": sklearn_metrics.log_loss(labels.numpy()[at], probabilities, labels=range(5)),
        "accuracy": sklearn_metrics.accuracy_score(labels.numpy()[at], probabilities.argmax(1)),
        "n_masked": at.sum(),
    }
    expected["perplexity"] = np.exp(expected["nll"])
    metric = load_metric("masked_genes")
    for rows in (slice(0, 4), slice(4, 6)):
        metric.add_batch(
            predictions=predicted[rows].tolist(), references=labels[rows].tolist(), nll=nll[rows].tolist()
        )
    assert metric.compute() == pytest.approx(expected, rel=1e-6)
    flat = load_metric("masked_genes").compute(
        predictions=predicted.flatten().tolist(), references=labels.flatten().tolist(), nll=nll.flatten().tolist()
    )
    assert flat == pytest.approx(expected, rel=1e-6)
    nothing = load_metric("masked_genes").compute(predictions=[1], references=[-100], nll=[0.0])
    assert nothing["n_masked"] == 0 and np.isnan(nothing["nll"])
    with pytest.raises(ValueError, match="Unknown metric 'f1'; available are cell_classification, masked_genes"):
        load_metric("f1")


@pytest.mark.slow
def test_metrics_load_by_path_without_network(tmp_path):
    code = (
        "import socket, sys, evaluate\n"
        "def refuse(*args, **kwargs): raise SystemExit('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "for path in sys.argv[1:]:\n"
        "    metric = evaluate.load(path)\n"
        "    print(metric.name)\n"
    )
    paths = [str(FOLDER / name) for name in ("masked_genes", "cell_classification")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, *paths], env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert run.stdout.split() == ["masked_genes", "cell_classification"], run.stderr


# ---------------------------------------------------------------------- what Trainer gathers


@pytest.mark.parametrize("preprocess", [preprocess_logits_for_metrics, preprocess_logits_with_nll])
@pytest.mark.parametrize("sparse", [True, False])
def test_no_logits_are_gathered(store, tokenizer, config, tmp_path, preprocess, sparse):
    config.sparse_prediction = sparse
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(config)
    trainer = STFormerPretrainer(
        arguments(tmp_path),
        store,
        model=model,
        processing_class=tokenizer,
        mlm_probability=0.3,
        eval_dataset=store,
        compute_metrics=compute_phenotype_metrics(tokenizer),
        preprocess_logits_for_metrics=preprocess,
    )
    gathered, gather, logits_of = [], trainer.gather_function, []

    def watch(data, *args, **kwargs):
        gathered.extend(data if isinstance(data, (tuple, list)) else [data])
        return gather(data, *args, **kwargs)

    trainer.gather_function = watch
    model.mlm_head.register_forward_hook(lambda module, inputs, output: logits_of.append(output.shape))
    output = trainer.predict(trainer.eval_dataset)
    predicted = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    assert predicted.shape == output.label_ids.shape and predicted.dtype == np.int64
    assert len(gathered) >= 2 * 9 and all(tensor.ndim <= 2 for tensor in gathered)
    widest = output.label_ids.shape[1]
    assert all(tensor.ndim == 1 or tensor.shape[1] <= widest for tensor in gathered)
    # Nor are logits computed where there is no label.
    assert {len(shape) for shape in logits_of} == ({2} if sparse else {3})

    # The predictions are those of the model's whole logits.
    collator = trainer.data_collator.for_evaluation()
    batch = collator(trainer.eval_dataset.__getitems__(range(7)))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    at = (labels != -100).numpy()
    first = predicted[:7, : at.shape[1]]
    assert np.array_equal(first[at], logits.argmax(-1).numpy()[at]) and (first[~at] == -100).all()
    if preprocess is preprocess_logits_with_nll:
        of_all = output.predictions[1][output.label_ids != -100]
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, None
        assert of_all.mean() == pytest.approx(trainer.evaluate()["eval_loss"], rel=0.02)
        plain = logits.log_softmax(-1).numpy()[at]
        assert output.predictions[1][:7, : at.shape[1]][at] == pytest.approx(
            -plain[np.arange(len(plain)), labels.numpy()[at]], rel=1e-4
        )


def test_phenotype_metrics_are_scikit_learns_a_category():
    tokenizer = GeneTokenizer(
        [f"g{i}" for i in range(5)],
        bin_edges=[1, 2],
        phenotypes={"cell_type": ["a", "b", "c", "d"], "sex": ["f", "m"], "never": ["x"]},
    )
    rng = np.random.default_rng(0)
    of = {name: tokenizer.phenotype_token_ids(name) for name in tokenizer.phenotypes}
    labels = np.full((60, 6), -100)
    labels[:, 1] = rng.choice(of["cell_type"][:3], 60)  # d is never true
    labels[:, 2] = np.where(rng.random(60) < 0.5, rng.choice(of["sex"], 60), -100)
    labels[:, 4] = tokenizer.first_bin_id + rng.integers(0, 3, 60)
    predicted = np.where(rng.random(labels.shape) < 0.5, labels, rng.integers(0, len(tokenizer), labels.shape))
    predicted[labels == -100] = -100
    found = compute_phenotype_metrics(tokenizer)(EvalPrediction(predictions=predicted, label_ids=labels))

    def plain(true, said, ids, prefix):
        classes = [i for i in ids if i in true or i in said]
        scores = sklearn_metrics.precision_recall_fscore_support(true, said, labels=classes, zero_division=0)[:3]
        names = (f"{prefix}macro_precision", f"{prefix}macro_recall", f"{prefix}macro_f1")
        return {f"{prefix}accuracy": np.mean(true == said), **dict(zip(names, map(np.mean, scores), strict=True))}

    has_sex = labels[:, 2] != -100
    both = (np.concatenate([of_all[:, 1], of_all[has_sex, 2]]) for of_all in (labels, predicted))
    assert found == pytest.approx(
        {
            **plain(labels[:, 1], predicted[:, 1], of["cell_type"], "cell_type_"),
            **plain(labels[has_sex, 2], predicted[has_sex, 2], of["sex"], "sex_"),
            **plain(*both, np.concatenate([*of.values()]), ""),
            "genes_accuracy": np.mean(labels[:, 4] == predicted[:, 4]),
        }
    )
    with pytest.raises(ValueError, match="else it gathers logits"):
        compute_phenotype_metrics(tokenizer)(EvalPrediction(np.zeros((60, 6, 9)), labels))
    genes_only = np.where(np.arange(6) == 4, labels, -100)
    found = compute_phenotype_metrics(tokenizer)(EvalPrediction(predictions=predicted, label_ids=genes_only))
    assert list(found) == ["genes_accuracy"]
