"""Two clients with weights 1 and 3: 0.25 a + 0.75 b."""

import pytest
import torch

from fedloom.aggregation.means import BLOCK, LARGE, weighted_mean

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


def normal(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(shape, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize(("count", "bound"), [(4, 6e-8), (256, 3.5e-7)])
def test_it_errs_no_more_than_a_sum_in_float32(count, bound):
    updates, weights = normal(count, 20_000), [1.0 + k % 7 for k in range(count)]
    shares = [weight / sum(weights) for weight in weights]
    right = sum(s * u["x"].double() for s, u in zip(shares, updates, strict=True))
    plain = sum(s * u["x"] for s, u in zip(shares, updates, strict=True))
    found = weighted_mean(updates, weights)["x"]
    errors = [float((mean.double() - right).norm() / right.norm()) for mean in (found, plain)]
    assert errors[0] < bound and errors[0] < 1.02 * errors[1]


def test_threads_and_blocks_do_not_move_a_bit(monkeypatch):
    updates, found, before = normal(3, LARGE + 4321), [], torch.get_num_threads()
    for threads, block in ((1, BLOCK), (2, BLOCK), (3, BLOCK // 3), (2, 2 * LARGE)):
        monkeypatch.setattr(
            "fedloom.aggregation.means.available_cores", lambda threads=threads: threads
        )
        monkeypatch.setattr("fedloom.aggregation.means.BLOCK", block)
        torch.set_num_threads(threads)
        found.append(weighted_mean(updates, [1, 2, 4])["x"])
    torch.set_num_threads(before)
    assert all(torch.equal(mean, found[0]) for mean in found)


def test_a_client_that_weighs_nothing_adds_nothing():
    first, second, third = normal(3, 100)
    right = weighted_mean([second, third], [2, 6])["x"]
    assert torch.equal(weighted_mean([first, second, third], [0, 2, 6])["x"], right)
    assert torch.equal(weighted_mean([second, third, first], [2, 6, 0])["x"], right)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_odd_shapes_stay_what_they_are(shape):
    updates = normal(2, *shape)
    mean = weighted_mean(updates, [1, 1])["x"]
    assert mean.shape == shape and torch.allclose(mean, (updates[0]["x"] + updates[1]["x"]) / 2)


@pytest.mark.parametrize("rows", [3, BLOCK])
def test_turned_tensors_are_read_as_they_stand(rows):
    updates = normal(2, 2, rows)
    mean = weighted_mean([{"x": u["x"].T} for u in updates], [1, 3])["x"]
    assert torch.equal(mean, weighted_mean(updates, [1, 3])["x"].T)


def test_half_precision_is_rounded_once():
    updates = [{"x": u["x"].bfloat16()} for u in normal(50, 1000)]
    wide = weighted_mean([{"x": u["x"].float()} for u in updates], [1.0] * 50)["x"]
    assert torch.equal(weighted_mean(updates, [1.0] * 50)["x"], wide.bfloat16())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [5, BLOCK + 3])
def test_the_mean_may_take_the_place_of_the_first_update(dtype, size):
    updates = [{"x": u["x"].to(dtype)} for u in normal(3, size)]
    right, others = weighted_mean(updates, [1, 2, 4])["x"], [u["x"].clone() for u in updates[1:]]
    found = weighted_mean(updates, [1, 2, 4], out=updates[0])["x"]
    assert found.data_ptr() == updates[0]["x"].data_ptr() and torch.equal(found, right)
    assert all(torch.equal(u["x"], other) for u, other in zip(updates[1:], others, strict=True))


def test_room_that_is_not_contiguous_is_refused():
    updates = normal(2, BLOCK, 2)
    with pytest.raises(RuntimeError, match="view"):
        weighted_mean(updates, [1, 1], out={"x": torch.empty(2, BLOCK).T})
