"""Settings of training that commands show in their help: importing this file costs nothing."""

# Of `finetune`. A constant rate, so that a number of steps means the same, however many follow.
FINETUNING = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
}
# What differs where [CLS] is not the whole cell, as in PerturbGene's model.
FINETUNING_REFERENCE = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
}
MAX_LENGTH = 8  # of a new whole-cell classifier: [CLS] reads all genes, and more tokens were not seen to help

__all__ = ["FINETUNING", "FINETUNING_REFERENCE", "MAX_LENGTH"]
