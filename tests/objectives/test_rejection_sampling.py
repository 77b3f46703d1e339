"""Rejection sampling: the best answer of each prompt, and runs that learn from nothing else."""

import pytest
import torch

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.objectives.logps import completion_token_logps
from fedloom.objectives.rejection_sampling import of_groups, winners
from fedloom.objectives.sft import sft_loss
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.training.steps import Making

REWARDS = torch.tensor([[0.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, -1.0]])

RUN = {
    "data": {"source": "builtin:sums", "builtin_rows": 40},
    "objective": {
        "name": "rejection_sampling", "group": 4, "max_new_tokens": 4, "rewards": ["regex:[a-m]"],
    },
    "federation": {"rounds": 1, "clients": 2},
    "training": {"local_steps": 2, "batch_size": 4},
    "evaluation": {"samples": 0, "judged_by": "exact_match", "max_new_tokens": 4},
}  # fmt: skip


def test_winners_by_hand():
    found = winners(REWARDS)
    assert found.nonzero().tolist() == [[0, 1], [1, 0], [2, 0]]  # of equal ones the first
    assert winners(REWARDS, 1.0).nonzero().tolist() == [[0, 1], [2, 0]]
    assert not winners(REWARDS, 3.0).any()
    means, spreads = of_groups(REWARDS)
    assert means[0].tolist() == [1.25] * 4 and spreads[1] == 0


def made(experiment, report=lambda *drawn: None, **objective):
    own = experiment(**{**RUN, "objective": {**RUN["objective"], **objective}})
    client = assemble(own, partition_data(own), probe=False).local.client(0, 1)
    making = Making(
        client.seed, client.id, client.round, "", client.work, again=False, report=report
    )
    return client, list(client.maker.batches(client.model, client.share, client.training, making))


def test_a_batch_is_one_answer_a_prompt_and_its_loss_that_of_sft(experiment):
    client, found = made(experiment)
    assert [sum(map(len, parts)) for parts in found] == [4, 4]
    part = found[0][0]
    assert (part.rollouts.rewards >= part.rollouts.advantages).all()  # the best is above the mean
    logps, mask, _ = completion_token_logps(client.model, part.sequences)
    loss, metrics = client.objective.loss(client.model, part, None)
    torch.testing.assert_close(loss, sft_loss(logps, mask))
    assert metrics["winner_reward"] == part.rollouts.rewards.mean() and "reward" not in metrics


def test_prompts_without_a_good_answer_teach_nothing(experiment):
    drawn = []
    client, found = made(experiment, lambda *own: drawn.append(own), minimum=2.0)
    assert found == [[], []]
    before = client.model.read()
    result = client.train(0.01)
    # the mean reward is over all answers that were drawn: nobody is needier than who has no winner
    assert [(name, count) for name, _, count in drawn] == [("reward", 16)] * 2
    expected = sum(mean for _, mean, _ in drawn) / 2
    assert result.steps == 0 and 0 < expected < 2
    assert result.metrics == {"skipped_steps": 2.0, "reward": pytest.approx(expected)}
    assert all(torch.equal(own, before[name]) for name, own in client.model.read().items())


def test_settings_are_checked_as_those_of_grpo():
    for wrong, told in (
        ({"rewards": ["exact"]}, "did you mean 'exact_match'"),
        ({"reward_weights": [1.0, 2.0]}, "2 numbers for 1 rewards"),
    ):
        objective = {"name": "rejection_sampling", **wrong}
        with pytest.raises(SettingsError, match=told):
            Experiment.from_table({"data": {"source": "builtin:sums"}, "objective": objective})
    table = {"objective": {"name": "rejection_sampling"}, "training": {"local_tokens": 99}}
    with pytest.raises(SettingsError, match="'rejection_sampling' generates"):
        Experiment.from_table({"data": {"source": "builtin:sums"}, **table})
