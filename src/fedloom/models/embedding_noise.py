"""Noise on the embeddings of tokens while training (NEFTune).

Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning",
https://arxiv.org/abs/2310.05914, algorithm 1: uniform in [-a, a] for each number, with
a = alpha / sqrt(L d) for a sequence of L tokens and embeddings of width d. Here L counts a row's own
tokens, and not its padding as transformers does: what else is in a pass changes nobody's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """A hook on the input embeddings that adds noise where gradients are computed in training.

    It is drawn from torch's own generator, which in local steps is a client's stream of dropout
    (``training/dropout.py``): by the seed, the purpose, the client and the round, step after step.

    Attributes:
        alpha: Above 0; papers use 5, 10 and 15.
        lengths: ``(rows,)`` tokens of each row of the next pass, padding not counted.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        """Hook onto a Hugging Face model, inside PEFT or not."""
        self.alpha = alpha
        self.lengths: Tensor | None = None
        embeddings: nn.Module = model.get_input_embeddings()
        embeddings.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not (module.training and torch.is_grad_enabled()) or output.ndim != 3:
            return output
        rows, length, width = output.shape
        lengths = self.lengths
        if lengths is None or len(lengths) != rows:
            lengths = torch.full((rows,), length, device=output.device)
        widest = self.alpha / (lengths.clamp(min=1) * width).sqrt()
        drawn = torch.rand(output.shape, device=output.device) * 2 - 1
        return output + (drawn * widest[:, None, None]).to(output.dtype)
