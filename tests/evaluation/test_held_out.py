"""Held-out sets of instructions that are judged by choices and by own answers."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from fedloom.data.batch import Sequences
from fedloom.data.client_rows import TokenShare
from fedloom.data.examples import Choice, Feedback, Instruction, Preference, as_choice
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import Ask, generate, load_encoder
from fedloom.evaluation.held_out import Answering, HeldOut
from fedloom.evaluation.metrics import PRIMARY_METRICS, answer_scores
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.objectives.logps import completion_logps
from fedloom.statistics.intervals import sample_interval

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


KINDS = {
    "instruction": lambda i: Instruction(i, f"Ask {'more ' * (9 - i)}:", f" it is {'so ' * i}"),
    "preference": lambda i: Preference(i, f"Ask {'more ' * i}:", " yes" * (i + 1), " no"),
    "feedback": lambda i: Feedback(i, f"Ask {'more ' * (9 - i)}:", f" word {i}", i % 3 == 0),
    "choice": lambda i: Choice(i, f"Ask {'more ' * (9 - i)}:", CHOICES, i % 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_rows_add_makes_the_metric_whatever_their_batches(kind, model, encoder):
    """Batches are made by length, and each row stands where it stood."""
    tokens = tokenize([KINDS[kind](i) for i in range(9)], encoder, 64)
    one, other = (HeldOut(TokenShare(tokens), kind, 0.1, 1.0, size) for size in (9, 2))
    for held_out in (one, other):
        assert held_out.sample is None
        held_out.share = replace(held_out.share, reference_logps=torch.zeros(9 * tokens.width))
    metrics = one.score(model)
    other.score(model)
    name = PRIMARY_METRICS[kind].name
    assert one.sample.metric == name and len(one.sample.totals) == 9
    assert sample_interval(one.sample).estimate == pytest.approx(metrics[name])
    assert one.sample.totals == pytest.approx(other.sample.totals, abs=1e-4)
    if kind == "instruction":
        assert one.sample.weights == tuple(map(float, tokens.completion_lengths))


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
    assert found == {"rouge_l": fmean(answer_scores(answers, accepted))}
    assert model.flops > before
