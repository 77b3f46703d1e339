"""Answers that a policy generates to be trained on, in real runs of a small model."""

import json
from pathlib import Path

import pytest
import torch

import fedloom
from fedloom.data.batching import epoch_batches
from fedloom.errors import PluginError, SettingsError
from fedloom.evaluation import rollouts
from fedloom.evaluation.generate import Ask, sample_tokens
from fedloom.methods.contract.client import Client
from fedloom.models.load import context_length
from fedloom.objectives import grpo
from fedloom.objectives.grpo import GRPO, GRPOSettings
from fedloom.objectives.logps import completion_token_logps
from fedloom.randomness import generator
from fedloom.runs.assembly import assemble
from fedloom.runs.cost_estimate import advise
from fedloom.runs.partitioning import partition_data
from fedloom.runs.tuning import tune
from fedloom.training.memory import client_memory
from fedloom.training.steps import Making

RUN = {
    "data": {"source": "builtin:sums", "builtin_rows": 40},
    "objective": {"name": "grpo", "group": 3, "max_new_tokens": 4, "rewards": ["regex:[a-m]"]},
    "federation": {"rounds": 1, "clients": 2},
    "training": {"local_steps": 2, "batch_size": 3},
    "evaluation": {"samples": 0, "judged_by": "exact_match", "max_new_tokens": 4},
}


@pytest.fixture
def rows(experiment):
    """A client's model, rows, settings and maker; nothing is trained."""

    def make(**objective):
        own = experiment(**{**RUN, "objective": {**RUN["objective"], **objective}})
        client = assemble(own, partition_data(own), probe=False).local.client(0, 1)
        assert isinstance(client, Client) and client.maker is not None
        return client

    return make


def batches(client, **making):
    given = {"again": False, "purpose": "", "work": client.work} | making
    making = Making(seed=client.seed, client=client.id, round=client.round, **given)
    return list(client.maker.batches(client.model, client.share, client.training, making))


def answers_of(parts):
    """Prompt and answer of each row, in no order, with its advantage."""
    return sorted(
        (own.input_ids[i][own.attention_mask[i] > 0].tolist(), float(part.rollouts.advantages[i]))
        for part in parts
        for own in (part.sequences,)
        for i in range(len(part))
    )


def test_batches_are_groups_of_answers_to_prompts(rows):
    client = rows()
    found = batches(client)
    assert len(found) == 2
    for parts in found:
        assert sum(map(len, parts)) == 9
        known = [part.rollouts for part in parts]
        rewards = torch.cat([own.rewards for own in known])
        by_row = {}
        for row, reward in zip([r for p in parts for r in p.rows], rewards.tolist(), strict=True):
            by_row.setdefault(row, []).append(reward)
        assert {len(own) for own in by_row.values()} == {3} and len(by_row) == 3
        assert set(rewards.tolist()) <= {0.0, 1.0}
        assert all(own.old_logps is None and own.reference_logps is None for own in known)
    again = batches(client)
    assert [answers_of(parts) for parts in again] == [answers_of(parts) for parts in found]
    other = batches(client, purpose="other ")
    assert answers_of(other[0]) != answers_of(found[0])


def test_an_answer_does_not_depend_on_what_it_was_generated_with(rows):
    client = rows()
    asks = [Ask((5, 6, 7 + n), 1.0, n) for n in range(5)]
    together = sample_tokens(client.model, client.maker.encoder, asks, 6)
    alone = [sample_tokens(client.model, client.maker.encoder, [ask], 6)[0] for ask in asks]
    assert together == alone and len(set(map(tuple, together))) > 1


def test_iterations_repeat_a_batch_with_what_generated_it(rows):
    client = rows(iterations=2, beta=0.1)
    first, second = batches(client)
    assert first is second
    for part in first:
        with client.model.evaluating():
            logps = completion_token_logps(client.model, part.sequences)[0]
        torch.testing.assert_close(part.rollouts.old_logps, logps)
        assert part.rollouts.reference_logps.shape == logps.shape


def test_the_temperature_is_that_of_the_draws(rows):
    client = rows(temperature=2.0)
    (part, *_), _ = batches(client)
    objective = GRPO(GRPOSettings(temperature=2.0))
    loss, metrics = objective.loss(client.model, part, None)
    assert abs(float(loss.detach())) < 1e-5 + abs(float(part.rollouts.advantages.mean()))
    assert metrics["clipped"] == 0
    hot = completion_token_logps(client.model, part.sequences, 2.0)[0]
    plain = completion_token_logps(client.model, part.sequences)[0]
    assert hot.shape == plain.shape and not torch.equal(hot, plain)


@pytest.mark.slow
def test_groups_of_clients_have_rewards_of_their_own(experiment, tmp_path):
    """Answers earn something at the second client alone."""
    own = experiment(
        **{**RUN, "objective": {**RUN["objective"], "rewards": ["regex:^never$"]}},
        clients={"groups": {"b": {"clients": [1], "rewards": ["regex:[a-m]"]}}},
        method={"name": "local_only"},
    )
    result = fedloom.run(own)
    lines = (Path(result.folder) / "rounds.jsonl").read_text().splitlines()
    by_client = json.loads(lines[-1])["client_train"]
    assert by_client["0"]["reward"] == by_client["0"]["reward_spread"] == 0
    assert by_client["1"]["reward"] > 0
    assert 0 <= result.metrics["exact_match"] <= 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"objective": {"rewards": ["exactmatch"]}}, "did you mean 'exact_match'"),
        ({"objective": {"rewards": ["number"] * 17}}, "objective.rewards"),
        ({"objective": {"rewards": ["regex:a{1000000000}"]}}, "repeats too much"),
        (
            {"clients": {"groups": {"a": {"clients": [0], "rewards": ["number"] * 17}}}},
            "clients.groups.a.rewards",
        ),
        ({"objective": {"reward_weights": [1.0, 2.0]}}, "has 2 numbers for 1 rewards"),
        ({"training": {"local_tokens": 500}}, "training.local_tokens: objective.name = 'grpo' gen"),
        ({"method": {"name": "split"}}, "not with 'grpo'"),
        ({"clients": {"groups": {"a": {"clients": [0], "rewards": ["x"]}}}}, "'x' is no reward"),
        ({"data": {"source": "builtin:preferences"}}, "needs instruction data"),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_is_trained(experiment, change, text):
    merged = {name: {**RUN.get(name, {}), **own} for name, own in change.items()}
    with pytest.raises(SettingsError, match=text):
        experiment(**{**RUN, **merged})


def test_rewards_without_generated_answers_are_refused(experiment):
    groups = {"groups": {"a": {"clients": [0], "rewards": ["number"]}}}
    with pytest.raises(SettingsError, match="'dpo' has no answers generated"):
        experiment(objective={"name": "dpo"}, clients=groups)


@pytest.mark.slow
def test_a_reward_that_fails_is_one_error(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing_rewards.py").write_text("def r(p, a, x):\n    raise KeyError(a)\n")
    own = experiment(**{**RUN, "objective": {**RUN["objective"], "rewards": ["failing_rewards:r"]}})
    with pytest.raises(
        (PluginError, fedloom.errors.FedloomError), match="failing_rewards:r failed"
    ):
        fedloom.run(own)


def test_answers_are_drawn_from_the_model_whatever_its_files_say_of_generation(rows):
    client = rows()
    asks = [Ask((5, 6, 7 + n), 1.0, n) for n in range(3)]
    expected = sample_tokens(client.model, client.maker.encoder, asks, 12)
    holders = [own for own in client.model.model.modules() if "generation_config" in vars(own)]
    assert holders
    for own in holders:
        own.generation_config.repetition_penalty = 1000.0
    assert sample_tokens(client.model, client.maker.encoder, asks, 12) == expected
    assert all(own.generation_config.repetition_penalty == 1000 for own in holders)


@pytest.fixture
def asked(monkeypatch):
    """Prompts of each batch; all answers are one token."""
    found = []

    def sample(model, encoder, asks, *_):
        found.append([ask.prompt for ask in asks])
        return [[5] for _ in asks]

    monkeypatch.setattr(rollouts, "sample_tokens", sample)
    return found


def test_a_long_answer_leaves_a_prompt_half_the_context(rows, asked):
    batches(rows())
    client = rows()
    longest = context_length(client.model.model)
    batches(rows(max_new_tokens=longest))
    assert asked[:2] == asked[2:] and min(map(len, asked[0])) > 1


def test_the_order_of_prompts_is_that_of_data_seed(rows, asked):
    client = rows()
    client.training = client.training.model_copy(update={"data_seed": 7})
    found = [sorted({row for part in parts for row in part.rows}) for parts in batches(client)]
    order = generator(7, "batches", client.id, client.round)
    drawn = epoch_batches(len(client.share), 3, order, steps=2)
    assert found == [sorted(client.share.tokens.rows[own].tolist()) for own in drawn]


def test_a_recorded_divergence_is_never_negative(rows, asked, monkeypatch):
    client = rows(beta=0.1)
    (part, *_), _ = batches(client)
    monkeypatch.setattr(grpo, "divergence", lambda logps, _: logps * 0 - 1e-9)
    assert GRPO(GRPOSettings(beta=0.1)).loss(client.model, part, None)[1]["kl"] == 0


def test_memory_is_of_the_answers_and_not_of_the_rows(rows):
    def needed(**own):
        client = rows(**own)
        objective = GRPO(GRPOSettings(**own))
        return client_memory(client.model, client.share, client.training, "none", objective)

    assert needed(max_new_tokens=4) < needed(max_new_tokens=400)


@pytest.mark.parametrize(
    "command", [lambda own: advise(own, None, 1e9), lambda own: tune(own, 9.0)]
)
def test_what_counts_passes_over_rows_refuses(experiment, command):
    with pytest.raises(SettingsError, match="trains on answers that it generates"):
        command(experiment(**RUN))
