"""Default settings of training, which commands show in their help; this file imports nothing."""

# For `finetune`. The learning rate is constant, so that a step does not depend on how many follow.
FINETUNING = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # which waits for a GPU in each step
    "save_total_limit": 2,
    "report_to": "none",
}
# Differences for models in which [CLS] is not the whole cell, such as PerturbGene's.
FINETUNING_REFERENCE = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
}
MAX_LENGTH = 8  # for a new whole-cell classifier: [CLS] reads all genes, and more tokens showed no benefit
