"""What activations give away: the server of a split model reads its clients' texts from them.

    python examples/activation_inversion.py

The server knows the client's blocks (it averages their adapters, the backbone is public). So it can try
every token of the vocabulary in turn, run the front half, and keep the token whose activation lies
nearest to the one it was sent. This recovers nearly every token of an undisturbed text;
``method.activation_noise`` makes it harder, at a price in accuracy that only a run can tell. It is a
simple attack: what survives it may still fall to a better one, and the noise guarantees nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.models.split_model import ClientPart
from fedloom.runs.model_building import prepare_model

NOISES = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Shares of the activations' root mean square, as ``method.activation_noise`` counts."""


def front_half(cut: int) -> tuple[ClientPart, object]:
    """Return the first blocks of the tiny model, as a client has them, and its tokenizer."""
    path, encoder, _ = prepare_model(Experiment(), (), print)
    tokenizer = encoder.tokenizer
    backbone = load_backbone(path, pad_token_id=tokenizer.pad_token_id, blocks=cut)
    model = attach_adapter(backbone, AdapterSettings())
    return ClientPart(model, tokenizer.pad_token_id, tail=False), tokenizer


@torch.no_grad()
def invert(front: ClientPart, sent: torch.Tensor, vocabulary: int) -> list[int]:
    """Return the tokens whose activations lie nearest to ``sent``, ``(tokens, hidden)``, one by one."""
    found: list[int] = []
    candidates = torch.arange(vocabulary).unsqueeze(1)
    for activation in sent:
        prefix = torch.tensor([found], dtype=torch.long).expand(vocabulary, -1)
        ids = torch.cat([prefix, candidates], dim=1)
        tried = front(input_ids=ids, attention_mask=torch.ones_like(ids))[:, -1]
        found.append(int((tried - activation).square().sum(-1).argmin()))
    return found


def recovered(front: ClientPart, tokenizer: object, texts: list[str], noise: float) -> float:
    """Return the share of the texts' tokens that the server gets right under noise."""
    right = total = 0
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:12]])  # type: ignore[operator]
        with torch.no_grad():
            (sent,) = front(input_ids=ids, attention_mask=torch.ones_like(ids))
        size = noise * sent.square().mean().sqrt()
        sent = sent + size * torch.randn(sent.shape, generator=generator)
        guessed = invert(front, sent, len(tokenizer))  # type: ignore[arg-type]
        right += sum(a == b for a, b in zip(guessed, ids[0].tolist(), strict=True))
        total += ids.numel()
    return right / total


def main(texts: int = 8, cut: int = 1) -> dict[float, float]:
    """Print and return the share of tokens recovered at each noise."""
    torch.set_num_threads(1)
    front, tokenizer = front_half(cut)
    rows = builtin_examples("labelled", texts, np.random.default_rng(0))
    shares = {}
    print("noise  tokens the server recovers")
    for noise in NOISES:
        shares[noise] = recovered(front, tokenizer, [row.text for row in rows], noise)
        print(f"{noise:5.1f}  {shares[noise]:.2f}")
    return shares


if __name__ == "__main__":
    main()
