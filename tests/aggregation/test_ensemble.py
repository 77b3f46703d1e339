"""Fed-ET's consensus by hand: who counts how much, what is learnt, and where nobody disagrees."""

import pytest
import torch
import torch.nn.functional as F

from fedloom.aggregation.ensemble import confident_consensus, ensemble_labels
from fedloom.aggregation.soft_labels import likeliest
from fedloom.objectives.distillation import EnsembleDistillation


def test_by_hand():
    """Variances 8/9, 2/9, 2/9; the second and the third disagree, half each."""
    logits = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]])
    found = confident_consensus(logits)
    assert found.shares[:, 0].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert found.logits[0].tolist() == pytest.approx([4 / 3, 1 / 6, 1 / 6])
    assert found.diverse[0].tolist() == pytest.approx([0.0, 0.5, 0.5])
    assert found.disagreed.tolist() == [True]


def test_shares_do_not_depend_on_how_wide_all_logits_are():
    """A tenth of variances 8/9, 2/9 and 1/18: 16, 4 and 1 of 21; of the two that disagree 4 and 1 of 5."""
    logits = torch.tensor([[[0.2, 0, 0]], [[0, 0.1, 0]], [[0, 0, 0.05]]])
    found = confident_consensus(logits)
    assert found.shares[:, 0].tolist() == pytest.approx([16 / 21, 4 / 21, 1 / 21])
    assert found.diverse[0].tolist() == pytest.approx([0, 0.08, 0.01])


def test_who_disagrees_and_is_sure_of_nothing_counts_as_much_as_the_others_who_do():
    logits = torch.tensor([[[0.0, 1]], [[5, 5]], [[7, 7]]])
    assert confident_consensus(logits).diverse[0].tolist() == [6, 6]
    assert confident_consensus(logits[:2]).diverse[0].tolist() == [5, 5]


@pytest.mark.parametrize("unsure", [0, 5])
def test_a_model_far_surer_than_the_others_is_shrunk_by_hand(unsure):
    """Variances 0.01 and 1, which counts as 4 x 0.01: logits 1 +- 1 become 1 +- 0.2, of weight 4 of 7."""
    logits = torch.tensor([[[0.2, 0.0]], [[0.2, 0.0]], [[0.2, 0.0]], [[2.0, 0.0]]])
    found = confident_consensus(torch.cat([logits, torch.zeros(unsure, 1, 2)]))
    assert found.shares[:4, 0].tolist() == pytest.approx([1 / 7, 1 / 7, 1 / 7, 4 / 7])
    assert found.logits[0].tolist() == pytest.approx([5.4 / 7, 3.2 / 7])


def test_a_model_alone_is_the_consensus_bit_for_bit():
    logits = torch.randn(1, 20, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(confident_consensus(logits).logits.float(), logits[0])
    said, taught, shares = ensemble_labels([likeliest(logits[0].log_softmax(-1), 3)])
    assert shares == [1.0] and said.values.shape == (20, 3)
    assert torch.equal(taught.labels, logits[0].argmax(-1))


def test_log_probabilities_give_the_shares_of_logits():
    logits = torch.randn(4, 20, 7, generator=torch.Generator().manual_seed(0)).double()
    one, other = confident_consensus(logits), confident_consensus(logits.log_softmax(-1))
    torch.testing.assert_close(one.shares, other.shares)
    torch.testing.assert_close(one.logits.softmax(-1), other.logits.softmax(-1))
    assert torch.equal(one.disagreed, other.disagreed)
    some = one.disagreed
    torch.testing.assert_close(one.diverse[some].softmax(-1), other.diverse[some].softmax(-1))


def test_clients_that_are_alike_count_alike_and_nobody_disagrees():
    own = torch.randn(1, 5, 3).expand(4, 5, 3)
    found = confident_consensus(own)
    assert torch.equal(found.shares, torch.full((4, 5), 0.25, dtype=torch.float64))
    assert not found.disagreed.any() and not found.diverse.any()


@pytest.mark.parametrize("value", [0.0, -1e4])
def test_shares_are_finite_where_nobody_is_sure_of_anything(value):
    found = confident_consensus(torch.full((3, 2, 4), value))
    assert torch.equal(found.shares, torch.full((3, 2), 1 / 3, dtype=torch.float64))
    assert all(torch.isfinite(part).all() for part in found)
    tie = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    assert all(torch.isfinite(part).all() for part in confident_consensus(tie))


@pytest.mark.parametrize("claim", [25.0, 1e4, 1e30])
def test_who_claims_to_be_sure_of_everything_does_not_take_over(claim):
    """Ten models; the bad one is at most 4 / 13 of the weight, with logits twice as wide."""
    noise = torch.randn(10, 50, 6, generator=torch.Generator().manual_seed(2))
    logits = 0.1 * noise
    logits[:, :, 2] += 3.0
    logits[0] = -claim
    logits[0, :, 5] = 0.0
    found = confident_consensus(logits)
    assert found.shares[0].max() < 4 / 13 + 0.02
    assert (found.logits.argmax(-1) == 2).all() and found.disagreed.all()
    assert found.diverse.argmax(-1).eq(5).all() and torch.isfinite(found.diverse).all()


def test_one_entry_that_is_impossible_decides_nothing():
    own = torch.tensor([[[1.0, 0.0, -1e4]], [[1.0, 0.0, -1e6]]])
    found = confident_consensus(own)
    assert found.shares[:, 0].tolist() == pytest.approx([0.5, 0.5])
    assert found.logits.min() >= -29.0


def test_what_a_student_is_given_by_parts_is_what_it_is_at_once(monkeypatch):
    tables = torch.randn(3, 30, 9, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    answers = [likeliest(own, 4) for own in tables]
    said, taught, shares = ensemble_labels(answers)
    monkeypatch.setattr("fedloom.aggregation.ensemble.CHUNK", 60)
    again, parts, same = ensemble_labels(answers)
    where = torch.tensor([7, 3, 29])
    assert torch.equal(taught.at(where), parts.at(where))
    assert torch.equal(said.dense(), again.dense())
    assert sum(shares) == pytest.approx(1.0) and shares == pytest.approx(same)
    assert taught.at(where)[:, 0].long().tolist() == taught.labels[where].tolist()


class Student:
    def __init__(self, logits):
        self.logits = logits

    def __call__(self, **_):
        return self


def test_the_loss_by_hand(make_batch):
    """The label's cross-entropy at both positions; the divergence at the first alone, half of it in the mean."""
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
    diverse = torch.tensor([[0.2, 0.3, 0.5], [1.0, 1.0, 1.0]]).log()
    teacher = torch.cat([torch.tensor([[0.0, 1.0], [2.0, 0.0]]), diverse], 1)
    loss, metrics = EnsembleDistillation("classification", 0.5).loss(
        Student(logits), make_batch(teacher), None
    )
    entropy = F.cross_entropy(logits, torch.tensor([0, 2]))
    apart = (diverse[0].exp() * (diverse[0] - logits[0].log_softmax(-1))).sum() / 2
    assert float(loss) == pytest.approx(float(entropy + 0.5 * apart), rel=1e-5)
    assert float(metrics["divergence"]) == pytest.approx(float(apart), rel=1e-5)
    assert float(metrics["agreement"]) == 0.5
    alone, _ = EnsembleDistillation("classification", 0.0).loss(
        Student(logits), make_batch(teacher), None
    )
    assert float(alone) == pytest.approx(float(entropy), rel=1e-6)


@pytest.fixture
def make_batch():
    from fedloom.data.batch import Batch, Sequences

    def make(teacher):
        rows, ones = len(teacher), torch.ones(len(teacher), 2, dtype=torch.int64)
        sequences = Sequences(ones, ones, ones.bool(), 1)
        return Batch(tuple(range(rows)), sequences, 0, 2 * rows, teacher=teacher)

    return make
