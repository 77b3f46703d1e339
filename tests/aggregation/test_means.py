"""Two clients with weights 1 and 3: 0.25 a + 0.75 b."""

import pytest
import torch

from fedloom.aggregation.means import weighted_mean

A = {"x": torch.tensor([4.0, 8.0]), "y": torch.tensor([1.0])}
B = {"x": torch.tensor([0.0, 4.0]), "y": torch.tensor([5.0])}


def test_hand_numbers():
    mean = weighted_mean([A, B], [1, 3])
    assert mean["x"].tolist() == [1.0, 5.0] and mean["y"].tolist() == [4.0]


def test_one_update_comes_back_bit_for_bit_whatever_its_weight():
    update = {"x": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(weighted_mean([update], [7])["x"], update["x"])


def test_equal_updates_stay_what_they_are():
    update = {"x": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(weighted_mean([update] * 3, [1, 5, 11])["x"], update["x"])


def test_inputs_are_left_alone_and_dtype_is_kept():
    low = {"x": torch.tensor([1.0], dtype=torch.bfloat16)}
    mean = weighted_mean([low, low], [1, 1])
    assert mean["x"].dtype == torch.bfloat16 and low["x"].item() == 1.0


@pytest.mark.parametrize(
    ("updates", "weights"), [([], []), ([A], [1, 2]), ([A, B], [0, 0]), ([A, B], [-1, 2])]
)
def test_what_has_no_mean_is_refused(updates, weights):
    with pytest.raises(ValueError, match="weights"):
        weighted_mean(updates, weights)
