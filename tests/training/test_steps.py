"""The local loop: what must not change the result, what must stop it, what it keeps."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.tokenize import tokenize
from fedloom.errors import NonFiniteLoss
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.experts import ExpertModel, attach_experts
from fedloom.models.heads import PersonalModules, attach_personal
from fedloom.models.load import load_backbone
from fedloom.objectives import DPO, KTO, SFT, Classification
from fedloom.objectives.base import Objective
from fedloom.training.layout import Budget
from fedloom.training.optimizers import make_optimizer, round_learning_rate
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import Part, TrainingSettings, Work
from fedloom.training.steps import local_loss, row_tokens, train_locally, within

SETS = {
    "sft": "instructions",
    "dpo": "preferences",
    "kto": "feedback",
    "classification": "labelled",
}
OBJECTIVES = {"sft": SFT, "dpo": DPO, "kto": KTO, "classification": Classification}


@pytest.fixture
def parts(model_folder):
    """Build objective, model and one client's rows."""

    def build(name, rows=20, seed=0):
        objective = OBJECTIVES[name]()
        examples = builtin_examples(SETS[name], rows, np.random.default_rng(seed))
        classes = tuple(sorted({e.label for e in examples})) if name == "classification" else ()
        encoder = load_encoder(str(model_folder))
        backbone = load_backbone(str(model_folder), pad_token_id=0, classes=classes)
        adapter = attach_adapter(backbone, AdapterSettings(rank=2), classification=bool(classes))
        model = AdapterModel(adapter, 0)
        tokens = tokenize(examples, encoder, 128, classes)
        mixed = mismatch(tokens, np.random.default_rng(1), 128, 1) if name == "kto" else None
        share = TokenShare(tokens, mixed)
        if objective.needs_reference:
            share = add_reference_logps(model, share, Budget(8))
        return objective, model, share

    return build


def train(objective, model, share, start, round=1, **settings):
    model.write(start)
    settings = TrainingSettings(**{"batch_size": 8, **settings})
    result = train_locally(
        model,
        share,
        objective,
        settings,
        learning_rate=1e-2,
        seed=3,
        client=1,
        round=round,
        work=settings.work(len(share), 1.0),
    )
    return result, model.read()


def distance(left, right):
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left)


@pytest.mark.parametrize("name", SETS)
def test_micro_batches_change_nothing_beyond_rounding(parts, name):
    # SGD is linear in the gradients, so rounding stays rounding; Adam's first steps divide by it.
    objective, model, share = parts(name)
    start = model.read()
    whole, expected = train(objective, model, share, start, optimizer="sgd")
    assert distance(expected, start) > 1e-4  # it did learn something
    for micro in (1, 2, 4):
        part, found = train(objective, model, share, start, optimizer="sgd", micro_batch_size=micro)
        assert distance(found, expected) < 2e-6
        assert part.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
        assert (part.steps, part.examples, part.tokens) == (
            whole.steps,
            whole.examples,
            whole.tokens,
        )


def test_micro_batches_of_a_mixture_change_nothing_either(parts, model_folder):
    """Its balance term is a mean over sequences beside a loss that is one over tokens."""
    objective, _, share = parts("sft", rows=8)
    settings = AdapterSettings(kind="experts", rank=2, experts=4, balance=1.0)
    backbone = attach_experts(load_backbone(str(model_folder), pad_token_id=0), settings, seed=0)
    model = ExpertModel(backbone, settings, 0)
    start = model.read()
    whole, expected = train(objective, model, share, start, optimizer="sgd")
    assert whole.metrics["balance"] > 0.1 and distance(expected, start) > 1e-4
    for micro in (1, 3):
        part, found = train(objective, model, share, start, optimizer="sgd", micro_batch_size=micro)
        assert distance(found, expected) < 2e-6
        for name in ("loss", "balance"):
            assert part.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5)
    model.write(start)
    alone = local_loss(
        model,
        share,
        objective,
        TrainingSettings(batch_size=8),
        seed=0,
        client=0,
        round=1,
        batches=1,
    )
    assert whole.metrics["loss"] == pytest.approx(alone + whole.metrics["balance"], rel=1e-5)


def test_accumulation_is_another_way_to_say_it():
    assert TrainingSettings(batch_size=10, accumulation=4).micro_batch == 3
    assert TrainingSettings(batch_size=8, micro_batch_size=2, accumulation=4).contradictions() == []


@pytest.mark.parametrize("name", SETS)
def test_same_seed_same_bits_and_other_rounds_other_bits(parts, name):
    objective, model, share = parts(name)
    start = model.read()
    _, first = train(objective, model, share, start)
    torch.rand(5)  # what others draw does not matter
    np.random.rand(5)
    _, again = train(objective, model, share, start)
    _, other = train(objective, model, share, start, round=2)
    assert distance(first, again) == 0.0
    assert distance(first, other) > 0.0


def test_dropout_draws_from_the_seed_too(parts, model_folder):
    objective, _, share = parts("sft")
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    model = AdapterModel(attach_adapter(backbone, AdapterSettings(rank=2, dropout=0.5)), 0)
    start = model.read()
    _, first = train(objective, model, share, start)
    torch.rand(3)
    _, again = train(objective, model, share, start)
    assert distance(first, again) == 0.0


@pytest.mark.parametrize("name", SETS)
def test_every_objective_learns(parts, name):
    objective, model, share = parts(name)
    whole = {"batch_size": 20, "local_steps": 1}  # its loss is that of the start, on all rows
    before, _ = train(objective, model, share, model.read(), **whole)
    _, trained = train(objective, model, share, model.read(), local_epochs=30)
    after, _ = train(objective, model, share, trained, **whole)
    assert after.metrics["loss"] < 0.98 * before.metrics["loss"]


@pytest.mark.parametrize("name", SETS)
def test_the_loss_without_training_is_that_of_the_first_step(parts, name):
    objective, model, share = parts(name)
    start = model.read()
    trained, _ = train(objective, model, share, start, batch_size=20, local_steps=1)
    model.write(start)
    settings = TrainingSettings(batch_size=20, micro_batch_size=8)
    whole = {"seed": 3, "client": 1, "round": 1}
    loss = local_loss(model, share, objective, settings, batches=1, **whole)
    assert loss == pytest.approx(trained.metrics["loss"], abs=1e-6)
    assert loss == local_loss(model, share, objective, settings, batches=1, **whole)
    assert distance(model.read(), start) == 0.0


def test_steps_run_over_as_many_epochs_as_they_take(parts):
    objective, model, share = parts("sft")
    result, _ = train(objective, model, share, model.read(), local_steps=7)
    assert result.steps == 7 and result.examples == 8 + 8 + 4 + 8 + 8 + 4 + 8


class Poisoned(Objective):
    """SFT whose loss is NaN once row 13 is seen."""

    def loss(self, model, batch, statistics):
        loss, metrics = SFT().loss(model, batch, statistics)
        return (loss * float("nan") if 13 in batch.rows else loss), metrics


def test_a_loss_that_is_not_finite_names_client_step_and_rows(parts):
    _, model, share = parts("sft")
    with pytest.raises(
        NonFiniteLoss, match=r"client 1: the loss is nan at local step \d on rows"
    ) as caught:
        train(Poisoned(), model, share, model.read())
    assert 13 in caught.value.example_ids and len(caught.value.example_ids) <= 8


def test_kto_with_a_single_row_takes_zero_for_the_reference_point(parts):
    objective, model, share = parts("kto", rows=1)
    assert share.mismatched is None
    result, _ = train(objective, model, share, model.read(), local_steps=2)
    assert result.metrics["kl"] == 0.0 and np.isfinite(result.metrics["loss"])


def test_kto_with_one_class_is_defined(parts):
    objective, model, share = parts("kto")
    share = replace(share, tokens=replace(share.tokens, labels=np.ones(len(share), np.int64)))
    result, _ = train(objective, model, share, model.read())
    assert result.metrics["desirable_share"] == 1.0
    assert "reward_undesirable" not in result.metrics


def test_optimizer_state_is_kept_when_asked_and_makes_a_difference(parts):
    objective, model, share = parts("sft")
    start = model.read()
    kept, after = train(objective, model, share, start, keep_optimizer_state=True)
    assert len(kept.optimizer_state) == 3 * len(after)  # step and two moments a tensor
    settings = TrainingSettings(batch_size=8, keep_optimizer_state=True)

    def go_on(state):
        model.write(after)
        train_locally(
            model,
            share,
            objective,
            settings,
            learning_rate=1e-2,
            seed=3,
            client=1,
            round=2,
            state=state,
            work=settings.work(len(share), 1.0),
        )
        return model.read()

    assert distance(go_on(kept.optimizer_state), go_on(None)) > 0
    assert distance(go_on(kept.optimizer_state), go_on(kept.optimizer_state)) == 0
    assert train(objective, model, share, start)[0].optimizer_state == {}


def test_reference_logps_do_not_change_while_the_adapter_trains(parts):
    objective, model, share = parts("dpo")
    train(objective, model, share, model.read())
    again = add_reference_logps(model, replace(share, reference_logps=None), Budget(8))
    assert torch.equal(again.reference_logps, share.reference_logps)


def test_bf16_trains_an_adapter_that_stays_in_fp32(model_folder, parts):
    objective, _, share = parts("sft")
    backbone = load_backbone(str(model_folder), pad_token_id=0, dtype=torch.bfloat16)
    model = AdapterModel(attach_adapter(backbone, AdapterSettings(rank=2)), 0, torch.bfloat16)
    start = model.read()
    assert {t.dtype for t in start.values()} == {torch.float32}
    _, after = train(objective, model, share, start)
    assert distance(after, start) > 0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1e-4, 1e-4, 1e-4, 1e-4]),
        ("linear", [1e-4, 7.75e-5, 5.5e-5, 3.25e-5]),
        ("exponential", [1e-4, 9.9e-5, 9.801e-5, 9.70299e-5]),
        # 1e-5 + 4.5e-5 * (1 + cos(pi t / 4)) for t = 0..3
        ("cosine", [1e-4, 8.68198e-5, 5.5e-5, 2.31802e-5]),
    ],
)
def test_learning_rate_over_rounds(schedule, rates):
    settings = TrainingSettings(learning_rate=1e-4, min_learning_rate=1e-5, schedule=schedule)
    found = [round_learning_rate(settings, round, 4) for round in (1, 2, 3, 4)]
    assert found == pytest.approx(rates, rel=1e-5)


def test_the_rate_rises_over_the_rounds_of_a_warm_up_and_then_follows_the_schedule():
    settings = TrainingSettings(learning_rate=1e-3, schedule="linear", warmup_rounds=3)
    found = [round_learning_rate(settings, round, 5) for round in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 5e-4])


def test_decay_belongs_to_its_schedule():
    (problem,) = TrainingSettings(decay=0.5).contradictions()
    assert problem == "training.decay is of the exponential schedule, not constant"
    assert not TrainingSettings(decay=0.5, schedule="exponential").contradictions()


def test_epsilon_reaches_adam():
    parameters = {"w": torch.nn.Parameter(torch.ones(2))}
    settings = TrainingSettings(epsilon=1e-3)
    assert make_optimizer(parameters, settings, 1e-3).defaults["eps"] == 1e-3


def test_gradient_checkpointing_changes_nothing_beyond_rounding(parts):
    objective, model, share = parts("sft")
    start = model.read()
    _, plain = train(objective, model, share, start, optimizer="sgd")
    model.model.base_model.model.activation_checkpointing_enable()
    _, checkpointed = train(objective, model, share, start, optimizer="sgd")
    assert distance(plain, checkpointed) < 1e-6


def work_of(rows=20, participations=2.0, **settings):
    return TrainingSettings(batch_size=8, **settings).work(rows, participations)


def test_how_much_a_client_does():
    assert work_of() == Work(epochs=1)
    assert work_of(local_steps=7) == Work(steps=7)
    assert work_of(local_examples=40) == Work(examples=40)
    # 3 passes over 20 rows in 2 participations: 30 rows a round, 3.75 batches of 8
    assert work_of(total_epochs=3.0) == Work(steps=4)
    assert work_of(total_epochs=3.0, rows=1, participations=200.0) == Work(steps=1)
    assert work_of(total_epochs=1.6, rows=10, participations=1.0) == Work(
        steps=2
    )  # 16 rows exactly


def test_the_budget_of_the_published_study():
    """747 clients, 10 a round, 200 rounds, batch 8: a client of 12.7 rows makes 2 steps a round."""
    settings = TrainingSettings(batch_size=8, total_epochs=3.0)
    assert settings.work(13, 200 * 10 / 747) == Work(steps=2)  # 3 * 13 / 2.677 / 8 = 1.82


def test_a_pair_counts_as_the_two_answers_it_holds(parts):
    objective, model, share = parts("dpo")
    result, _ = train(objective, model, share, model.read(), local_examples=33)
    assert (result.steps, result.examples) == (3, 17)  # 16, 32, then one pair: 34
    objective, model, share = parts("kto")
    result, _ = train(objective, model, share, model.read(), local_examples=33)
    assert (result.steps, result.examples) == (5, 33)  # 8, 16, 20 | 28, then 5 rows


def test_tokens_end_a_round_with_the_row_that_reaches_them(parts):
    objective, model, share = parts("sft")
    everything, _ = train(objective, model, share, model.read())
    result, _ = train(objective, model, share, model.read(), local_tokens=everything.tokens + 1)
    assert result.steps == everything.steps + 1 and result.examples == everything.examples + 1
    result, _ = train(objective, model, share, model.read(), local_tokens=everything.tokens)
    assert result.steps == everything.steps and result.tokens == everything.tokens


def test_batches_are_cut_to_what_is_left():
    """Rows of 3, 1, 2 and 4 tokens in batches of two."""
    rows = np.arange(10, dtype=np.int32)
    starts = np.array([0, 3, 4, 6, 10])
    share = TokenShare(SimpleNamespace(width=1, starts=starts, tokens=rows))
    batches = [np.array([0, 1]), np.array([2, 3])]

    def cut(**work):
        return [part.tolist() for part in within(share, iter(batches), Work(**work))]

    assert row_tokens(share).tolist() == [3, 1, 2, 4]
    assert cut(examples=1) == [[0]] and cut(examples=2) == [[0, 1]]
    assert cut(examples=3) == [[0, 1], [2]] and cut(examples=9) == [[0, 1], [2, 3]]
    assert cut(tokens=3) == [[0]] and cut(tokens=4) == [[0, 1]]
    assert cut(tokens=5) == cut(tokens=6) == [[0, 1], [2]]
    assert cut(tokens=7) == cut(tokens=99) == cut() == [[0, 1], [2, 3]]
    pairs = TokenShare(SimpleNamespace(width=2, starts=starts, tokens=rows))
    found = within(pairs, iter([np.array([0, 1])]), Work(examples=2))
    assert [part.tolist() for part in found] == [[0]] and row_tokens(pairs).tolist() == [4, 6]


@pytest.mark.parametrize(
    ("whole", "repeats", "expected"),
    [(8, 1, [4, 4]), (9, 1, [4, 5]), (40, 5, [4, 4]), (1, 1, [1, 1])],
)
def test_trainings_share_an_amount(whole, repeats, expected):
    """Two of them: halves, of batches that are each gone over so often, and never nothing."""
    work, begun = Work(steps=whole), Part(0, 2)
    first = work.part(begun, begun, Work(), repeats)
    spent = Work(steps=first.steps * repeats)
    assert [first.steps, work.part(Part(1, 2), begun, spent, repeats).steps] == expected
    # in a request of its own the second knows nothing of the first, and takes what it must have left
    assert Work(tokens=9).part(Part(1, 2), Part(1, 2), Work(), 1) == Work(tokens=5)
    # of what the first took beyond its half, the second takes less
    assert Work(tokens=90).part(Part(1, 2), begun, Work(tokens=60), 1) == Work(tokens=30)


def test_hooks_run_around_every_step_and_see_gradients(parts):
    objective, model, share = parts("sft")
    seen = []
    train_locally(
        model,
        share,
        objective,
        TrainingSettings(batch_size=8),
        learning_rate=1e-2,
        seed=3,
        client=1,
        round=1,
        work=Work(steps=2),
        before_step=lambda p: seen.append(all(x.grad is not None for x in p.values())),
        after_step=lambda p: seen.append(all(x.grad is None for x in p.values())),
    )
    assert seen == [True] * 4


def test_heads_may_have_a_learning_rate_of_their_own(model_folder):
    """With SGD a step is the rate times the gradient, so steps differ by the rates' ratio and no more."""
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    attached = attach_adapter(backbone, AdapterSettings(rank=2))
    attach_personal(attached, PersonalModules(bottleneck=4, head_mode="full"), 0)
    model = AdapterModel(attached, 0)
    before = model.read()
    moved = []
    for rates in ({}, {"head_learning_rate": 0.002}):
        model.write(before)
        own = TrainingSettings(optimizer="sgd", learning_rate=0.02, **rates)
        optimizer = make_optimizer(model.parameters, own, 0.01)  # of a later round: half of both
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters.values():
            parameter.grad = torch.rand(parameter.shape, generator=generator)
        optimizer.step()
        moved.append({name: t - before[name] for name, t in model.read().items()})
    for name, step in moved[0].items():
        share = 0.1 if name.startswith("own.") else 1.0
        assert torch.allclose(moved[1][name], share * step, atol=1e-7)
    assert any(name.startswith("own.") for name in before)
