"""Passes of an optimizer batch: which rows go together, and that nothing else changes with it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.heads import PersonalModules, attach_personal
from fedloom.models.load import load_backbone
from fedloom.objectives import OBJECTIVES
from fedloom.training.layout import (
    Budget,
    budget_of,
    passes,
    row_costs,
    scoring_budget,
    tokens_per_pass,
)
from fedloom.training.memory import client_memory, pass_warnings
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally

SETS = {
    "instruction": "instructions",
    "preference": "preferences",
    "feedback": "feedback",
    "labelled": "labelled",
}


@pytest.fixture
def party(model_folder):
    """Build an objective, a model and one client's rows."""

    def build(name, rows=10):
        objective = OBJECTIVES[name][1]()
        examples = builtin_examples(SETS[objective.kind], rows, np.random.default_rng(0))
        classes = tuple(sorted({e.label for e in examples})) if name == "classification" else ()
        encoder = load_encoder(str(model_folder))
        backbone = load_backbone(str(model_folder), pad_token_id=0, classes=classes)
        adapted = attach_adapter(backbone, AdapterSettings(rank=2), classification=bool(classes))
        if objective.needs_reward:
            attach_personal(
                adapted, PersonalModules(bottleneck=4, head_mode="lowrank", reward=True), 0
            )
        model = AdapterModel(adapted, 0)
        drawn = torch.Generator().manual_seed(1)  # factors at 0 would hide gradients of the others
        with torch.no_grad():
            for parameter in model.parameters.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn))
        tokens = tokenize(examples, encoder, 128, classes)
        mixed = None
        if objective.needs_mismatched:
            mixed = mismatch(tokens, np.random.default_rng(1), 128, 1)
        share = TokenShare(tokens, mixed)
        if objective.needs_reference:
            share = add_reference_logps(model, share, Budget(rows))
        return objective, model, share

    return build


def gradients_of_one_padded_batch(objective, model, share):
    """Return what :func:`gradients` does, every sequence read by itself and all logits held."""
    kept, model.shared_prompts, model.__dict__["head"] = model.shared_prompts, False, None
    try:
        return gradients(objective, model, share, micro_batch_size=len(share))
    finally:
        model.shared_prompts = kept
        del model.__dict__["head"]


def gradients(objective, model, share, **settings):
    """Return the gradients of one optimizer batch of all rows, as one vector, and what was reported."""
    found = {}

    def note(parameters):
        found.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    start = model.read()
    result = train_locally(
        model,
        share,
        objective,
        TrainingSettings(batch_size=len(share), max_grad_norm=0, **settings),
        learning_rate=1e-3,
        seed=0,
        client=0,
        round=1,
        work=Work(steps=1),
        before_step=note,
    )
    model.write(start)
    return torch.cat([found[name].flatten() for name in sorted(found)]).double(), result


def test_rows_alike_in_length_go_together():
    # the longest two would take 2 x 9 = 18 places, the next two 2 x 8 = 16, a third of them 24
    costs = np.array([4, 9, 2, 5, 8, 4])
    found = passes(costs, np.arange(6), Budget(rows=6, tokens=17))
    assert [own.tolist() for own in found] == [[1], [4, 3], [0, 5, 2]]
    found = passes(costs, np.array([5, 1, 2]), Budget(rows=2, tokens=18))
    assert [own.tolist() for own in found] == [[1, 5], [2]]


def test_a_longer_row_has_a_pass_of_its_own():
    found = passes(np.array([30, 3, 40, 4]), np.arange(4), Budget(rows=4, tokens=8))
    assert [own.tolist() for own in found] == [[2], [0], [3, 1]]


def test_examples_are_counted_where_no_tokens_are():
    found = passes(np.array([3, 30, 4, 40, 5]), np.arange(5), Budget(rows=2))
    assert [own.tolist() for own in found] == [[3, 1], [4, 2], [0]]


def test_what_fits_one_pass_keeps_its_order():
    assert passes(np.array([3, 9]), np.array([0, 1]), Budget(2, 18))[0].tolist() == [0, 1]
    assert passes(np.zeros(0, np.int64), np.zeros(0, np.int64), Budget(2, 18))[0].tolist() == []


def wider(shape, width):
    return replace(shape, head=replace(shape.head, inputs=width))


def test_the_size_of_a_pass_follows_from_settings_and_model(party):
    _, model, _ = party("sft")
    assert model.shape.head.inputs == 32
    assert tokens_per_pass(TrainingSettings(), model) == 2048
    wide = SimpleNamespace(whole_batches=False, device=model.device, shape=wider(model.shape, 33))
    assert tokens_per_pass(TrainingSettings(), wide) == 1024
    wide.shape = wider(model.shape, 4096)
    assert tokens_per_pass(TrainingSettings(), wide) == 256
    wide.device = torch.device("cuda")
    assert tokens_per_pass(TrainingSettings(), wide) == 8192
    assert tokens_per_pass(TrainingSettings(tokens_per_pass=77), model) == 77
    assert budget_of(TrainingSettings(), model) == Budget(8, 2048)
    for counted in ({"micro_batch_size": 2}, {"accumulation": 4}):
        assert budget_of(TrainingSettings(**counted), model) == Budget(2)
    assert scoring_budget(TrainingSettings(micro_batch_size=2), model) == Budget(16)
    assert scoring_budget(TrainingSettings(batch_size=40), model) == Budget(40, 2048)
    model.whole_batches = True
    assert budget_of(TrainingSettings(), model) == Budget(8)


def test_two_ways_to_say_it_contradict_each_other():
    found = TrainingSettings(tokens_per_pass=64, micro_batch_size=2).contradictions()
    assert found == [
        "training.tokens_per_pass = 64 and training.micro_batch_size or training.accumulation both say how "
        "much a forward pass holds; leave one of them out"
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_one_padded_batch(party, name):
    objective, model, share = party(name)
    expected, whole = gradients_of_one_padded_batch(objective, model, share)
    tokens = int(row_costs(share).max()) * 3 // 2
    found, parts = gradients(objective, model, share, tokens_per_pass=tokens)
    assert len(passes(row_costs(share), np.arange(len(share)), Budget(10, tokens))) > 2
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert expected.norm() > 1e-4
    pairs, causal = objective.kind == "preference", objective.head == "causal"
    assert model.shared_prompts is (True if pairs else None)
    assert (model.head is not None) is causal
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-5)
    assert (parts.examples, parts.tokens, parts.targets) == (
        whole.examples,
        whole.tokens,
        whole.targets,
    )
    again, _ = gradients(objective, model, share, tokens_per_pass=tokens)
    assert torch.equal(again, found)


def masked(share, rows):
    """Return a share in which nothing counts of some rows, each of one sequence."""
    trained = share.tokens.trained.copy()
    for row in rows:
        trained[share.tokens.starts[row] : share.tokens.starts[row + 1]] = False
    return replace(share, tokens=replace(share.tokens, trained=trained))


def test_a_pass_in_which_nothing_counts_changes_nothing(party):
    objective, model, share = party("sft")
    shortest = np.argsort(share.tokens.lengths, kind="stable")[:2]
    share = masked(share, shortest)
    expected, whole = gradients_of_one_padded_batch(objective, model, share)
    found, parts = gradients(objective, model, share, micro_batch_size=2)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


def test_a_batch_in_which_nothing_counts_is_left_out_and_counted(party):
    objective, model, share = party("sft", rows=4)
    start = model.read()
    settings = TrainingSettings(batch_size=2)
    options = {"learning_rate": 1e-2, "seed": 0, "client": 0, "round": 1}

    def train(share, work):
        model.write(start)
        return train_locally(model, share, objective, settings, work=work, **options)

    nothing = train(masked(share, range(4)), Work(epochs=1))
    assert nothing.metrics == {"skipped_steps": 2.0} and nothing.steps == 0
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.read().items())
    some = train(masked(share, range(3)), Work(epochs=2))  # one row of four counts
    assert some.steps == 2 and some.metrics["skipped_steps"] == 2.0
    assert np.isfinite(some.metrics["loss"])


def test_rows_of_more_tokens_than_were_asked_for_are_told(party):
    _, model, share = party("sft", rows=6)
    costs = np.sort(row_costs(share))

    def told(tokens):
        training = TrainingSettings(tokens_per_pass=tokens)
        return pass_warnings(training, "none", {4: (model, share)})

    assert told("auto") == told(int(costs[-1])) == []
    needed = client_memory(model, share, TrainingSettings(tokens_per_pass=1), "none") / 1e9
    longest = f"the longest has {costs[-1]} (client 4); its pass takes about {needed:.1f} GB"
    assert costs[-2] < costs[-1] and costs[0] > 1
    assert told(int(costs[-1]) - 1) == [
        f"training rows of more tokens than training.tokens_per_pass = {costs[-1] - 1}, each of which has a "
        f"pass of its own: 1; {longest}"
    ]
    assert told(1) == [
        f"training.tokens_per_pass = 1 is less than any row has: it is raised to {costs[0]}, and rows of "
        f"more tokens have a pass of their own; {longest}"
    ]
    assert len(passes(row_costs(share), np.arange(6), Budget(6, 1))) == 6
