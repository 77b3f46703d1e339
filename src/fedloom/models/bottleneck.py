"""The bottleneck adapter of a client: a small residual network on what the backbone says.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP",
https://arxiv.org/abs/1902.00751, figure 2; as the module M of FedPDPO (https://arxiv.org/abs/2603.19741),
whose figure 2 shows one between the backbone and both heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """z + W_up gelu(W_down z), which is z at first because W_up and its bias start at zero."""

    def __init__(self, hidden: int, width: int) -> None:
        """Make one for states of ``hidden`` numbers with ``width`` numbers inside."""
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return ``(..., hidden)`` for ``(..., hidden)``."""
        inside: Tensor = self.up(F.gelu(self.down(states)))
        return states + inside
