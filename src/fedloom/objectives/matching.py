"""Distribution matching: how far mean features of synthetic rows are from those of real ones, by class.

Source: Xiong et al. 2022, FedDM, https://arxiv.org/abs/2207.09653; Zhao and Bilen 2021, "Dataset
Condensation with Distribution Matching", https://arxiv.org/abs/2110.04181.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return ``(classes, width)`` means of features, and ``(classes,)`` how many rows each is over.

    Args:
        features: ``(rows, width)``.
        labels: ``(rows,)`` int64 in [0, classes).
        classes: How many there are; the mean of one without a row is 0.
    """
    sums = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)
    counts = torch.bincount(labels, minlength=classes)
    return sums / counts.clamp(min=1).unsqueeze(1), counts


def matching_loss(real: Tensor, synthetic: Tensor) -> Tensor:
    """Return sum_c ||mean of X_c - mean of S_c||^2.

    Args:
        real: ``(classes, width)`` means of real rows.
        synthetic: Of the same shape.
    """
    return (synthetic - real).square().sum()
