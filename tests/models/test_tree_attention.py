"""Attention sequence by sequence: what a mask of all pairs of places says, without what that hides."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedloom.data.batching import collate, read_once
from fedloom.data.client_rows import TokenShare
from fedloom.data.tokenize import TokenSet
from fedloom.models import tree_attention
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.objectives.logps import completion_logps
from fedloom.training.shared_prompts import shares_prompts


def answers(prompt, *lengths):
    """Return answers of so many tokens to one prompt of so many."""
    generator = np.random.default_rng(0)
    opening = generator.integers(5, 200, prompt)
    parts = [
        np.concatenate([opening, generator.integers(5, 200, n)]).astype(np.int32) for n in lengths
    ]
    sizes, count = [len(part) for part in parts], len(parts)
    return TokenSet(
        1, np.arange(count), np.arange(count), np.concatenate(parts),
        np.concatenate([np.arange(n) >= prompt for n in sizes]), np.concatenate([[0], np.cumsum(sizes)]),
        np.full(count, prompt), np.zeros((count, 2), np.int64), np.zeros(count, bool), np.full(count, -1), (),
    )  # fmt: skip


GROUPS = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5])]


def test_of_a_row_it_is_what_the_mask_says():
    reading = read_once(answers(4, 3, 2, 5, 1, 2, 6), GROUPS, pad=0)
    assert reading.segments == ((4, 7, 9, 14), (4, 5, 7), (9, 10))
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 3, 2, 14, 8, generator=generator)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=reading.seen())

    def part(q, k, v, mask):
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return found.transpose(1, 2)

    for row, segments in enumerate(reading.segments):
        own = (tensor[row : row + 1] for tensor in (query, key, value))
        found = tree_attention._row(part, *own, segments)[0].transpose(0, 1)
        torch.testing.assert_close(
            found[:, : segments[-1]], expected[row, :, : segments[-1]], rtol=0, atol=1e-6
        )
        assert not found[:, segments[-1] :].any()  # padding


@pytest.fixture
def model(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    found = AdapterModel(attach_adapter(backbone, AdapterSettings(rank=2)), 0)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn))
    return found


def test_a_model_says_the_same_with_the_same_gradients(model, monkeypatch):
    rows, real = [], tree_attention._row
    monkeypatch.setattr(tree_attention, "_row", lambda *own: rows.append(own[-1]) or real(*own))
    share = TokenShare(answers(60, 30, 41, 22, 8, 19, 50))
    read = collate(share, np.arange(6), 0, model.device, groups=GROUPS).sequences

    def said():
        logps = completion_logps(model, read)
        found = torch.autograd.grad(
            (logps * torch.arange(1, 7)).sum(), list(model.parameters.values())
        )
        return logps.detach(), torch.cat([own.flatten() for own in found])

    assert model.tree_from == tree_attention.NEVER
    (logps, slope), none = said(), list(rows)
    assert none == []
    assert shares_prompts(model, 100) and model.tree_from == tree_attention.LEAST
    rows.clear()
    again, steep = said()  # 153 places
    blocks = model.model.config.num_hidden_layers
    assert rows == list(read.shared.segments) * blocks
    torch.testing.assert_close(again, logps, rtol=1e-6, atol=1e-5)
    assert (steep - slope).norm() < 1e-5 * slope.norm()
    rows.clear()
    model.tree_from = read.shared.input_ids.shape[1] + 1
    assert torch.equal(said()[0], logps) and rows == []


def test_where_it_would_say_something_else_the_mask_stays(model, monkeypatch):
    monkeypatch.setattr(tree_attention, "_row", lambda part, query, *own: query.transpose(1, 2))
    assert shares_prompts(model, 100)
    assert model.tree_from == tree_attention.NEVER
