"""What an objective makes of a batch: the loss of its formula, of the right log-probs, lengths and halves.

The model says 1/2, 1/4, 1/8 and 1/8 for its four tokens wherever it stands, so that a completion's
log-prob is minus so many bits, ln 2 each: of FOUR 1 (of 1 token), 5 (2), 5 (3) and 3 (2). Under the
reference they are 2, 4, 4 and 5 bits, so log-ratios are 1, -1, -1 and 2 bits.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloom.data.batch import Batch, Rollouts, Sequences
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.apo import (
    APODown,
    APODownSettings,
    APOZero,
    APOZeroSettings,
    apo_down_loss,
    apo_zero_loss,
)
from fedloom.objectives.base import (
    Objective,
    Scores,
    StatisticObjective,
)
from fedloom.objectives.bco import BCO, BCOSettings, bco_loss
from fedloom.objectives.classification import Classification
from fedloom.objectives.cpo import CPO, CPOSettings, cpo_loss
from fedloom.objectives.distillation import Distillation, EnsembleDistillation, logits_in_parts
from fedloom.objectives.dpo import DPO, DPOSettings, dpo_loss
from fedloom.objectives.grpo import GRPO, GRPOSettings
from fedloom.objectives.ipo import IPO, IPOSettings, ipo_loss
from fedloom.objectives.kto import KTO, KTOSettings, kto_loss
from fedloom.objectives.orpo import ORPO, ORPOSettings, orpo_loss
from fedloom.objectives.pdpo import PDPO, PDPOSettings, pdpo_loss
from fedloom.objectives.pkto import PKTO, PKTOSettings
from fedloom.objectives.rejection_sampling import RejectionSampling, RejectionSamplingSettings
from fedloom.objectives.reward_model import RewardModel, RewardModelSettings, reward_model_loss
from fedloom.objectives.rewarded import RewardedSettings
from fedloom.objectives.rewards import completion_lengths, outcomes
from fedloom.objectives.robust_dpo import RobustDPO, RobustDPOSettings, robust_dpo_loss
from fedloom.objectives.rpo import RPO, RPOSettings
from fedloom.objectives.selector import Selector, selector_loss
from fedloom.objectives.sft import SFT
from fedloom.objectives.simpo import SimPO, SimPOSettings, simpo_loss

BIT = math.log(2)
REWARDS = [0.5, -1.0, 0.25, 2.0]


def bits(*values):
    return torch.tensor(values, dtype=torch.float32) * BIT


REFERENCE = bits(-2, -4, -4, -5)


class Model:
    """The same four probabilities everywhere, and a row's explicit reward."""

    def __init__(self, rewards=REWARDS):
        self.rewards = torch.tensor(rewards)

    def __call__(self, *, input_ids, attention_mask, logits_to_keep):
        logits = bits(-1, -2, -3, -3).expand(len(input_ids), logits_to_keep, 4)
        return SimpleNamespace(logits=logits, rewards=self.rewards[: len(input_ids)])


class Classifier:
    """Three logits a text."""

    LOGITS = BIT * torch.tensor(
        [[0.0, 1, 0], [0, 0, 2], [1, 0, 0], [0, 0, 0], [2, 0, 0], [1, 1, 1]]
    )

    def __call__(self, *, input_ids, attention_mask):
        return SimpleNamespace(logits=self.LOGITS[: len(input_ids)])


def sequences(*completions):
    longest = max(map(len, completions))
    ids = [[3, *own, *[0] * (longest - len(own))] for own in completions]
    mask = [[0, *[1] * len(own), *[0] * (longest - len(own))] for own in completions]
    completion = torch.tensor(mask).bool()
    return Sequences(torch.tensor(ids), completion.long(), completion, 1)


FOUR = sequences([0], [1, 2], [2, 0, 0], [0, 1])


def batch(rows=2, own=FOUR, **known):
    count = int(own.completion_mask.sum())
    return Batch(tuple(range(rows)), own, count, count + rows, **known)


def feedback(*labels, **known):
    return batch(4, labels=torch.tensor(labels), reference_logps=REFERENCE, **known)


PAIRS = sequences([0], [1, 2], [2, 2], [2, 0, 0], [0, 1], [1])
"""Three chosen answers, of 1, 5 and 6 bits, and three rejected ones, of 5, 3 and 2."""

CHOSEN, REJECTED = bits(-1, -5, -6), bits(-5, -3, -2)
REFERENCES = bits(-2, -4, -3), bits(-4, -5, -4)
RATIOS = bits(1, -1, -3), bits(-1, 2, 2)
LENGTHS = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 2.0, 1.0])
MEANS = CHOSEN / LENGTHS[0], REJECTED / LENGTHS[1]
MEAN_RATIOS = RATIOS[0] / LENGTHS[0], RATIOS[1] / LENGTHS[1]
CROSS_ENTROPY = (1 + 5 / 2 + 6 / 2) / 3 * BIT
EXPLICIT = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([2.0, 1.5, -0.5])


@pytest.mark.parametrize(
    ("objective", "expected", "beside"),
    [
        (APOZero(APOZeroSettings(beta=0.5)), apo_zero_loss(*RATIOS, beta=0.5), 0),
        (APODown(APODownSettings(beta=0.5)), apo_down_loss(*RATIOS, beta=0.5), 0),
        (
            RobustDPO(RobustDPOSettings(beta=0.5, flip_rate=0.2)),
            robust_dpo_loss(*RATIOS, beta=0.5, flip_rate=0.2),
            0,
        ),
        (IPO(IPOSettings(beta=0.5)), ipo_loss(*MEAN_RATIOS, beta=0.5), 0),
        (
            CPO(CPOSettings(beta=0.5, sft_weight=0.25)),
            cpo_loss(CHOSEN, REJECTED, LENGTHS[0], beta=0.5, sft_weight=0.25),
            0,
        ),
        (SimPO(SimPOSettings(beta=1.5, gamma=0.5)), simpo_loss(*MEANS, beta=1.5, gamma=0.5), 0),
        (ORPO(ORPOSettings(beta=0.5)), orpo_loss(*MEANS, beta=0.5), 0),
        (
            DPO(DPOSettings(beta=0.5, label_smoothing=0.1, sft_weight=0.25)),
            dpo_loss(CHOSEN, REJECTED, *REFERENCES, beta=0.5, label_smoothing=0.1),
            0.25,
        ),
        (
            RPO(RPOSettings(beta=0.5, sft_weight=0.25), by_pair=True),
            dpo_loss(CHOSEN, REJECTED, *REFERENCES, beta=0.5),
            0.25,
        ),
        (
            PDPO(PDPOSettings(beta=0.5, gamma=2.0, label_smoothing=0.1, sft_weight=0.25)),
            pdpo_loss(RATIOS, EXPLICIT, beta=0.5, gamma=2.0, label_smoothing=0.1),
            0.25,
        ),
        (
            PDPO(PDPOSettings(beta=0.5, gamma=2.0, reward_mode="separate")),
            pdpo_loss(RATIOS, EXPLICIT, beta=0.5, gamma=2.0, separate=True),
            0,
        ),
        (
            PDPO(PDPOSettings(beta=0.5, reward_mode="implicit")),
            pdpo_loss(RATIOS, None, beta=0.5, gamma=0.0),
            0,
        ),
    ],
    ids=lambda own: type(own).__name__ if hasattr(own, "reported") else "",
)
def test_pairs(objective, expected, beside):
    """``beside``: weight of the chosen answers' cross-entropy, 1, 5/2 and 3 bits a token."""
    pairs = batch(3, PAIRS, reference_logps=torch.cat(REFERENCES))
    loss, metrics = objective.loss(Model(torch.cat(EXPLICIT).tolist()), pairs, None)
    torch.testing.assert_close(loss, expected[0] + beside * CROSS_ENTROPY)
    assert metrics.keys() <= {spec.name for spec in objective.reported}
    if beside:
        assert metrics.pop("chosen_cross_entropy").item() == pytest.approx(CROSS_ENTROPY)
    assert metrics.keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(metrics[name], value)
    assert objective.weight(pairs) == 3.0 and objective.metric_weights(pairs) == {}


@pytest.mark.parametrize(
    ("loss", "own", "prefix"),
    [
        (apo_zero_loss, {}, ""),
        (apo_down_loss, {}, ""),
        (robust_dpo_loss, {"flip_rate": 0.2}, ""),
        (ipo_loss, {}, "token_"),
        (simpo_loss, {"gamma": 0.5}, "token_"),
        (orpo_loss, {}, "token_"),
        (lambda a, b, beta: cpo_loss(a, b, LENGTHS[0][:2], beta=beta, sft_weight=0.0), {}, ""),
        (lambda a, b, beta: dpo_loss(a - 9, b - 9, a * 0 - 9, b * 0 - 9, beta=beta), {}, ""),
        (lambda a, b, beta: pdpo_loss((a, b), None, beta=beta, gamma=0.0), {}, ""),
    ],
)
def test_rewards_of_pairs_are_beta_times_log_ratios(loss, own, prefix):
    """-2, -3 and -4, -1, times 0.5."""
    chosen, rejected = torch.tensor([-2.0, -3.0]), torch.tensor([-4.0, -1.0])
    metrics = loss(chosen, rejected, beta=0.5, **own)[1]
    found = [
        metrics[f"{prefix}reward_{name}"] for name in ("chosen", "rejected", "margin", "accuracy")
    ]
    assert [value.item() for value in found] == [-1.25, -1.25, 0.0, 0.5]
    tie = loss(chosen, chosen, beta=0.5, **own)[1]
    assert tie[f"{prefix}reward_accuracy"] == 0  # as in TRL


def test_explicit_rewards_of_pairs():
    """Won and tied, 2 times each: with 0.5 times the ratios 1 and 4.5, against -6 and 5.5."""
    ratios = torch.tensor([-2.0, -3.0]), torch.tensor([-4.0, -1.0])
    explicit = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 3.0])
    metrics = pdpo_loss(ratios, explicit, beta=0.5, gamma=2.0)[1]
    assert metrics["reward_chosen"].item() == 2.75 and metrics["reward_rejected"].item() == -0.25
    assert metrics["explicit_accuracy"].item() == 0.75 and metrics["implicit_accuracy"] == 0.5


def test_pairs_of_rewards():
    """Rewards are read from the first output: 0, 0 and 1 bit against 0, 2 and 1."""
    pairs = batch(3, PAIRS, margins=torch.tensor([1.0, 0.5, 0.0]))
    chosen, rejected = bits(0, 0, 1), bits(0, 2, 1)
    for margins, own in ((True, pairs.margins), (False, None)):
        settings = RewardModelSettings(margins=margins, center_rewards_coefficient=0.1)
        loss, _ = RewardModel(settings).loss(Classifier(), pairs, None)
        torch.testing.assert_close(loss, reward_model_loss(chosen, rejected, own, center=0.1)[0])
    assert RewardModel().reads_margins and RewardModel.outputs == ("reward",)


def test_questions_of_a_selector():
    """Of A (1 bit) in the first half and B (2 bits) in the second: leads of 1 and -1 bit."""
    asked = batch(2, sequences([0], [0], [1], [1]))
    loss, metrics = Selector().loss(Model(), asked, None)
    torch.testing.assert_close(loss, selector_loss(bits(1, 1, -1, -1))[0])
    assert metrics["selection_accuracy"].item() == 0.5


def test_texts():
    """8 tokens of 14 bits, of which the four of 1 bit are the likeliest; by row 1, 5/2, 5/3 and 3/2 bits."""
    loss, metrics = SFT().loss(Model(), batch(4), None)
    assert loss.item() == pytest.approx(14 / 8 * BIT) and SFT().weight(batch(4)) == 8.0
    assert metrics["token_accuracy"].item() == 0.5
    rows = SFT().for_rows()
    loss, metrics = rows.loss(Model(), batch(4), None)
    assert loss.item() == pytest.approx((1 + 5 / 2 + 5 / 3 + 3 / 2) / 4 * BIT)
    assert metrics["token_accuracy"].item() == 0.5 and rows.weight(batch(4)) == 4.0
    assert not SFT().by_row


def test_classes():
    """Of odds 1 : 2 : 1, 1 : 1 : 4, 2 : 1 : 1 and 1 : 1 : 1."""
    own = batch(4, labels=torch.tensor([1, 0, 0, 0]))
    loss, metrics = Classification().loss(Classifier(), own, None)
    expected = -sum(map(math.log, (2 / 4, 1 / 6, 2 / 4, 1 / 3))) / 4
    assert loss.item() == pytest.approx(expected) and metrics["accuracy"].item() == 0.75


def test_answers_of_bco():
    """Desirable 1 and 2 bits, the others -1 and -1: the shift is (3/2 - 1) / 2 bits, beta times."""
    own, other = BCO(BCOSettings(beta=0.5)), feedback(True, False, False, True)
    for statistic in (
        own.statistics(Model(), [other]),
        own.statistic([own.scores(Model(), other)], [other]),
    ):
        assert statistic.item() == pytest.approx(0.5 * BIT / 4)
    ratios = bits(1, -1, -1, 2)
    loss, metrics = own.loss(Model(), other, statistic)
    torch.testing.assert_close(loss, bco_loss(0.5 * ratios, other.labels, statistic)[0])
    assert metrics["sided_accuracy"] == 1.0
    assert bco_loss(bits(1, 1), other.labels[:2], bits(1)[0])[1]["sided_accuracy"] == 0.0  # ties
    rows = own.for_rows()
    assert own.shifted and not rows.shifted
    assert rows.statistics(Model(), [other]) == 0 == rows.statistic([], [other])


def test_answers_of_kto():
    """Mismatched answers of 1 and 5 bits, 4 and 5 under the reference: z0 is (3 + 0) / 2 bits."""
    passes = (sequences([0]), sequences([1, 2]))
    known = {"mismatched": passes, "mismatched_reference_logps": bits(-4, -5)}
    one, other = feedback(True, True, False, True, **known), feedback(False, False, True, True)
    own = KTO(KTOSettings(beta=0.5, desirable_weight=2.0, undesirable_weight=0.25))
    scores = [own.scores(Model(), part) for part in (one, other)]
    for z0 in (own.statistics(Model(), [other, one]), own.statistic(scores, [one, other])):
        assert z0.item() == pytest.approx(1.5 * BIT)
    assert own.statistics(Model(), [other]) == 0
    expected, metrics = kto_loss(
        bits(-1, -5, -5, -3), REFERENCE, one.labels, z0,
        beta=0.5, desirable_weight=2.0, undesirable_weight=0.25,
    )  # fmt: skip
    loss, found = own.loss(Model(), one, z0)
    torch.testing.assert_close(loss, expected)
    assert (
        metrics.items() <= found.items() and not found["without_kl"] and not found["single_class"]
    )
    assert own.loss(Model(), other, z0)[1]["without_kl"] == 1
    assert own.metric_weights(one) == {"reward_desirable": 3.0, "reward_undesirable": 1.0}
    assert metrics["reward_desirable"].item() == pytest.approx(0.5 * (1 - 1 + 2) / 3 * BIT)
    pass_of_both = sequences([0], [1, 2], [2, 0, 0], [0, 1], [0], [1], [0], [1])
    joint = own.scores(Model(), replace(one, mismatched=(), joint=pass_of_both))
    torch.testing.assert_close(joint.logps, bits(-1, -5, -5, -3))
    torch.testing.assert_close(joint.mismatched, bits(-1, -2, -1, -2))


def test_a_fixed_reference_point():
    one = feedback(True, True, False, True)
    estimated, fixed = KTO(), KTO(KTOSettings(z0=0.5))
    assert (estimated.needs_mismatched, fixed.needs_mismatched) == (True, False)
    assert fixed.statistics(Model(), [one]) == 0.5 == fixed.for_rows().z0
    rows = estimated.for_rows()
    assert (rows.z0, rows.needs_mismatched, estimated.z0) == (0.0, False, None)
    assert rows.statistics(Model(), [one]) == 0
    balanced = KTO(KTOSettings(weights="balanced"))
    assert fixed.separable.holds and not balanced.separable.holds
    client = estimated.for_client(np.array([1, 1, 1]))
    assert client.single_class and client.loss(Model(), one, bits(0)[0])[1]["single_class"] == 1
    assert not estimated.single_class and not balanced.for_client(np.array([1, 0])).single_class


def test_answers_with_explicit_rewards():
    """2 times REWARDS beside 0.5 times the log-ratios: as log-probs of 2 / 0.5 = 4 times as much."""
    own = PKTO(PKTOSettings(beta=0.5, gamma=2.0))
    one = feedback(True, True, False, True)
    loss, metrics = own.loss(Model(), one, bits(1)[0])
    as_logps = bits(-1, -5, -5, -3) + 4 * torch.tensor(REWARDS)
    expected, known = kto_loss(as_logps, REFERENCE, one.labels, bits(1)[0], beta=0.5)
    torch.testing.assert_close(loss, expected)
    assert metrics["reward_desirable"] == known["reward_desirable"]
    assert metrics["explicit_sided_accuracy"].item() == 0.5  # 0.5 and 2 of the desirable, not 0.25
    zero = own.loss(Model([0.0] * 4), one, bits(1)[0])[1]
    assert zero["explicit_sided_accuracy"] == 0
    pass_of_both = sequences([0], [1, 2], [2, 0, 0], [0, 1], [0], [1], [0], [1])
    joint = own.scores(Model(REWARDS + [9.0] * 4), replace(one, joint=pass_of_both))
    torch.testing.assert_close(joint.logps, bits(-1, -5, -5, -3))
    torch.testing.assert_close(joint.mismatched, bits(-1, -2, -1, -2))
    assert joint.rewards.tolist() == REWARDS and own.needs_reward
    assert own.scores(Model(), one).rewards.tolist() == REWARDS


PARTS = math.sqrt(1 / 2), 1 / 2, math.sqrt(1 / 8)
"""Of the four tokens at temperature 2, the last of them twice; they add up to sqrt(2) + 1/2."""


def warm(part):
    return math.log(part / (PARTS[0] + PARTS[1] + 2 * PARTS[2]))


def rollouts(**known):
    return Rollouts(
        torch.tensor([1.0, -2.0, 0.5, 3.0]),
        torch.tensor([1.0, 0.0, 2.0, 4.0]),
        torch.tensor([0.5, 0.5, 1.5, 1.5]),
        **known,
    )


ANSWERED = batch(4, rollouts=rollouts())


@pytest.mark.parametrize(
    ("averaging", "expected", "divided"),
    [
        ("grpo", (1 - 2 + 0.5 + 3) / 4, 4),
        ("dapo", (1 - 2 * 2 + 3 * 0.5 + 2 * 3) / 8, 8),
        ("dr_grpo", (1 - 2 * 2 + 3 * 0.5 + 2 * 3) / (4 * 16), 4),
    ],
)
def test_answers_of_the_policy_itself(averaging, expected, divided):
    """The ratio is 1 everywhere: minus the advantages of 1, 2, 3 and 2 tokens, averaged."""
    own = GRPO(GRPOSettings(averaging=averaging, max_new_tokens=16))
    loss, metrics = own.loss(Model(), ANSWERED, None)
    assert loss.item() == pytest.approx(-expected) and "kl" not in metrics
    found = {name: value.item() for name, value in metrics.items()}
    assert found == {"reward": 7 / 4, "reward_spread": 1.0, "clipped": 0.0, "answer_tokens": 2.0}
    assert own.weight(ANSWERED) == divided and own.weight(batch(4)) == 8
    answers = dict.fromkeys(("reward", "reward_spread", "answer_tokens"), 4.0)
    assert own.metric_weights(ANSWERED) == {**answers, "clipped": 8.0, "kl": 8.0}
    plain, nothing = own.loss(Model(), batch(4), None)  # at temperature 1: 14 bits of 8 tokens
    assert plain.item() == pytest.approx(14 / 8 * BIT) and nothing == {}


def test_answers_of_another_policy():
    """Ratios of 2 are clipped at 1.25 where the advantage is above 0, which three of four are (1 + 3 + 2
    tokens of 8); the reference says e times as much less a bit at each token: 1/2 - 1 + ln 2."""
    mask = FOUR.completion_mask[:, 1:]
    logps = torch.where(mask, bits(-1, -2, -3)[FOUR.input_ids[:, 1:].clamp(max=2)], 0.0)
    known = rollouts(old_logps=logps - BIT, reference_logps=logps - BIT)
    settings = {"clip": 0.125, "clip_high": 0.25, "averaging": "dapo"}
    own = batch(4, rollouts=known)
    loss, metrics = GRPO(GRPOSettings(**settings)).loss(Model(), own, None)
    plain = -(1.25 * 1 - 2 * 2 * 2 + 1.25 * 3 * 0.5 + 1.25 * 2 * 3) / 8
    assert loss.item() == pytest.approx(plain) and "kl" not in metrics
    assert metrics["clipped"].item() == 6 / 8
    loss, metrics = GRPO(GRPOSettings(**settings, beta=0.5)).loss(Model(), own, None)
    assert metrics["kl"].item() == pytest.approx(BIT - 0.5)
    assert loss.item() == pytest.approx(plain + 0.5 * (BIT - 0.5))
    alone = replace(known, reference_logps=None)
    loss, metrics = GRPO(GRPOSettings(**settings, beta=0.5)).loss(
        Model(), batch(4, rollouts=alone), None
    )
    assert loss.item() == pytest.approx(plain) and "kl" not in metrics
    both = GRPO(GRPOSettings(clip=0.125, averaging="dapo")).loss(Model(), own, None)[0]
    assert both.item() == pytest.approx(plain * (-8 + 1.125 * 8.5) / (-8 + 1.25 * 8.5))
    apart = replace(known, old_logps=None, reference_logps=torch.where(mask, warmed(), 0.0))
    settings |= {"temperature": 2.0, "beta": 0.5}
    metrics = GRPO(GRPOSettings(**settings)).loss(Model(), batch(4, rollouts=apart), None)[1]
    assert metrics["kl"].item() == pytest.approx(0, abs=1e-6)  # the policy's, at its temperature


def test_answers_may_have_one_ratio_for_all_their_tokens():
    """The first of L tokens has a ratio of 2^L and the others of 1, so that each answer's mean is 2."""
    mask = FOUR.completion_mask[:, 1:]
    logps = torch.where(mask, bits(-1, -2, -3)[FOUR.input_ids[:, 1:].clamp(max=2)], 0.0)
    first = mask & (mask.cumsum(1) == 1)
    uneven = logps - torch.where(first, BIT * mask.sum(1, keepdim=True), 0.0)
    settings = {"clip": 0.125, "clip_high": 0.25}

    def loss(old, **more):
        own = batch(4, rollouts=rollouts(old_logps=old, reference_logps=None))
        return GRPO(GRPOSettings(**settings, **more)).loss(Model(), own, None)[0].item()

    even = loss(logps - BIT)
    assert loss(uneven, importance_sampling_level="sequence") == pytest.approx(even)
    assert loss(uneven) != pytest.approx(even, rel=0.1)


def warmed():
    return torch.tensor([warm(part) for part in PARTS])[FOUR.input_ids[:, 1:].clamp(max=2)]


def test_what_grpo_generates():
    rewards = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
    own = GRPO(
        GRPOSettings(scale="none", group=3, max_new_tokens=7, iterations=2, beta=0.5)
    ).generation
    assert (own.group, own.max_new_tokens, own.iterations, own.reference) == (3, 7, 2, True)
    assert own.advantages(rewards)[0].tolist() == [[-1, 1], [-2, 2]] and own.keeps is None
    assert not GRPO().generation.reference and (own.rewards, own.weights) == (
        ("exact_match",),
        (1.0,),
    )


def test_answers_that_were_best():
    own = RejectionSampling(RejectionSamplingSettings(minimum=2.0, group=3))
    loss, metrics = own.loss(Model(), ANSWERED, None)
    assert loss.item() == pytest.approx(14 / 8 * BIT) and own.weight(ANSWERED) == 8
    found = {name: value.item() for name, value in metrics.items()}
    assert found == {"winner_reward": 7 / 4, "reward_spread": 1.0, "answer_tokens": 2.0}
    assert own.metric_weights(ANSWERED) == dict.fromkeys(found, 4.0)
    plain, nothing = own.loss(Model(), batch(4), None)
    assert plain.item() == loss.item() and nothing == {}
    kept = own.generation.keeps(torch.tensor([[1.0, 3.0], [0.0, 1.0]]))
    assert kept.tolist() == [[False, True], [False, False]]
    assert (own.generation.iterations, own.generation.reference) == (1, False)


TEACHER = torch.tensor([[1 / 4, 1 / 2, 1 / 4]]).log()
"""Against 4/7, 2/7 and 1/7, which the first three of the model's tokens are among each other."""

APART = 1 / 4 * math.log(7 / 16) + 1 / 2 * math.log(7 / 4) + 1 / 4 * math.log(7 / 4)


def test_tokens_of_a_teacher_with_a_smaller_vocabulary():
    """Eight tokens; the model says the first, four of eight times the true one, the teacher the second."""
    own = Distillation("causal", 1.0, 0.75, labelled=True)
    taught = batch(4, teacher=TEACHER.expand(8, 3))
    loss, metrics = own.loss(Model(), taught, None)
    tokens = -(4 * math.log(4 / 7) + 2 * math.log(2 / 7) + 2 * math.log(1 / 7)) / 8
    assert FOUR.input_ids[FOUR.completion_mask].tolist() == [0, 1, 2, 2, 0, 0, 0, 1]
    assert loss.item() == pytest.approx(0.75 * APART + 0.25 * tokens)
    assert metrics["divergence"].item() == pytest.approx(APART) and metrics["agreement"] == 0
    alike = batch(4, teacher=torch.tensor([[0.5, 0.25, 0.25]]).expand(8, 3).log())
    assert own.loss(Model(), alike, None)[1]["agreement"] == 1
    assert own.weight(taught) == 8
    beyond = batch(1, sequences([3]), teacher=TEACHER)  # a token that the teacher does not have
    whole = Distillation("causal", 1.0, 1.0, labelled=True).loss(Model(), beyond, None)[0]
    assert whole.item() == pytest.approx(APART)
    without = Distillation("causal", 1.0, 0.75, labelled=False)
    assert (own.share, without.share) == (0.75, 1.0)
    assert without.loss(Model(), taught, None)[0].item() == pytest.approx(APART)
    (logits,) = logits_in_parts(Model(), taught, "causal")
    torch.testing.assert_close(logits, bits(-1, -2, -3, -3).expand(8, 4))


def test_classes_of_a_teacher():
    labels = torch.tensor([1, 0, 0, 0])
    teacher = torch.tensor([[0.0, BIT, 0.0], [0.0, 0.0, 1.0], [0.0, BIT, 0.0], [0.0, 0.0, 0.0]])
    own = Distillation("classification", 1.0, 0.5, labelled=True)
    taught = batch(4, teacher=teacher, labels=labels)
    loss, metrics = own.loss(Classifier(), taught, None)
    truth = -sum(map(math.log, (2 / 4, 1 / 6, 2 / 4, 1 / 3))) / 4
    assert loss.item() == pytest.approx(0.5 * metrics["divergence"].item() + 0.5 * truth)
    assert metrics["agreement"].item() == 0.75 and own.weight(taught) == 4
    unlabelled = own.loss(Classifier(), batch(4, teacher=teacher), None)[0]
    assert unlabelled.item() == pytest.approx(metrics["divergence"].item())
    (logits,) = logits_in_parts(Classifier(), taught, "classification")
    assert torch.equal(logits, Classifier.LOGITS[:4])


def test_what_an_ensemble_teaches():
    """Labels 0, 1, 2, 2, 0, 0, 0 and 0; two of eight are disagreed about, with TEACHER's logits."""
    labels = torch.tensor([[0.0], [1], [2], [2], [0], [0], [0], [0]])
    disagreed = torch.tensor([[0.0], [1], [0], [0], [0], [0], [0], [1]])
    taught = batch(4, teacher=torch.cat([labels, disagreed, TEACHER.expand(8, 3)], 1))
    own = EnsembleDistillation("causal", 0.5)
    loss, metrics = own.loss(Model(), taught, None)
    tokens = -(5 * math.log(4 / 7) + math.log(2 / 7) + 2 * math.log(1 / 7)) / 8
    assert loss.item() == pytest.approx(tokens + 0.5 * APART / 4)
    assert metrics["divergence"].item() == pytest.approx(APART / 4)
    assert metrics["agreement"].item() == 5 / 8 and own.weight(taught) == 8
    assert EnsembleDistillation("classification", 0.5).weight(taught) == 4


NEEDS = {
    "reference": {"dpo", "robust_dpo", "rpo", "apo_zero", "apo_down", "ipo", "kto", "bco", "pdpo", "pkto"},
    "mismatched": {"kto", "pkto"},
    "reward": {"pdpo", "pkto"},
}  # fmt: skip
GENERATES = {"grpo", "rejection_sampling"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_objective_says_of_itself(name):
    settings, kind = OBJECTIVES[name]
    own = kind(settings())
    assert kind.needs_reference == own.needs_reference == (name in NEEDS["reference"])
    assert kind.needs_mismatched == own.needs_mismatched == (name in NEEDS["mismatched"])
    assert own.needs_reward == (name in NEEDS["reward"])
    assert own.separable.holds == (name not in GENERATES) == (own.generation is None)
    assert own.reads_margins == (name == "reward_model")
    assert own.compares == (name == "selector")
    assert own.head == (
        "classification" if name in ("classification", "reward_model") else "causal"
    )
    assert own.gamma == (1.0 if name in ("simpo", "pdpo", "pkto") else 0.0)
    assert own.for_client(np.array([1, 0])) is own or name in NEEDS["mismatched"]


def test_ties_are_half_and_nothing_is_shorter_than_a_token():
    assert outcomes(torch.tensor([0.25, 0.0, -0.25, 2.0])).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert completion_lengths(FOUR).tolist() == [1, 2, 3, 2]
    assert completion_lengths(sequences([0], [])).tolist() == [1, 1]
    rows = SFT().for_rows().loss(Model(), batch(2, sequences([0, 1], [])), None)[0]
    assert rows.item() == pytest.approx((3 / 2 + 0) / 2 * BIT)  # a row cut down to its prompt


def test_weights_of_rewards():
    names = ["exact_match", "number"]
    assert RewardedSettings(name="own", rewards=names).weights == (1.0, 1.0)
    own = RewardedSettings(name="own", rewards=names, reward_weights=[0.5, 2.0])
    assert own.weights == (0.5, 2.0) and own.faults() == []
    assert RewardedSettings(name="own").faults() == []
    wrong = RewardedSettings(name="own", rewards=["exact", "number"], reward_weights=[1.0])
    about, count = wrong.faults()
    assert about.startswith("objective.rewards: ") and "1 numbers for 2 rewards" in count


def test_an_objective_that_says_nothing():
    own = Objective()
    assert own.for_rows() is own and own.for_client(np.array([1])) is own
    assert own.weight(batch(4)) == 4.0 and own.metric_weights(batch(4)) == {}
    assert own.statistics(Model(), [batch(4)]) is None and not own.separable.holds
    assert (own.beta, own.gamma, own.head, own.outputs) == (0.1, 0.0, "causal", ())
    needs = own.reads_margins, own.compares, own.needs_reference, own.needs_mismatched
    assert not any(needs) and not own.needs_reward and own.generation is None
    with pytest.raises(TypeError, match="Objective must define loss"):
        own.loss(Model(), batch(4), None)
    other, scored = StatisticObjective(), Scores(torch.zeros(4))
    with pytest.raises(TypeError, match="must define scores"):
        other.scores(Model(), batch(4))
    with pytest.raises(TypeError, match="must define statistic"):
        other.statistic([scored], [batch(4)])
    with pytest.raises(TypeError, match="must define loss_of"):
        other.loss_of(scored, batch(4), torch.zeros(()))
