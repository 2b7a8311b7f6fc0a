"""transformers' own Trainer, collators and torch's own datasets, on the objects of this package."""

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from stformer_hf import GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer


def arguments(folder, **changes) -> TrainingArguments:
    settings = {"max_steps": 3, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**settings, **changes})


def test_stock_mlm_predictions_meet_their_labels(tmp_path):
    """As transformers' run_mlm.py evaluates: predictions are gathered batch by batch, of all positions."""
    genes = [f"ENSG{i:011d}" for i in range(30)]
    tokenizer = GeneTokenizer(genes, scheme="rank", medians=[1.0] * 30)
    rows = Dataset.from_dict(dict(tokenizer(np.random.default_rng(0).poisson(1.0, (10, 30)).astype("float32"))))
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4, seed=0),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
    )
    batches = []
    trainer.data_collator, collate = (
        lambda examples: batches.append(collate(examples)) or batches[-1],
        (trainer.data_collator),
    )
    output = trainer.predict(rows)
    assert output.predictions.shape == (*output.label_ids.shape, len(tokenizer))
    model.eval()
    first = 0
    for batch in batches:
        labels = batch.pop("labels").numpy()
        n_cells, length = labels.shape
        with torch.no_grad():
            logits = model(**batch).logits.numpy()
        at = labels != -100
        assert at.any()
        np.testing.assert_array_equal(output.label_ids[first : first + n_cells, :length], labels)
        np.testing.assert_allclose(output.predictions[first : first + n_cells, :length][at], logits[at], atol=1e-5)
        first += n_cells
    assert first == 10
