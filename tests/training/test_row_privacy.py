"""Row-level privacy: each unit's gradient, what one unit can move, and what must stay the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.objectives import BCO, DPO, KTO, SFT, Classification
from fedloom.privacy.noise import NoiseSource
from fedloom.training.layout import Budget
from fedloom.training.passes import Layout
from fedloom.training.references import add_reference_logps
from fedloom.training.row_gradients import gradients_together, reason_for_one_by_one
from fedloom.training.row_privacy import (
    GRID,
    ClippedSum,
    PrivateSteps,
    RowPrivacy,
    private_steps,
    separated,
    units_of,
)
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import Training

OBJECTIVES = {
    "sft": (SFT, "instructions"),
    "dpo": (DPO, "preferences"),
    "kto": (KTO, "feedback"),
    "bco": (BCO, "feedback"),
    "classification": (Classification, "labelled"),
}
NOISE = NoiseSource.seeded(0, "a test")


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """Models that are not trained, shaped as Llama and GPT-2, with one tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    tokenizer.save_pretrained(str(folder))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(str(folder))
    return {"llama": model_folder, "gpt2": folder}


@pytest.fixture
def parts(folders, once):
    """Return an objective by rows, a model whose factors are not zero, and one client's rows."""

    def make(name, shape, rows):
        kind, source = OBJECTIVES[name]
        examples = builtin_examples(source, rows, np.random.default_rng(0))
        classes = tuple(sorted({e.label for e in examples})) if name == "classification" else ()
        folder = str(folders[shape])
        backbone = load_backbone(folder, pad_token_id=0, classes=classes)
        adapter = attach_adapter(backbone, AdapterSettings(rank=2), classification=bool(classes))
        model = AdapterModel(adapter, 0)
        tokens = tokenize(examples, load_encoder(folder), 128, classes)
        mixed = mismatch(tokens, np.random.default_rng(1), 128, 1) if kind is KTO else None
        share = TokenShare(tokens, mixed)
        if kind.needs_reference:
            share = add_reference_logps(model, share, Budget(8))
        draw = torch.Generator().manual_seed(0)
        model.write(
            {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in model.read().items()}
        )
        return kind(), model, share

    return lambda name, shape="llama", rows=8: once(
        (name, shape, rows), lambda: make(name, shape, rows)
    )


def training(objective, model, share, privacy, round=1, work=None, **settings):
    settings = TrainingSettings(**{"batch_size": 4, "learning_rate": 1e-2, **settings})
    options = {
        "learning_rate": settings.learning_rate, "seed": 0, "client": 3, "round": round,
        "work": work or Work(steps=3),
    }  # fmt: skip
    return Training(model, share, objective, settings, (), options, privacy)


def privacy_of(share, clip=1.0, z=1.0, noise=NOISE, units=None):
    return RowPrivacy(clip, z, noise, units_of(share) if units is None else units)


def one_by_one(objective, model, share):
    """Return each row's gradient as one vector, by autograd over that row alone."""
    found = []
    own = replace(share, mismatched=None, mismatched_reference_logps=None)
    model.model.eval()
    for row in range(len(share)):
        batch = Layout(model, own, Budget(1), by_itself=True).batch([np.array([row])])
        loss, _ = objective.loss(model, batch, objective.statistics(model, [batch]))
        gradients = torch.autograd.grad(
            loss, list(model.parameters.values()), allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found).double()


def clipped_sum(objective, model, share, rows, clip=1.0):
    """Return the clipped sum of some rows as :class:`PrivateSteps` makes it."""
    steps = PrivateSteps(privacy_of(share, clip), training(objective, model, share, None))
    sums = []
    steps._release = lambda whole: sums.append(whole)
    steps._drawn = lambda: np.asarray(rows, np.int64)
    model.model.eval()
    from fedloom.training.results import Totals

    steps._found(next(steps.batches()), Totals())
    return sums[0]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_rows_are_those_of_each_alone(parts, name, shape):
    objective, model, share = parts(name, shape)
    alone = one_by_one(separated(objective), model, share)
    for clip in (1e9, float(alone.norm(dim=1).median())):
        found = clipped_sum(objective, model, share, range(len(share)), clip)
        factors = (clip / alone.norm(dim=1)).clamp(max=1)
        expected = (factors[:, None] * alone).sum(0)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert bool(reason_for_one_by_one(model)) == (name == "classification")


def test_each_row_of_a_pass_has_its_own_gradient(parts):
    objective, model, share = parts("dpo")
    alone = one_by_one(objective, model, share)
    layout = Layout(model, share, Budget(8), apart=True)
    (batch,) = layout.batches(np.arange(8))
    _, found = gradients_together(model, objective, batch)
    together = torch.cat([found[name].flatten(1) for name in model.parameters], 1).double()
    assert (together - alone).norm(dim=1).max() <= 1e-5 * alone.norm(dim=1).max()
