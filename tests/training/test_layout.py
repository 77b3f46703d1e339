"""Passes of an optimizer batch: which rows go together, and that nothing else changes with it."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.accounting.memory import activation_bytes
from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.heads import PersonalModules, attach_personal
from fedloom.models.load import load_backbone
from fedloom.objectives import KTO, OBJECTIVES
from fedloom.objectives.base import StatisticObjective
from fedloom.training.layout import (
    GRAPHS,
    Budget,
    budget_of,
    graph_tokens,
    passes,
    row_costs,
    scoring_budget,
    tokens_per_pass,
)
from fedloom.training.memory import client_memory, pass_warnings
from fedloom.training.passes import StepLayout
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally
from one_step import gradients

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
        classes = objective.outputs or classes
        encoder = load_encoder(str(model_folder), compares=objective.compares)
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


def test_passes_pad_where_another_pass_would_cost_more():
    costs, rows = np.array([121, 33, 80, 36]), np.arange(4)

    def cut(each):
        return [own.tolist() for own in passes(costs, rows, Budget(8, 256, each))]

    assert cut(None) == [[0, 2], [3, 1]]  # as full as may be: 242 + 72 places
    assert cut(16) == [[0], [2], [3, 1]]  # 121 + 80 + 72 places and three passes: 321, not 346
    assert cut(50) == [[0, 2], [3, 1]]  # 314 + 100, not 273 + 150
    assert cut(0) == [[0], [2], [3], [1]]


@pytest.mark.parametrize("seed", range(8))
def test_no_passes_cost_less(seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 60, 7)
    budget = Budget(int(rng.integers(1, 8)), int(rng.integers(40, 200)), int(rng.integers(0, 40)))
    rows = np.arange(7)
    order = np.argsort(-costs, kind="stable")

    def cost(cut):
        return sum(len(own) * costs[own].max() + budget.each for own in cut)

    def allowed(cut):
        within = [len(own) * costs[own].max() <= max(budget.tokens, costs.min()) for own in cut]
        return all(len(own) <= budget.rows for own in cut) and all(
            ok or len(own) == 1 for ok, own in zip(within, cut, strict=True)
        )

    every = (
        np.split(order, places)
        for count in range(7)
        for places in map(list, itertools.combinations(range(1, 7), count))
    )
    found = passes(costs, rows, budget)
    assert allowed(found) and sorted(np.concatenate(found)) == rows.tolist()
    assert cost(found) == min(cost(cut) for cut in every if allowed(cut))


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
    assert budget_of(TrainingSettings(), model) == Budget(8, 2048, each=256)
    assert budget_of(TrainingSettings(micro_batch_size=2), model) == Budget(2)
    for counted in ({"micro_batch_size": 2}, {"accumulation": 4}):
        assert budget_of(TrainingSettings(**counted), model) == Budget(2)
    assert scoring_budget(TrainingSettings(micro_batch_size=2), model) == Budget(16)
    assert scoring_budget(TrainingSettings(batch_size=40), model) == Budget(40, 2048, each=256)
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
    tokens_of, causal = share.tokens, objective.head == "causal"
    asked = tokens_of.width == 2 or objective.needs_mismatched
    asked = asked or (causal and len(np.unique(tokens_of.prompt_numbers)) < len(share))
    assert model.shared_prompts is (causal if asked else None)  # heads of a whole row share nothing
    assert (model.head is not None) is causal
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-5)
    assert (parts.examples, parts.tokens, parts.targets) == (
        whole.examples,
        whole.tokens,
        whole.targets,
    )
    again, _ = gradients(objective, model, share, tokens_per_pass=tokens)
    assert torch.equal(again, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_final_adapters_are_those_of_padded_batches(party, name):
    """Six steps of SGD, which makes no more of rounding than the gradient does (Adam divides by its size)."""
    objective, model, share = party(name)
    start = model.read()

    def train(**settings):
        model.write(start)
        train_locally(
            model, share, objective, TrainingSettings(batch_size=5, optimizer="sgd", max_grad_norm=1.0, **settings),
            learning_rate=0.05, seed=0, client=0, round=1, work=Work(steps=6),
        )  # fmt: skip
        return torch.cat([tensor.flatten() for tensor in model.read().values()]).double()

    def padded():
        kept, model.shared_prompts, model.__dict__["head"] = model.shared_prompts, False, None
        try:
            return train(micro_batch_size=5)
        finally:
            model.shared_prompts = kept
            del model.__dict__["head"]

    first = torch.cat([tensor.flatten() for tensor in start.values()]).double()
    expected = padded()
    tokens = int(row_costs(share).max()) * 3 // 2
    found = train(tokens_per_pass=tokens)
    assert (expected - first).norm() > 0.01
    assert (found - expected).norm() < 1e-4 * (expected - first).norm()
    assert torch.equal(train(tokens_per_pass=tokens), found)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_number_of_threads_changes_rounding_alone(party, name):
    """And with so many the same bits each time. Sums may be cut otherwise, which MKL and oneDNN choose."""
    objective, model, share = party(name)
    tokens, before = int(row_costs(share).max()) * 3 // 2, torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            own, _ = gradients(objective, model, share, tokens_per_pass=tokens)
            assert torch.equal(own, found.setdefault(threads, own))
    finally:
        torch.set_num_threads(before)
    assert (found[2] - found[1]).norm() < 1e-5 * found[1].norm()


def behind_long_prompts(tokens):
    """Return rows with 60 more tokens before each, others for each row."""
    parts = [
        np.concatenate(
            [(np.arange(60) * (row + 7) % 200 + 5).astype(np.int32), tokens.sequence(row)[0]]
        )
        for row in range(len(tokens))
    ]
    masks = [np.concatenate([np.zeros(60, bool), tokens.mask(row)]) for row in range(len(tokens))]
    return replace(
        tokens, tokens=np.concatenate(parts), trained=np.concatenate(masks), prompts=tokens.prompts + 60,
        starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])]),
    )  # fmt: skip


@pytest.fixture
def long_prompts(party):
    """Build an objective on single answers, a model, and rows of long prompts and short answers."""

    def build(name):
        objective, model, share = party(name)
        mixed = None if share.mismatched is None else behind_long_prompts(share.mismatched)
        share = TokenShare(behind_long_prompts(share.tokens), mixed)
        return objective, model, add_reference_logps(model, share, Budget(10))

    return build


POOLED = [name for name in OBJECTIVES if issubclass(OBJECTIVES[name][1], StatisticObjective)]


@pytest.mark.parametrize("name", POOLED)
def test_a_statistic_of_the_batch_takes_no_pass_of_its_own(long_prompts, name, monkeypatch):
    objective, model, share = long_prompts(name)
    longest = int(row_costs(share).max())
    settings = TrainingSettings(batch_size=len(share), tokens_per_pass=longest * 3 // 2)
    expected, whole = gradients_of_one_padded_batch(objective, model, share)
    several, _ = gradients(objective, model, share, tokens_per_pass=longest)  # by passes of its own
    assert (several - expected).norm() < 1e-5 * expected.norm()

    def refuse(*_):
        raise AssertionError("a pass of its own")

    monkeypatch.setattr(type(objective), "statistics", refuse)
    before = model.flops
    found, parts = gradients(objective, model, share, tokens_per_pass=settings.tokens_per_pass)
    spent, before = model.flops - before, model.flops
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-5)
    again, _ = gradients(objective, model, share, tokens_per_pass=settings.tokens_per_pass)
    assert torch.equal(again, found)
    before = model.flops
    laid_out = StepLayout(model, share, budget_of(settings, model), 1 << 30)
    for batch in laid_out.batches(np.arange(len(share))):
        assert (batch.joint is None) is (share.mismatched is None)
        model.count_reading(batch.joint or batch.sequences)
    assert spent == pytest.approx(model.flops - before, rel=1e-12)
    with pytest.raises(AssertionError, match="a pass of its own"):
        gradients(objective, model, share, tokens_per_pass=longest)


def test_how_many_graphs_are_held(long_prompts):
    _, model, share = long_prompts("kto")
    whole = int(GRAPHS // activation_bytes(model.shape))
    assert whole > 10_000
    assert graph_tokens(TrainingSettings(), model, 500) == whole
    assert graph_tokens(TrainingSettings(precision="bf16"), model, 500) // 2 == whole
    assert graph_tokens(TrainingSettings(tokens_per_pass=501), model, 500) == whole
    # memory is short: the longest row has a pass of its own, or examples are counted
    assert graph_tokens(TrainingSettings(tokens_per_pass=500), model, 500) == 0
    assert graph_tokens(TrainingSettings(micro_batch_size=8), model, 500) == 0
    # what is held is told: 4 rows of the longest, with their mismatched completions, in place of a pass
    own = share.tokens.lengths + share.mismatched.lengths
    own -= np.minimum(share.tokens.prompts, share.mismatched.prompts)
    budget, settings = (
        Budget(10, 200),
        TrainingSettings(batch_size=4, tokens_per_pass=int(own.max())),
    )
    plain, held = (client_memory(model, share, settings, "none", own) for own in (None, KTO()))
    less = held - plain
    places = 4 * int(own.max()) - int(row_costs(share).max())
    assert less == pytest.approx(places * activation_bytes(model.shape))
    rows = np.arange(len(share))
    needed = StepLayout(model, share, budget, 1 << 30).joint.places(rows)
    for graphs, joint in ((needed, True), (needed - 1, False), (0, False)):
        found = StepLayout(model, share, budget, graphs).batches(rows)
        assert {batch.joint is not None for batch in found} == {joint}


def masked(share, rows):
    """Return a share in which nothing counts of some rows."""
    trained, width = share.tokens.trained.copy(), share.tokens.width
    for row in rows:
        trained[share.tokens.starts[row * width] : share.tokens.starts[(row + 1) * width]] = False
    return replace(share, tokens=replace(share.tokens, trained=trained))


def test_a_pass_in_which_nothing_counts_changes_nothing(party):
    objective, model, share = party("sft")
    shortest = np.argsort(share.tokens.lengths, kind="stable")[:2]
    share = masked(share, shortest)
    expected, whole = gradients_of_one_padded_batch(objective, model, share)
    found, parts = gradients(objective, model, share, micro_batch_size=2)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


@pytest.mark.parametrize("name", [n for n, (_, own) in OBJECTIVES.items() if own.head == "causal"])
def test_a_batch_in_which_nothing_counts_is_left_out_and_counted(party, name):
    objective, model, share = party(name, rows=4)
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
    assert np.isfinite(some.metrics["loss"])
    assert some.steps == 2 and some.metrics["skipped_steps"] == 2.0


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
