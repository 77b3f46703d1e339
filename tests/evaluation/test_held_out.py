"""Held-out sets of instructions that are judged by choices and by own answers."""

import pytest
import torch

from fedloom.batch import Sequences
from fedloom.data.batches import TokenShare
from fedloom.data.examples import Choice, Instruction, as_choice
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import Ask, generate, load_encoder
from fedloom.evaluation.held_out import Answering, HeldOut
from fedloom.evaluation.metrics import answer_metrics
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.objectives.logps import completion_logps

CHOICES = (" yes", " no, not at all", " maybe")


@pytest.fixture(scope="module")
def encoder(model_folder):
    return load_encoder(str(model_folder))


@pytest.fixture(scope="module")
def model(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    return AdapterModel(attach_adapter(backbone, AdapterSettings(rank=4)), pad=0)


def test_choices_one_by_one(model, encoder):
    rows = [Instruction(i, f"Question {'more ' * i}?", CHOICES[i % 3]) for i in range(7)]
    tokens = tokenize([as_choice(row, CHOICES) for row in rows], encoder, 64)
    assert tokens.width == 3 and tokens.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    found = HeldOut(TokenShare(tokens), "choice", 0.1, 1.0, batch_size=3).score(model)
    right = 0
    for row in rows:
        losses = []
        for choice in CHOICES:
            alone = tokenize([Instruction(0, row.prompt, choice)], encoder, 64)
            ids = torch.tensor(alone.tokens[None].astype("int64"))
            positions = torch.arange(ids.shape[1])[None]
            mask = positions >= int(alone.prompts[0])
            batch = Sequences(ids, torch.ones_like(ids), mask, int(alone.prompts[0]))
            with model.evaluating():
                losses.append(float(-completion_logps(model, batch)) / int(mask.sum()))
        right += losses.index(min(losses)) == CHOICES.index(row.completion)
    assert found["accuracy"] == pytest.approx(right / 7)


def test_a_choice_that_is_none():
    with pytest.raises(ValueError, match="not in tuple"):
        as_choice(Instruction(0, "a", "perhaps"), CHOICES)
    assert as_choice(Instruction(4, "a", " maybe"), CHOICES) == Choice(4, "a", CHOICES, 2)


def test_own_answers_are_judged(model, encoder):
    rows = [Instruction(i, f"Ada asks {'again ' * i}:", " it is here") for i in range(5)]
    accepted = [(row.completion, "somewhere") for row in rows]
    held_out = HeldOut(
        TokenShare(tokenize(rows, encoder, 64)),
        "answer",
        0.1,
        1.0,
        2,
        Answering(encoder, 6, accepted),
    )
    before = model.flops
    found = held_out.score(model)
    answers = generate(
        model.model, encoder, [Ask(tuple(encoder.prompt(row.prompt))) for row in rows], 6
    )
    assert found == answer_metrics(answers, accepted)
    assert model.flops > before
