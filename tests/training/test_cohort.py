"""Clients that are trained in lockstep end where each would end by itself, and know nothing of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.tokenize import tokenize
from fedloom.errors import NonFiniteLoss
from fedloom.evaluation.generate import load_encoder
from fedloom.methods.bases.parameter_averaging import proximal_gradient
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.models.stacked_lora import reason_against
from fedloom.objectives import DPO, KTO, SFT
from fedloom.objectives.base import Objective
from fedloom.objectives.logps import completion_logps
from fedloom.training.cohort import cohort_size, groups, likeness, train_together
from fedloom.training.layout import Budget
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import Training

OBJECTIVES = {"sft": (SFT, "instructions"), "dpo": (DPO, "preferences"), "kto": (KTO, "feedback")}
ROWS = (9, 3, 6)
"""Of three clients: with batches of 4 they have 3, 1 and 2 steps, the last of them smaller."""

SGD = {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.5, "batch_size": 4}


def make_model(folder, **adapter):
    backbone = load_backbone(str(folder), pad_token_id=0)
    settings = AdapterSettings(**{"rank": 2, "dropout": 0.1, **adapter})
    return AdapterModel(attach_adapter(backbone, settings), 0)


@pytest.fixture
def clients(model_folder, once):
    """Return a model, its start, an objective and the rows of three clients."""

    def make(name):
        objective, source = OBJECTIVES[name][0](), OBJECTIVES[name][1]
        model, encoder = make_model(model_folder), load_encoder(str(model_folder))
        shares = []
        for client, rows in enumerate(ROWS):
            examples = builtin_examples(source, rows, np.random.default_rng(client))
            tokens = tokenize(examples, encoder, 128)
            mixed = None
            if objective.needs_mismatched:
                mixed = mismatch(tokens, np.random.default_rng(1), 128, 1)
            share = TokenShare(tokens, mixed)
            if objective.needs_reference:
                share = add_reference_logps(model, share, Budget(8))
            shares.append(share)
        start = {n: t + 0.02 * torch.randn(t.shape, generator=torch.Generator().manual_seed(len(n))) for n, t in model.read().items()}  # fmt: skip
        return model, start, objective, shares

    return lambda name: once(name, lambda: make(name))


def trainings(model, start, objective, shares, hook=lambda client: None, frozen=(), **settings):
    """Return what each client is to train, with what has the model hold it."""
    settings = TrainingSettings(**{**SGD, **settings})
    found = []
    for client, share in enumerate(shares):
        model.hold(model.parameters_of(start))
        options = {
            "learning_rate": settings.learning_rate, "seed": 3, "client": client, "round": 2,
            "work": Work(epochs=1), "before_step": hook(client),
        }  # fmt: skip
        own = Training(model, share, objective, settings, frozen, options)
        found.append((own, model.as_it_is()))
    return found


def one_by_one(*parts, **options):
    model, found = parts[0], []
    for training, put_back in trainings(*parts, **options):
        put_back()
        before = model.flops
        found.append((training.alone(), model.read(), model.flops - before))
    return found


def together(*parts, **options):
    own = trainings(*parts, **options)
    outcomes = train_together(*zip(*own, strict=True))
    found = []
    for outcome, (_, put_back) in zip(outcomes, own, strict=True):
        put_back()
        found.append((outcome.result, parts[0].read(), outcome.flops))
    return found


def difference(start, one, other):
    """Return by how much two adapters differ, as a share of how far one has moved."""
    moved = sum((one[name] - start[name]).square().sum() for name in start)
    apart = sum((one[name] - other[name]).square().sum() for name in start)
    return float((apart / moved).sqrt())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_client_ends_where_it_would_by_itself(clients, name):
    """With dropout, a proximal term, clipping, and clients that have fewer steps than others."""
    parts = clients(name)
    start = parts[1]
    options = {"hook": lambda client: proximal_gradient(start, 0.1), "max_grad_norm": 0.5}
    alone, stacked = one_by_one(*parts, **options), together(*parts, **options)
    for (result, adapter, flops), (found, other, counted) in zip(alone, stacked, strict=True):
        assert difference(start, adapter, other) < 1e-5
        assert counted == flops
        assert replace(found, metrics={}) == replace(result, metrics={})
        assert found.metrics == pytest.approx(result.metrics, rel=1e-4, abs=1e-6)
    again = together(*parts, **options)
    for (_, adapter, _), (_, other, _) in zip(stacked, again, strict=True):
        assert all(torch.equal(adapter[n], other[n]) for n in adapter)


def test_dropout_is_no_small_part_of_that(clients):
    """Other masks are seen: without any, the client ends a hundred times the tolerance away."""
    model, start, objective, shares = clients("sft")
    drops = [own for own in model.model.modules() if isinstance(own, torch.nn.Dropout)]
    (_, drawn, _), *_ = together(model, start, objective, shares)
    for own in drops:
        own.p = 0.0
    (_, other, _), *_ = together(model, start, objective, shares)
    for own in drops:
        own.p = 0.1
    assert difference(start, drawn, other) > 1e-3


def test_frozen_tensors_stay(clients):
    model, start, objective, shares = clients("sft")
    frozen = [name for name in start if ".lora_A." in name]
    stacked = together(model, start, objective, shares, frozen=frozen, optimizer="adamw", learning_rate=1e-3, momentum=0.0)  # fmt: skip
    alone = one_by_one(model, start, objective, shares, frozen=frozen, optimizer="adamw", learning_rate=1e-3, momentum=0.0)  # fmt: skip
    for (_, adapter, flops), (_, other, counted) in zip(alone, stacked, strict=True):
        assert all(torch.equal(other[name], start[name]) for name in frozen)
        assert difference(start, adapter, other) < 1e-4  # Adam divides by the gradient's own size
        assert counted == flops


def test_a_client_that_fails_is_no_other_clients_failure(clients):
    model, start, objective, shares = clients("sft")

    def hook(client):
        def spoil(parameters):
            for parameter in parameters.values():
                parameter.grad += float("nan")

        return spoil if client == 2 else None

    own = trainings(model, start, objective, shares, hook=hook, max_grad_norm=0.0)
    outcomes = train_together(*zip(*own, strict=True))
    assert isinstance(outcomes[2].error, NonFiniteLoss)
    assert "client 2" in str(outcomes[2].error)
    expected = one_by_one(model, start, objective, shares[:2], max_grad_norm=0.0)
    for (result, adapter, _), outcome, (_, put_back) in zip(expected, outcomes, own, strict=False):
        put_back()
        assert outcome.result.steps == result.steps
        assert difference(start, adapter, model.read()) < 1e-5


class Whole(Objective):
    """Calls the model itself for one half of its loss, which no cohort can share."""

    def loss(self, model, batch, statistics):
        sequences = batch.sequences
        out = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
        loss = out.logits.square().mean() - completion_logps(model, sequences).mean() / 100
        return loss, {}


def test_an_objective_that_calls_the_model_itself_has_passes_of_its_own(clients):
    model, start, _, shares = clients("sft")
    alone = one_by_one(model, start, Whole(), shares)
    for (_, adapter, _), (_, other, _) in zip(
        alone, together(model, start, Whole(), shares), strict=True
    ):
        assert all(torch.equal(adapter[name], other[name]) for name in adapter)


def test_rows_of_other_lengths_have_another_pass():
    # 3 is under three quarters of 10; 8 and 10 share a pass where 2 x 10 + 2 x 8 x 10 / 8 fit
    sizes = [(8, 16), (10, 20), (3, 6), (10, 10)]
    assert groups(sizes) == [[0, 1, 3], [2]]
    assert groups(sizes, 30) == [[1, 3], [0], [2]]
    assert groups(sizes, 5) == [[1], [3], [0], [2]]


def test_auto_is_a_table_of_width_and_rows(clients):
    model, _, _, shares = clients("sft")
    assert model.shape.head.inputs == 32
    one = min(cohort_size("auto", model, [share], 1) for share in shares)
    assert cohort_size(7, model, shares, 8) == 7
    assert 1 <= cohort_size("auto", model, shares, 1000) < one <= 32


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"kind": "ia3", "dropout": 0.0, "rank": 8}, "more is trained than LoRA's two factors"),
        ({"kind": "full", "dropout": 0.0, "rank": 8}, "more is trained than LoRA's two factors"),
        ({"targets": ["lm_head", "q_proj"]}, "the output layer is trained"),
    ],
)
def test_what_cannot_be_stacked_says_why(model_folder, adapter, reason):
    assert reason in reason_against(make_model(model_folder, **adapter))


def test_dropout_of_the_models_own_cannot_be_stacked(model_folder):
    model = make_model(model_folder)
    for layer in model.model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.1
    assert "dropout of its own" in reason_against(model)


def test_alike_are_those_of_one_shape_and_the_same_frozen_tensors(clients):
    model, start, objective, shares = clients("sft")
    (one, _), (other, _), _ = trainings(model, start, objective, shares)
    assert likeness(one) == likeness(other) != likeness(replace(one, frozen=(next(iter(start)),)))
