"""Answers: seeded by their prompt, whatever they are batched with; draws from the softmax."""

import numpy as np
import pytest
import torch

from fedloom.evaluation.generate import Ask, _Sampler, generate, load_encoder
from fedloom.models.adapters import AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone


@pytest.fixture(scope="module")
def model(model_folder):
    return load_backbone(str(model_folder), pad_token_id=0).eval(), load_encoder(str(model_folder))


def asked(encoder, text, temperature=0.0, seed=0):
    return Ask(tuple(encoder.prompt(text)), temperature, seed)


def answers(model, asks, batch_size):
    return generate(*model, [asked(model[1], *ask) for ask in asks], 12, batch_size)


def test_an_answer_does_not_depend_on_its_batch(model):
    asks = [(f"Question {'long ' * i}?", 0.9 * (i % 2), i) for i in range(6)]
    together = answers(model, asks, 6)
    assert together == answers(model, asks, 1) == answers(model, asks, 4)
    backwards = answers(model, asks[::-1], 3)
    assert backwards[::-1] == together


def test_the_seed_decides_above_zero_and_not_at_zero(model):
    hot = [answers(model, [("Once", 2.0, seed)], 1)[0] for seed in range(4)]
    cold = [answers(model, [("Once", 0.0, seed)], 1)[0] for seed in range(4)]
    assert len(set(hot)) > 1 and len(set(cold)) == 1


def test_draws_follow_the_softmax():
    scores = torch.tensor([[1.0, 0.0, -1.0]])
    sampler = _Sampler([Ask((), 0.5, 7)])
    drawn = np.bincount([int(sampler(None, scores).argmax()) for _ in range(4000)], minlength=3)
    expected = torch.softmax(scores[0] / 0.5, -1).numpy()
    assert drawn / 4000 == pytest.approx(expected, abs=0.03)


def test_a_prompt_longer_than_the_context_keeps_its_end(model):
    assert len(answers(model, [("word " * 3000,)], 1)) == 1


def test_nothing_to_answer(model):
    assert generate(*model, [], 5) == []


@pytest.mark.parametrize("kind", ["prompt", "ptuning"])
def test_virtual_tokens_stand_next_to_the_text_whatever_the_batch(model_folder, kind):
    encoder = load_encoder(str(model_folder))
    settings = AdapterSettings(kind=kind, virtual_tokens=4)
    tuned = attach_adapter(load_backbone(str(model_folder), pad_token_id=0), settings).eval()
    asks = [asked(encoder, f"Question {'long ' * i}?") for i in range(3)]
    alone = [generate(tuned, encoder, [ask], 8)[0] for ask in asks]
    assert generate(tuned, encoder, asks, 8) == alone
