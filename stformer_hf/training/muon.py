"""Muon for the matrices of the layers, AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments


def muon_for_matrices(
    model: PreTrainedModel, args: TrainingArguments, momentum: float = 0.95
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return Trainer's `optimizer_cls_and_kwargs`: Muon for the linear layers of an encoder, AdamW for the rest.

    Parameters
    ----------
    model : PreTrainedModel
        An encoder whose base model has `layers`, or a model with such an encoder and a head.
    args : TrainingArguments
        `learning_rate`, `adam_beta1`, `adam_beta2` and `adam_epsilon` are read. The updates of matrices are scaled to
        the size of AdamW's, so that one learning rate and one weight decay serve both.
    momentum : float, default: 0.95
        Momentum of Muon.

    Raises
    ------
    ImportError
        torch has no Muon: versions before 2.9.
    ValueError
        The model has no matrices to train in `layers`.

    Examples
    --------
    >>> chosen = muon_for_matrices(model, args)
    >>> STFormerPretrainer(args, store, model=model, processing_class=tokenizer, optimizer_cls_and_kwargs=chosen)

    Notes
    -----
    Jordan et al. 2024; scaled as by Liu et al. 2025, arXiv 2502.16982.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or use AdamW.")
    layers = getattr(getattr(model, "base_model", model), "layers", None)
    linear = [] if layers is None else [part for part in layers.modules() if isinstance(part, nn.Linear)]
    matrices = [part.weight for part in linear if part.weight.requires_grad]
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no matrices to train in its layers: use AdamW.")
    betas = args.adam_beta1, args.adam_beta2
    settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "momentum": momentum}
    return MuonAndAdamW, {"matrices": matrices, **settings}


class MuonAndAdamW(torch.optim.Optimizer):
    """One optimizer of two: Muon for some of the parameters, the `matrices`, fused AdamW for all others.

    Groups of parameters may set `weight_decay`. Other arguments are those of `torch.optim.AdamW` and
    `torch.optim.Muon`. The matrices must be among the parameters, which they are not after sharding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Sequence[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        groups = list(params)
        groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
        of_muon = {id(matrix) for matrix in matrices}
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            for muon in parts:
                chosen = [parameter for parameter in group["params"] if (id(parameter) in of_muon) == muon]
                if chosen:
                    parts[muon].append({"weight_decay": weight_decay, **group, "params": chosen, "muon": muon})
        if sum(len(group["params"]) for group in parts[True]) != len(of_muon):
            raise ValueError(
                "Some of the matrices are not among the parameters. Choose them from the model that is trained; "
                "sharded models (FSDP, DeepSpeed) are not supported."
            )
        self._muon = torch.optim.Muon(parts[True], lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(parts[False], lr, betas, eps, fused=True)
        super().__init__(self._muon.param_groups + self._adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers see these groups and this state, which loading a checkpoint replaces."""
        for one, muon in ((self._muon, True), (self._adamw, False)):
            one.param_groups = [group for group in self.param_groups if group["muon"] == muon]
            one.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make a step with both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        self._muon.step()
        self._adamw.step()
        return loss
