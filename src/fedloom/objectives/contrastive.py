"""The model-contrastive term of MOON: tensors in, tensors out.

Source: Li, He and Song 2021, "Model-Contrastive Federated Learning", https://arxiv.org/abs/2103.16257,
equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    own: Tensor, shared: Tensor, previous: Sequence[Tensor], temperature: float
) -> Tensor:
    """Return -log(g / (g + sum_p e^(cos(z, z_p) / tau))) of each row, with g = e^(cos(z, z_g) / tau).

    Args:
        own: z, ``(rows, width)``: of the model in training, with a gradient.
        shared: z_g, of the same shape: of the model that was received.
        previous: z_p, each of the same shape: of the client's models of earlier rounds; none gives 0.
        temperature: tau, above 0.

    Returns:
        ``(rows,)`` float32, at least 0.
    """
    own = own.float()
    others = [shared, *previous]
    similar = torch.stack([F.cosine_similarity(own, other.float(), dim=1) for other in others], 1)
    return -F.log_softmax(similar / temperature, 1)[:, 0]


def text_means(states: Tensor, mask: Tensor) -> Tensor:
    """Return ``(texts, width)`` float32 means of the states of each text.

    Args:
        states: ``(tokens, width)``, text by text.
        mask: ``(texts, length)`` bool: which tokens of each they are of; 0 where there are none.
    """
    counts = mask.sum(1)
    texts = torch.repeat_interleave(torch.arange(len(mask), device=states.device), counts)
    sums = states.new_zeros(len(mask), states.shape[1], dtype=torch.float32)
    sums = sums.index_add(0, texts, states.float())
    return sums / counts.clamp(min=1).unsqueeze(1)
