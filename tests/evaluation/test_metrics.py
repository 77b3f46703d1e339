"""Held-out metrics by hand."""

import builtins
import math

import pytest
import torch

from fedloom.errors import ModelError
from fedloom.evaluation.metrics import (
    HELD_OUT,
    METRICS,
    PRIMARY_METRICS,
    answer_scores,
    choice_metrics,
    exact_scores,
    feedback_metrics,
    instruction_metrics,
    labelled_metrics,
    of_answers,
    of_pairs,
    of_rows,
    preference_metrics,
    reward_metrics,
    selection_metrics,
)
from fedloom.statistics.intervals import SHARE, UNBOUNDED, Sample


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_of_all_headlines_a_loss_alone_is_better_low():
    assert {own.name for own in PRIMARY_METRICS.values() if not own.higher_is_better} == {"loss"}
    assert sum(own.higher_is_better for own in PRIMARY_METRICS.values()) == len(METRICS) - 1


def test_a_perplexity_may_be_larger_than_a_loss():
    """e^27 is 5e11: a loss of ln 1e12 = 27.6 nats a token is far above that of chance."""
    loss, perplexity, _ = METRICS["instruction"]
    assert (loss.highest, perplexity.highest, HELD_OUT.highest) == (1e9, 1e12, 2**40)


def test_preference():
    # margins: (3 - -1) = 4 won, (0 - 0) = 0 tie, (-2 - 0) = -2 lost
    found = preference_metrics(
        t(-1, -5, -9),
        t(-6, -4, -1),
        t(-4, -5, -7),
        t(-5, -4, -1),
        (t(1, 5, 3), t(2, 5, 1)),
        beta=0.5,
    )
    assert found["preference_accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    # -1/1 > -6/2, -5/5 < -4/5, -9/3 < -1/1
    assert found["normalised_accuracy"] == pytest.approx(1 / 3)
    assert found["likelihood_accuracy"] == pytest.approx(1 / 3)
    assert found["longer_accuracy"] == pytest.approx((0 + 0.5 + 1) / 3)  # 1 < 2, 5 = 5, 3 > 1
    assert found["reward_margin"] == pytest.approx(0.5 * 2 / 3)  # beta times, as in training
    losses = [math.log(1 + math.exp(-m)) for m in (2.0, 0.0, -1.0)]
    assert found["loss"] == pytest.approx(sum(losses) / 3)


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy"),
    [((3, 5, 9), (1, 2, 4), 1.0), ((3, 5, 1), (4, 5, 4), 0.5 / 3), ((1, 1, 2), (2, 3, 3), 0.0)],
)
def test_the_rule_that_the_longer_answer_is_chosen(chosen, rejected, accuracy):
    zero = t(0, 0, 0)
    found = preference_metrics(zero, zero, zero, zero, (t(*chosen), t(*rejected)), beta=0.1)
    assert found["longer_accuracy"] == pytest.approx(accuracy)
    assert found["preference_accuracy"] == 0.5


def test_preference_with_explicit_rewards():
    """Implicit 0.5 x (2, -4, 2) = (1, -2, 1), explicit (-1, 3, 1), gamma 2: (-1, 4, 3) together."""
    zero, lengths = t(0, 0, 0), (t(1, 1, 1), t(1, 1, 1))
    explicit = (t(0, 3, 1), t(1, 0, 0))
    found = preference_metrics(t(2, -4, 2), zero, zero, zero, lengths, 0.5, explicit, gamma=2.0)
    assert found["preference_accuracy"] == found["implicit_accuracy"] == pytest.approx(2 / 3)
    assert found["explicit_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_margin"] == pytest.approx(2.0)
    losses = [math.log(1 + math.exp(-m)) for m in (-1.0, 4.0, 3.0)]
    assert found["loss"] == pytest.approx(sum(losses) / 3)


def test_feedback_with_explicit_rewards():
    """Implicit (1, 0) against (2, 0), explicit (3, 1) against (0, 2); gamma 1: (4, 1) against (2, 2)."""
    desirable = torch.tensor([True, True, False, False])
    found = feedback_metrics(t(1, 0, 2, 0), t(0, 0, 0, 0), desirable, 1.0, t(3, 1, 0, 2), gamma=1.0)
    assert found["implicit_auc"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    assert found["explicit_auc"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert found["feedback_auc"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert (found["reward_desirable"], found["reward_undesirable"]) == (2.5, 2.0)
    without = feedback_metrics(t(1, 0, 2, 0), t(0, 0, 0, 0), desirable, 1.0, t(3, 1, 0, 2))
    assert (without["reward_desirable"], without["reward_undesirable"]) == (0.5, 1.0)  # gamma is 0


def test_a_reference_is_taken_off():
    desirable = torch.tensor([True, False])
    found = feedback_metrics(t(-3, -4), t(-5, -1), desirable, beta=0.5)
    assert found == {"feedback_auc": 1.0, "reward_desirable": 1.0, "reward_undesirable": -1.5}


def test_feedback():
    # rewards 2 and 0 against 1 and 0: won, lost nothing: (2>1, 2>0, 0<1, 0=0) = (1 + 1 + 0 + 0.5) / 4
    policy, desirable = t(2, 0, 1, 0), torch.tensor([True, True, False, False])
    found = feedback_metrics(policy, torch.zeros(4), desirable, beta=0.5)
    assert found == {"feedback_auc": 0.625, "reward_desirable": 0.5, "reward_undesirable": 0.25}
    alone = feedback_metrics(policy, torch.zeros(4), torch.ones(4).bool())
    assert alone["reward_desirable"] == pytest.approx(
        0.1 * 3 / 4
    )  # beta is 0.1 where it is not set
    assert alone["reward_undesirable"] == 0
    other = feedback_metrics(policy, torch.zeros(4), torch.zeros(4).bool())
    assert other["reward_desirable"] == 0 and other["feedback_auc"] == 0.5
    assert alone["feedback_auc"] == 0.5


def test_instruction():
    mask = torch.tensor([[True, True], [True, False]])
    logps = t(-1, -2, -3, -9).view(2, 2)
    correct = torch.tensor([[True, False], [True, True]])
    found = instruction_metrics(logps, mask, correct)
    assert found["loss"] == 2.0 and found["perplexity"] == pytest.approx(math.exp(2))
    assert found["token_accuracy"] == pytest.approx(2 / 3)


def test_labelled():
    found = labelled_metrics(t(0, math.log(3), 0, math.log(3)).view(2, 2), torch.tensor([1, 0]))
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    logits, labels = t(2, 0, 1, 0, 5, 6).view(2, 3), torch.tensor([0, 0])
    assert labelled_metrics(logits, labels)["accuracy"] == 0.5
    assert labelled_metrics(logits, torch.tensor([0, 2]))["accuracy"] == 1.0


def test_selection_by_hand():
    """Leads of 3 - 1 and -2 + 4 are won, 1 - 5 lost; A is said of 3, 1 and (not B) of -1, -5."""
    found = selection_metrics(t(3, -2, 1, -1, 4, -5).view(2, 3))
    assert found["selection_accuracy"] == pytest.approx(2 / 3)
    assert found["single_order_accuracy"] == pytest.approx(3 / 6)
    assert found["first_chosen"] == pytest.approx(4 / 6)
    losses = [math.log1p(math.exp(-own)) for own in (3, -2, 1, -1, 4, -5)]
    assert found["loss"] == pytest.approx(sum(losses) / 6)


def test_rewards_of_pairs_by_hand():
    found = reward_metrics(t(3, 1, 2), t(1, 2, 1), (t(2, 6, 4), t(1, 5, 4)))
    assert found["reward_accuracy"] == pytest.approx(2 / 3)
    assert found["longer_accuracy"] == pytest.approx(2.5 / 3)
    assert found["reward_margin"] == pytest.approx(2 / 3)
    losses = [math.log1p(math.exp(-own)) for own in (2, -1, 1)]
    assert found["loss"] == pytest.approx(sum(losses) / 3)


def test_what_rows_add():
    assert of_rows("loss", t(2, 6)) == Sample("loss", (2.0, 6.0), (1.0, 1.0), (), UNBOUNDED)
    weighed = of_rows("loss", [2, 6], t(1, 3), bounds=(0.0, 9.0))
    assert weighed == Sample("loss", (2.0, 6.0), (1.0, 3.0), (), (0.0, 9.0))
    pairs = Sample("preference_accuracy", (1.0, 0.5, 0.0), (1.0,) * 3, (), SHARE)
    assert of_pairs(t(0.2, 0, -3)) == pairs


def test_what_answers_add_to_the_area_under_the_curve():
    """Good 3 and 1 against bad 2, 0 and 1: 3 of 3 and 1.5 of 3; won by 1, 2 and 1.5 of 2."""
    desirable = torch.tensor([True, False, True, False, False])
    found = of_answers(t(3, 2, 1, 0, 1), desirable)
    wins = (1.0, 0.5, 0.5, 1.0, 0.75)
    assert found == Sample("feedback_auc", wins, (1.0,) * 5, (1, 0, 1, 0, 0), SHARE)
    for label in (True, False):
        assert of_answers(t(3, 2), torch.tensor([label, label])) is None


def test_choice_is_by_the_mean_loss_of_a_token():
    # sums -4 over 4 tokens against -3 over 2: the longer one is the likelier a token
    logps, lengths = t(-4, -3, -1, -8).view(2, 2), t(4, 2, 1, 2).view(2, 2)
    found = choice_metrics(logps, lengths, torch.tensor([0, 1]))
    assert found == {"accuracy": 0.5, "loss": pytest.approx((1.0 + 4.0) / 2)}
    logps, lengths = t(-4, -3, -9, -1, -8, -2).view(2, 3), t(4, 2, 3, 1, 4, 4).view(2, 3)
    assert choice_metrics(logps, lengths, torch.tensor([0, 2]))["accuracy"] == 1.0
    assert choice_metrics(logps, lengths, torch.tensor([0, 1]))["accuracy"] == 0.5
    assert choice_metrics(logps, lengths, torch.tensor([1, 1]))["accuracy"] == 0.0


def test_exact_answers():
    accepted = [["two", "2"], ["two", "2"], ["two"], []]
    assert exact_scores([" 2\n", "22", "Two", "two"], accepted) == [1.0, 0.0, 0.0, 0.0]


def test_rouge_l_by_hand():
    # "the cat" is the longest common subsequence: precision 2/3, recall 2/4, F1 4/7
    assert answer_scores(["the black cat"], [["the old lazy cat"]]) == [pytest.approx(4 / 7)]
    # the nearest of the accepted answers counts; case and punctuation do not
    assert answer_scores(["Yes.", "no"], [["maybe so", "yes"], ["yes"]]) == [1.0, 0.0]


def test_rouge_l_without_its_library(monkeypatch):
    true_import = builtins.__import__

    def without(name, *rest):
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"rouge-score, which is not installed: pip install"):
        answer_scores(["a"], [["a"]])
