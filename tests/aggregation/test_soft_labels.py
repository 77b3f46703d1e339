"""What models say about shared positions, put together: by hand numbers, and what must not happen."""

import pytest
import torch

from fedloom.aggregation.soft_labels import SoftLabels, combine, joined, likeliest, shortened


def table(*rows):
    return torch.tensor(rows).log()


A = table([0.7, 0.2, 0.05, 0.05], [0.1, 0.1, 0.4, 0.4])
B = table([0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25])


def test_all_entries_are_the_dense_table():
    for k in (None, 4, 9):
        known = likeliest(A, k)
        assert known.indices is None and torch.equal(known.dense(), A)


def test_missing_entries_share_the_rest_evenly_and_are_never_zero():
    known = likeliest(A, 2)
    assert known.indices.tolist() == [[0, 1], [2, 3]]
    dense = known.dense().exp()
    assert torch.allclose(dense[0], torch.tensor([0.7, 0.2, 0.05, 0.05]))
    assert torch.allclose(dense[1], torch.tensor([0.1, 0.1, 0.4, 0.4]))
    assert torch.allclose(dense.sum(-1), torch.ones(2))
    # A zero-filled logit would claim exp(0) = 1 before normalising: more than any entry that was sent.
    assert (known.dense() < 0).all()


def test_as_many_entries_as_reach_the_mass():
    known = likeliest(A, None, 0.75)
    assert known.present.sum(-1).tolist() == [2, 2]
    assert likeliest(A, None, 0.5).present.sum(-1).tolist() == [1, 2]
    assert likeliest(A, 1, 0.99).present.sum(-1).tolist() == [1, 1]
    kept = [row[mask].tolist() for row, mask in zip(known.indices, known.present, strict=True)]
    assert kept == [[0, 1], [2, 3]]
    assert torch.allclose(known.dense().exp().sum(-1), torch.ones(2))


def test_mean_of_logits_by_hand():
    found = combine([likeliest(A), likeliest(B)], [1.0, 3.0], "mean").dense()
    by_hand = (0.25 * A + 0.75 * B).log_softmax(-1)
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_mean_of_probabilities_by_hand():
    found = combine([likeliest(A), likeliest(B)], [1.0, 3.0], "mean_prob").dense().exp()
    assert torch.allclose(found[0], torch.tensor([0.25, 0.5, 0.1625, 0.0875]), atol=1e-6)


def test_entropy_and_confidence_listen_to_the_surer_model():
    for rule, weights in (
        ("entropy", [(-(p.exp() * p).sum(-1)).neg().exp() for p in (A, B)]),
        ("confidence", [p.exp().amax(-1) for p in (A, B)]),
    ):
        share = weights[0] / (weights[0] + weights[1])
        by_hand = share[:, None] * A.exp() + (1 - share[:, None]) * B.exp()
        found = combine([likeliest(A), likeliest(B)], [1.0, 9.0], rule).dense().exp()
        assert torch.allclose(found, by_hand, atol=1e-6)
        assert (share > 0.5).all()  # the model that is surer counts more, whatever its rows


def test_lowest_loss_believes_one_model_for_a_whole_text():
    labels, groups = torch.tensor([0, 2]), torch.tensor([0, 1])
    found = combine(
        [likeliest(A), likeliest(B)], [1, 1], "lowest_loss", labels=labels, groups=groups
    )
    assert torch.allclose(found.dense(), A, atol=1e-6)
    one_text = torch.tensor([0, 0])
    labels = torch.tensor([1, 0])
    found = combine(
        [likeliest(A), likeliest(B)], [1, 1], "lowest_loss", labels=labels, groups=one_text
    )
    assert torch.allclose(found.dense(), B, atol=1e-6)


def test_an_entry_is_averaged_over_those_who_sent_it():
    """The failure of zero padding: an entry that one model sent alone must not be pulled to zero."""
    left = SoftLabels(4, torch.tensor([[0.9]]).log(), torch.tensor([[0]]))
    right = SoftLabels(4, torch.tensor([[0.8]]).log(), torch.tensor([[2]]))
    found = combine([left, right], [1.0, 1.0], "mean").dense().exp()[0]
    # Entries 0 and 2 stand as they were sent, 1 and 3 share the mean rest of 0.15; then all is normalised.
    by_hand = torch.tensor([0.9, 0.075, 0.8, 0.075])
    assert torch.allclose(found, by_hand / by_hand.sum(), atol=1e-6)


def test_several_sparse_answers_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(50, 300, generator=generator).log_softmax(-1) for _ in range(3)]
    known = [likeliest(t, 5) for t in tables]
    found = combine(known, [1.0, 2.0, 3.0], "mean_prob")
    by_hand = sum(w / 6 * k.dense().exp() for w, k in zip((1, 2, 3), known, strict=True))
    assert torch.allclose(found.dense().exp(), by_hand, atol=1e-6)
    assert found.values.shape[1] == 15  # and is kept as small as what was sent


def test_the_order_of_positions_and_chunks_does_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(40, 30, generator=generator).log_softmax(-1) for _ in range(2)]
    whole = combine([likeliest(t, 4) for t in tables], [1.0, 1.0], "mean")
    monkeypatch.setattr("fedloom.aggregation.soft_labels.CHUNK", 200)
    parts = combine([likeliest(t, 4) for t in tables], [1.0, 1.0], "mean")
    assert torch.equal(whole.dense(), parts.dense())
    some = torch.tensor([7, 3, 3])
    assert torch.equal(whole.at(some), whole.dense()[some])


def test_shortened_is_likeliest_of_what_is_known():
    assert torch.equal(shortened(likeliest(A), 2, None).values, likeliest(A, 2).values)
    whole = joined([likeliest(A[:1], 2), likeliest(A[1:], 2)])
    assert torch.equal(whole.dense(), likeliest(A, 2).dense())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_entry_is_impossible_even_where_all_mass_was_sent(k):
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).clamp(min=1e-12).log()
    assert torch.isfinite(likeliest(certain, k).dense()).all()


def test_a_mass_that_is_just_reached_is_enough():
    assert likeliest(table([0.5, 0.25, 0.25]), None, 0.5).present.sum(-1).tolist() == [1]
    assert likeliest(table([0.5, 0.25, 0.25]), None, 0.51).present.sum(-1).tolist() == [2]


@pytest.mark.parametrize("rule", ["mean", "mean_prob", "entropy", "confidence"])
def test_one_answer_alone_comes_back(rule):
    found = combine([likeliest(A, 2)], [3.0], rule)
    assert torch.allclose(found.dense(), likeliest(A, 2).dense(), atol=1e-6)
    assert found.values.shape == (2, 2)


def test_certain_answers_leave_a_billionth_for_what_is_missing():
    """Each of three missing entries has a third of 1e-9, where one entry has all the probability."""
    certain = SoftLabels(4, torch.tensor([[0.0]]), torch.tensor([[2]]))
    assert certain.rest().tolist() == pytest.approx([1e-9])
    expected = [1e-9 / 3, 1e-9 / 3, 1.0, 1e-9 / 3]
    assert certain.dense().exp()[0].tolist() == pytest.approx(expected, rel=1e-5)
    found = combine([certain, certain], [1.0, 3.0], "mean")
    assert found.indices is not None and found.values.shape == (1, 2)


def test_the_first_position_of_a_text_counts_as_the_others():
    """A says 0.7 and 0.1 of what is right, B 0.1 and 0.25."""
    labels, groups = torch.tensor([0, 1]), torch.tensor([0, 0])
    given = {"labels": labels, "groups": groups}
    found = combine([likeliest(B), likeliest(A)], [1.0, 1.0], "lowest_loss", **given)
    assert torch.allclose(found.dense(), A, atol=1e-6)
    alone = combine([likeliest(B)], [1.0], "lowest_loss", **given)
    assert torch.allclose(alone.dense(), B, atol=1e-6)


def test_one_entry_that_nobody_sent_has_all_of_the_rest():
    found = combine([likeliest(A, 3)] * 2, [1.0, 3.0], "mean")
    assert torch.allclose(found.dense(), likeliest(A, 3).dense(), atol=1e-6)
