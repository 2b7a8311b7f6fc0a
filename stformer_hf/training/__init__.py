"""Trainers, callbacks, checkpoints, objectives, starts and model cards.

`CellTrainer`, `ObjectiveTrainer` (losses on `[CLS]`) and `STFormerPretrainer` build on one another, in this order. The
losses of the model's own heads are in `models/gene_bert/heads.py`.
"""
