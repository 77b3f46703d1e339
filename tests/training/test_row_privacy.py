"""Row-level privacy: each unit's gradient, what one unit can move, and what must stay the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.tokenize import tokenize
from fedloom.errors import SettingsError
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.objectives import BCO, DPO, KTO, SFT, Classification
from fedloom.objectives.base import Objective
from fedloom.objectives.kto import KTOSettings
from fedloom.objectives.logps import completion_logps
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.row_ledger import RowLedger
from fedloom.training.layout import Budget
from fedloom.training.passes import Layout, StepLayout
from fedloom.training.references import add_reference_logps
from fedloom.training.results import Totals
from fedloom.training.row_gradients import gradients_together, reason_for_one_by_one
from fedloom.training.row_privacy import (
    SLACK,
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

    def make(name, shape, rows, adapter):
        kind, source = OBJECTIVES[name]
        examples = builtin_examples(source, rows, np.random.default_rng(0))
        classes = tuple(sorted({e.label for e in examples})) if name == "classification" else ()
        folder = str(folders[shape])
        backbone = load_backbone(folder, pad_token_id=0, classes=classes)
        settings = AdapterSettings(rank=2, **dict(adapter))
        attached = attach_adapter(backbone, settings, classification=bool(classes))
        model = AdapterModel(attached, 0)
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

    return lambda name, shape="llama", rows=8, **adapter: once(
        (name, shape, rows, own := tuple(adapter.items())), lambda: make(name, shape, rows, own)
    )


def training(objective, model, share, privacy, round=1, work=None, **settings):
    settings = TrainingSettings(**{"batch_size": 4, "learning_rate": 1e-2, **settings})
    options = {
        "learning_rate": settings.learning_rate, "seed": 0, "client": 3, "round": round,
        "work": work or Work(steps=3),
    }  # fmt: skip
    return Training(model, share, objective, settings, (), options, privacy)


def privacy_of(share, clip=1.0, z=1.0, noise=NOISE, units=None, at_a_time=1):
    units = units_of(share) if units is None else units
    return RowPrivacy(clip, z, noise, units, units_per_pass=at_a_time)


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


def clipped_sum(objective, model, share, rows, clip=1.0, at_a_time=1):
    """Return the clipped sum of some rows as :class:`PrivateSteps` makes it."""
    privacy = privacy_of(share, clip, at_a_time=at_a_time)
    steps = PrivateSteps(privacy, training(objective, model, share, None))
    sums = []
    steps._release = lambda whole: sums.append(whole)
    steps._drawn = lambda: np.asarray(rows, np.int64)
    model.model.eval()
    steps._found(next(steps.batches()), Totals())
    return sums[0]


@pytest.mark.parametrize("at_a_time", [1, 32])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_of_rows_are_those_of_each_alone(parts, name, shape, at_a_time):
    objective, model, share = parts(name, shape)
    alone = one_by_one(separated(objective), model, share)
    for clip in (1e9, float(alone.norm(dim=1).median())):
        found = clipped_sum(objective, model, share, range(len(share)), clip, at_a_time)
        factors = (clip / alone.norm(dim=1)).clamp(max=1)
        expected = (factors[:, None] * alone).sum(0)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert bool(reason_for_one_by_one(model)) == (name == "classification")


@pytest.mark.parametrize("setting", [("use_dora", True), ("init_lora_weights", "pissa")])
def test_gradients_of_rows_under_variants_of_lora(parts, setting):
    """Magnitudes are clipped with the factors, as one vector; factors cut out are factors."""
    objective, model, share = parts("sft", rows=4, **dict([setting]))
    alone = one_by_one(objective, model, share)
    assert alone.shape[1] == sum(p.numel() for p in model.parameters.values())
    clip = float(alone.norm(dim=1).median())
    found = clipped_sum(objective, model, share, range(len(share)), clip, 32)
    expected = ((clip / alone.norm(dim=1)).clamp(max=1)[:, None] * alone).sum(0)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert bool(reason_for_one_by_one(model)) == (setting[0] == "use_dora")


def test_each_row_of_a_pass_has_its_own_gradient(parts):
    objective, model, share = parts("dpo")
    alone = one_by_one(objective, model, share)
    layout = Layout(model, share, Budget(8), apart=True)
    (batch,) = layout.batches(np.arange(8))
    _, found = gradients_together(model, objective, batch)
    together = torch.cat([found[name].flatten(1) for name in model.parameters], 1).double()
    assert (together - alone).norm(dim=1).max() <= 1e-5 * alone.norm(dim=1).max()


def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(parts):
    objective, model, share = parts("dpo")
    others = [row for row in range(8) if row != 3]
    expected = clipped_sum(objective, model, share, others)
    for value in (float("nan"), float("inf"), 3e38):
        broken = share.reference_logps.clone()
        broken[6] = value  # of row 3, the chosen answer
        found = clipped_sum(objective, model, replace(share, reference_logps=broken), range(8))
        assert (found - expected).norm() <= 1 + SLACK  # the gradient of an infinite loss is finite
        if np.isnan(value):
            assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_of_rows_are_those_of_opacus(parts):
    from opacus import GradSampleModule

    objective, model, share = parts("sft", "llama", 6)
    own = separated(objective)
    (batch,) = Layout(model, share, Budget(8), apart=True).batches(np.arange(6))
    model.model.train()  # or Opacus records nothing
    _, found = gradients_together(model, own, batch)
    hooked = GradSampleModule(model.model, strict=False, loss_reduction="sum")
    try:
        loss, _ = own.loss(model, batch, None)
        (loss * len(batch)).backward()
        for name, parameter in model.parameters.items():
            apart = (parameter.grad_sample - found[name]).norm()
            assert apart <= 1e-5 * parameter.grad_sample.norm()
    finally:
        hooked._close()
        for parameter in model.parameters.values():
            parameter.grad = None


def case(number):
    """Return gradients of some units by tensor, of which some are not finite, huge, tiny or zero."""
    rng = np.random.default_rng(number)
    units, tensors = int(rng.integers(1, 7)), int(rng.integers(1, 400 if number % 25 == 0 else 40))
    found = {
        str(name): torch.from_numpy(
            rng.normal(0, 10.0 ** rng.integers(-8, 8), (units, int(rng.integers(1, 30))))
        ).float()
        for name in range(tensors)
    }
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-38, 0.0):
        if rng.random() < 0.3:
            found[str(rng.integers(tensors))][rng.integers(units)] = value
    return found, units


class Holder:
    """What a sum asks of a model: its trained tensors."""

    def __init__(self, tensors):
        self.parameters = {
            name: torch.nn.Parameter(own[0].clone()) for name, own in tensors.items()
        }


def whole_of(tensors, units, clip):
    total = ClippedSum(Holder(tensors), clip)
    if units:
        chosen = {name: own[units] for name, own in tensors.items()}
        total.add(list(units), chosen, dict.fromkeys(units, 1), len(units))
    return total.whole()


MODELS = pytest.mark.parametrize(
    "models", [50, pytest.param(range(50, 1000), marks=pytest.mark.full, id="the other 950")]
)
"""How many random models a search goes over, or which."""


@MODELS
def test_one_unit_more_moves_a_sum_by_the_clip_at_most(models):
    reached = tried = 0
    for number in range(models) if isinstance(models, int) else models:
        tensors, units = case(number)
        clip = float(10.0 ** np.random.default_rng(number).integers(-3, 3))
        added = number % units
        others = [unit for unit in range(units) if unit != added]  # of a client of one unit: none
        moved = whole_of(tensors, [*others, added], clip) - whole_of(tensors, others, clip)
        assert moved.norm() <= clip * (1 + SLACK), number
        reached, tried = reached + bool(moved.norm() > 0.999 * clip), tried + 1
    assert reached > tried / 4  # the bound is not met by adding nothing


@pytest.mark.parametrize(
    "models", [range(6), pytest.param(range(6, 1000), marks=pytest.mark.full, id="the other 994")]
)
def test_a_row_moves_the_sum_of_random_models_by_the_clip_at_most(parts, models):
    """Real gradients: the adapter is tiny to huge, or holds NaN; rows come and go, down to none."""
    names, apart = sorted(OBJECTIVES), 0.0
    for number in models:
        rng = np.random.default_rng(number)
        objective, model, share = parts(names[number % len(names)], ("llama", "gpt2")[number % 2])
        start, clip = model.read(), float(10.0 ** rng.uniform(-4, 3))
        scale, draw = 10.0 ** rng.uniform(-3, 2), torch.Generator().manual_seed(number)
        changed = {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in start.items()}
        if rng.random() < 0.05:
            next(iter(changed.values())).view(-1)[0] = float("nan")
        rows = rng.permutation(len(share))[: rng.integers(1, 5)].tolist()
        try:
            model.write(changed)
            whole = clipped_sum(objective, model, share, sorted(rows), clip)
            moved = whole - clipped_sum(objective, model, share, sorted(rows[1:]), clip)
            own = clipped_sum(objective, model, share, rows[:1], clip)
            together = whole
            if number % 8 == 3:
                together = clipped_sum(objective, model, share, sorted(rows), clip, at_a_time=32)
        finally:
            model.write(start)
        assert moved.norm() <= clip * (1 + SLACK), (number, float(moved.norm()) / clip)
        assert (moved - own).norm() <= 1e-12 * clip  # the others' gradients are the same bits
        apart = max(apart, float((whole - together).nan_to_num().norm()) / clip)
    if (
        len(models) > 100
    ):  # what rounding couples in passes of several units, of the largest adapters
        assert apart > SLACK


def test_a_unit_in_several_passes_is_clipped_as_one():
    tensors = {"a": torch.tensor([[3.0], [4.0], [0.5]]), "b": torch.tensor([[0.0], [4.0], [0.0]])}
    total, left = ClippedSum(Holder(tensors), 1.0), {7: 2, 9: 1}
    first = {name: own[:1] for name, own in tensors.items()}
    total.add([7], first, left, 1)
    total.add([7, 9], {name: own[1:] for name, own in tensors.items()}, left, 2)
    # (3 + 4, 0 + 4) has the norm sqrt(65); the other unit, (0.5, 0), is within
    assert total.whole().tolist() == pytest.approx([7 / 65**0.5 + 0.5, 4 / 65**0.5], abs=1e-7)


def moved_by(gradients_of, rows, clip):
    """Return by how much the sum of clipped gradients moves when the last row comes in."""

    def total(rows):
        found = gradients_of(rows)
        return (found * (clip / found.norm(dim=1).clamp(min=clip))[:, None]).sum(0)

    return float((total(rows) - total(rows[:-1])).norm())


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_row_moves_others_by_a_statistic_of_the_batch_alone(parts, name):
    objective, model, share = parts(name)
    rows, clip = list(range(8)), 1e-3
    far = share.reference_logps.clone()
    far[7] -= 8000  # a row whose log-ratio is 8000
    share = replace(share, reference_logps=far)
    if name == "kto":
        mismatched = share.mismatched_reference_logps.clone()
        mismatched[7] -= 8000
        share = replace(share, mismatched_reference_logps=mismatched)

    def gradients(own):
        def of(rows):
            chosen = share.take(np.array(rows))
            layout = StepLayout(model, chosen, Budget(8), 0)
            statistic = own.statistics(model, layout.batches(np.arange(len(rows))))
            found = []
            for row in range(len(rows)):
                batch = layout.alone.batch([np.array([row])])
                loss, _ = own.loss(model, batch, statistic)
                gradient = torch.autograd.grad(loss, list(model.parameters.values()))
                found.append(torch.cat([g.flatten() for g in gradient]).double())
            return torch.stack(found)

        return of

    model.model.eval()
    assert moved_by(gradients(separated(objective)), rows, clip) <= clip * (1 + SLACK)
    assert moved_by(gradients(objective), rows, clip) > 1.5 * clip


def test_halves_of_a_pair_clipped_apart_move_a_sum_by_more_than_the_clip(parts):
    _, model, share = parts("dpo", "gpt2")
    model.model.eval()
    tokens, random = share.tokens.tokens.copy(), np.random.default_rng(0)
    trained = share.tokens.trained  # answers without a word in common: halves do not cancel
    tokens[trained] = random.integers(5, 300, int(trained.sum()))
    share = replace(share, tokens=replace(share.tokens, tokens=tokens))
    largest, clip = 0.0, 1e-3
    for row in range(len(share)):
        batch = Layout(model, share, Budget(1), by_itself=True).batch([np.array([row])])
        logps = completion_logps(model, batch.sequences)
        margin = (logps - batch.reference_logps) * torch.tensor([0.1, -0.1])
        halves = [margin[0] + margin[1].detach(), margin[0].detach() + margin[1]]
        found = []
        for half in halves:
            loss = -torch.nn.functional.logsigmoid(half)
            gradient = torch.autograd.grad(loss, list(model.parameters.values()), retain_graph=True)
            found.append(torch.cat([g.flatten() for g in gradient]))
        one = {"all": torch.stack(found)}
        apart = whole_of(one, [0, 1], clip)
        pair = whole_of({"all": one["all"].sum(0, keepdim=True)}, [0], clip)
        assert pair.norm() <= clip * (1 + SLACK)
        largest = max(largest, float(apart.norm()))
    assert largest > 1.5 * clip


def test_a_batch_of_nobody_has_noise_and_makes_its_step(parts, monkeypatch):
    objective, model, share = parts("dpo")
    start, privacy = model.read(), privacy_of(share, clip=0.5, z=2.0)
    own = training(
        objective, model, share, privacy, work=Work(steps=1), batch_size=1, optimizer="sgd",
        learning_rate=1.0, max_grad_norm=0,
    )  # fmt: skip
    monkeypatch.setattr(PrivateSteps, "_drawn", lambda self: np.zeros(0, np.int64))
    result = privacy.train(own)
    moved = torch.cat([(model.read()[n] - t).flatten() for n, t in start.items()])
    model.write(start)
    assert result.steps == 1 and result.metrics == {} and result.examples == 1
    # 0.5 x 2 is the noise's standard deviation; a unit adds 0.5 over all numbers together
    assert float(moved.std()) == pytest.approx(1.0, rel=0.1)


def test_coins_are_drawn_at_the_accounted_rate(parts):
    objective, model, share = parts("dpo")
    own = training(objective, model, share, None, work=Work(steps=400), batch_size=2)
    steps = PrivateSteps(privacy_of(share), own)
    sizes = np.zeros(400)
    for steps.step in range(400):
        sizes[steps.step] = len(steps._drawn())
    assert abs(sizes.mean() - 2) < 4 * (8 * 0.25 * 0.75 / 400) ** 0.5
    assert 0 in sizes and sizes.var() == pytest.approx(8 * 0.25 * 0.75, rel=0.25)


def test_the_same_key_has_the_same_bits_and_another_has_others(parts):
    objective, model, share = parts("sft", "llama", 6)
    start, found = model.read(), []
    other = NoiseSource.seeded(1, "a test")
    for noise, round in ((NOISE, 1), (NOISE, 1), (other, 1), (NOISE, 2)):
        model.write(start)
        training(objective, model, share, privacy_of(share, noise=noise), round).alone()
        found.append(model.digest())
    model.write(start)
    assert found[0] == found[1] and len(set(found)) == 3


def test_another_noise_on_the_same_sum_is_another_release(parts, tmp_path):
    """Requests that differ have other noise: it is counted although adapter and sum are the same."""
    objective, model, share = parts("dpo")
    drawn, ledger = [], RowLedger(tmp_path / "one.txt")
    for request in ("a", "b", "a"):
        own = privacy_of(share)
        own = replace(own, ledger=ledger, noise=own.noise.of(request), noise_multiplier=1.0)
        steps = PrivateSteps(own, training(objective, model, share, own))
        next(steps.batches())
        steps.step = 1
        drawn.append(steps._noised(np.zeros(8)).tolist())
    assert drawn[0] == drawn[2] != drawn[1] and len(ledger) == 2


def test_rows_with_one_value_are_one_unit(parts):
    _, _, share = parts("dpo")
    rows = share.tokens.rows.tolist()
    values = {row: "ab"[place % 2] for place, row in enumerate(rows)}
    assert units_of(share).tolist() == list(range(8))
    assert units_of(share, values).tolist() == [0, 1] * 4
    assert private_steps(Work(epochs=2), 9, 4, 2) == 6
    assert private_steps(Work(examples=24), 9, 4, 2) == 3
    with pytest.raises(SettingsError, match="local_tokens"):
        private_steps(Work(tokens=100), 9, 4, 2)


def test_units_of_several_rows_are_clipped_together(parts):
    objective, model, share = parts("dpo")
    alone = one_by_one(objective, model, share)
    units = np.array([0, 1, 0, 1, 0, 2, 2, 2])
    clip = float(alone.norm(dim=1).median())
    privacy = privacy_of(share, clip, units=units)
    own = training(objective, model, share, privacy, micro_batch_size=3)
    steps = PrivateSteps(privacy, own)
    sums = []
    steps._release = sums.append
    steps._drawn = lambda: np.arange(8)
    model.model.eval()
    steps._found(next(steps.batches()), Totals())
    whole = torch.stack([alone[units == unit].sum(0) for unit in range(3)])
    expected = (whole * (clip / whole.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    assert (sums[0] - expected).norm() <= 1e-5 * expected.norm()


def test_an_objective_that_says_nothing_is_refused(parts):
    class Silent(Objective):
        pass

    with pytest.raises(SettingsError, match="separable = Separable"):
        separated(Silent())
    with pytest.raises(SettingsError, match="desirable_weight"):
        separated(KTO(KTOSettings(weights="balanced")))
    assert separated(KTO()).z0 == 0 and separated(KTO(KTOSettings(z0=2.0))).z0 == 2
