"""Trainers, callbacks, checkpoints, objectives, starts and model cards.

The trainers build on one another: `MeasuredTrainer` (speed), `LossTrainer` (losses and their means),
`ResumableTrainer` (checkpoints and signals), `CellTrainer` (which cells, in which order), `ObjectiveTrainer` (losses
on `[CLS]`) and `STFormerPretrainer`. The losses of the model's own heads are in `models/gene_bert/heads.py`.
"""
