"""Trains and pushes to the Hub that HF_ENDPOINT names, by each strategy: python push_to_stand_in.py STORE FOLDER."""

import sys

import torch
from transformers import TrainerCallback, TrainingArguments

from stformer_hf import CellStore, GeneBertConfig, GeneBertForPhenotypicMLM, GeneTokenizer, STFormerPretrainer


class WaitForPush(TrainerCallback):
    """Trainer uploads beside training and writes the next step into the same folder, files half sent or not."""

    trainer = None

    def on_save(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


def main() -> None:
    path, folder = sys.argv[1:]
    torch.set_num_threads(1)
    store = CellStore(path)
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["cell_type"], bin_edges=[0.5, 1.5])
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )
    wait = WaitForPush()
    for strategy in ("end", "every_save", "checkpoint"):
        trainer = STFormerPretrainer(
            TrainingArguments(
                f"{folder}/{strategy}",
                max_steps=2,
                per_device_train_batch_size=4,
                save_strategy="steps",
                save_steps=1,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                push_to_hub=True,
                hub_model_id=f"someone/{strategy}",
                hub_token="hf_of_nobody",
                hub_strategy=strategy,
            ),
            store,
            model=GeneBertForPhenotypicMLM(config),
            processing_class=tokenizer,
            callbacks=[wait],
        )
        wait.trainer = trainer
        trainer.train()
        if strategy == "end":
            trainer.push_to_hub(license="cc-by-4.0", tags="blood")


main()
