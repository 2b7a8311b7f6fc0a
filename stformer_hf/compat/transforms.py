"""Transforms of the items of an `AnnDataset`: each takes the dictionary of one cell and returns a changed one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

from ..models.gene_bert.configuration_gene_bert import IGNORE


class Transform(ABC):
    """A transform applied to each cell after reading.

    Subclasses define `__call__`; for use in spawned workers, they must be at the top level of a module. The dictionary
    is a copy: a transform may change it, and the tensors in it, in place.
    """

    @abstractmethod
    def __call__(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """Transform one cell.

        Parameters
        ----------
        data_dict : dict
            `X`, float32 tensor (n_vars,), and `obs_<column>`, a tensor () or a str.

        Returns
        -------
        dict
            The same or another dictionary; all cells of a batch must have the same keys.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Compose(Transform):
    """Apply multiple transforms in sequence.

    Parameters
    ----------
    transforms : iterable of Transform
        In the order of application. No transform raises a ValueError, anything else than a `Transform` a TypeError.
    """

    def __init__(self, transforms: Iterable[Transform]):
        self.transforms = list(transforms)
        if not self.transforms:
            raise ValueError("Compose needs at least one transform; to change nothing, pass transform=None.")
        for transform in self.transforms:
            check_transform(transform)

    def __call__(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """Apply all transforms."""
        for transform in self.transforms:
            data_dict = transform(data_dict)
        return data_dict

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.transforms))}])"


class NormalizeRowSum(Transform):
    """Scale a cell to a fixed sum: X * target_sum / sum(X), after setting negative values to 0.

    A cell without counts stays 0.

    Parameters
    ----------
    target_sum : float, default: 1e4
        Sum of each scaled cell, above 0 (else a ValueError is raised).
    """

    def __init__(self, target_sum: float = 1e4):
        if not target_sum > 0:
            raise ValueError(f"target_sum={target_sum}: must be above 0.")
        self.target_sum = target_sum

    def __call__(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """Scale `X`."""
        values = torch.clamp(data_dict["X"], min=0)
        total = values.sum(dim=-1, keepdim=True) + 1e-8  # avoids 0 / 0 for cells without counts
        data_dict["X"] = values * (self.target_sum / total)
        return data_dict

    def __repr__(self) -> str:
        return f"NormalizeRowSum(target_sum={self.target_sum})"


class LogTransform(Transform):
    """Replace X by log(1 + X)."""

    def __call__(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """Transform `X`."""
        data_dict["X"] = torch.log1p(data_dict["X"])
        return data_dict


class EncodeLabels(Transform):
    """Add the number of a label, next to the label.

    Without an encoder, and for cells without the obs column, nothing is added. A missing label (the empty string, or
    NaN in numeric columns) gets -100, which torch's cross entropy ignores.

    Parameters
    ----------
    obs_key : str, default: "cell_type"
        Column of obs.
    encoded_key : str, optional
        Key of the number; `obs_<obs_key>_encoded` by default.
    label_encoder : object with `transform`, optional
        Fitted encoder, such as scikit-learn's `LabelEncoder`, which maps a list of labels to numbers.
    """

    def __init__(self, obs_key: str = "cell_type", encoded_key: str | None = None, label_encoder: Any = None):
        self.obs_key = obs_key
        self.encoded_key = encoded_key or f"obs_{obs_key}_encoded"
        self.label_encoder = label_encoder

    def __call__(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """Add the number of the label: int64 tensor (). One that the encoder does not know raises a ValueError."""
        label = data_dict.get(f"obs_{self.obs_key}")
        if label is None or self.label_encoder is None:
            return data_dict
        if isinstance(label, torch.Tensor):
            label = label.item()
        missing = label == "" or (isinstance(label, float) and math.isnan(label))
        data_dict[self.encoded_key] = torch.tensor(IGNORE if missing else self._number(label), dtype=torch.long)
        return data_dict

    def _number(self, label: Any) -> int:
        try:
            return int(self.label_encoder.transform([label])[0])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"obs column {self.obs_key!r}: the encoder does not know the label {label!r}. Fit it to the labels "
                "of all cells, or leave these cells out with obs_subset."
            ) from error

    def __repr__(self) -> str:
        return f"EncodeLabels(obs_key={self.obs_key!r}, encoded_key={self.encoded_key!r})"


def check_transform(transform: Any) -> None:
    """Raise a TypeError if an object is not a `Transform`."""
    if not isinstance(transform, Transform):
        raise TypeError(
            f"A transform must be an instance of a subclass of Transform, got {transform!r} "
            f"({type(transform).__name__}). Wrap functions in the __call__ of such a class."
        )
