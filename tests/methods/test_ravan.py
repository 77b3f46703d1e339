"""RAVAN: several heads by hand, Fed-SB as one head, and what it reaches that few ranks do not."""

import pytest
import torch

from fedloom.aggregation.lora import A, B
from fedloom.errors import SettingsError
from fedloom.methods.bases.fixed_factors import R, random_factors
from fedloom.methods.bases.trained_coordinates import signed_partition
from fedloom.methods.ravan import SCALE, Ravan, RavanSettings, _scaled
from linear_bench import CLIENTS, SIZE, error, play, start

NAME = "x.lora_R.weight"


def test_clients_send_products_of_scales_and_heads():
    """Heads of rank 1: t = (2, 1), H = (0.5, 3) and t = (0.5, 4), H = (2, 1) are (1, 3) and (1, 4), of which
    the mean is (1, 3.5); the product of the means would be (1.5625, 5)."""
    clients = [((2.0, 1.0), (0.5, 3.0)), ((0.5, 4.0), (2.0, 1.0))]
    sent = [
        _scaled({NAME: torch.tensor(h).view(2, 1, 1), NAME.replace(R, SCALE): torch.tensor(t)})
        for t, h in clients
    ]
    assert all(list(own) == [NAME] for own in sent)
    mean = sum(own[NAME] for own in sent) / 2
    assert mean.flatten().tolist() == [1.0, 3.5]
    product = torch.eye(2) @ (mean.view(2, 1) * torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert product.tolist() == [[1.0, 1.0], [3.5, -3.5]]


def test_one_head_without_scales_is_fed_sb():
    plain = play("fed_sb", rounds=3, rank=4, alpha=4.0)
    one = play("ravan", rounds=3, rank=4, alpha=4.0, settings={"heads": 1, "scales": False})
    assert torch.allclose(one.state.tensors[NAME][0], plain.state.tensors[NAME], atol=1e-6)
    assert torch.allclose(one.weight(1.0), plain.weight(1.0), atol=1e-6)


def test_the_mean_of_heads_has_the_mean_of_products_and_bases_are_orthonormal():
    found = play(
        "ravan", rounds=2, rank=4, alpha=8.0, settings={"heads": 2}, rows={0: 1, 1: 3, 2: 1, 3: 1}
    )
    fixed = random_factors(start(4), 0)
    down, up = (next(t for n, t in fixed.items() if own in n) for own in (A, B))
    assert torch.allclose(down @ down.T, torch.eye(4), atol=1e-6)
    whole = torch.zeros(SIZE, SIZE)
    for client, rows in enumerate((1, 3, 1, 1)):
        heads = found.sent[2, "train", client][1].tensors[NAME]
        whole += rows / 6 * 2.0 * up @ torch.block_diag(*heads) @ down
    assert torch.allclose(found.weight(2.0), whole, atol=1e-6) and whole.norm() > 0.1
    norm = 4.0 * found.state.tensors[NAME].square().sum()
    assert float(found.weight(2.0).square().sum()) == pytest.approx(float(norm), rel=1e-5)


def test_scales_move_from_the_second_step_on_and_begin_anew():
    sent = {}
    for steps in (1, 2):
        for scales in (True, False):
            own = play(
                "ravan", steps=steps, rank=4, alpha=4.0, settings={"heads": 2, "scales": scales}
            )
            sent[steps, scales] = own.sent[1, "train", 0][1].tensors[NAME]
    assert torch.equal(sent[1, True], sent[1, False]) and not torch.equal(
        sent[2, True], sent[2, False]
    )


def test_at_equal_numbers_it_reaches_more_of_a_flat_target_than_two_ranks():
    """32 numbers: two heads of 4 x 4 between random bases, or factors of rank 2; the target is orthogonal."""
    places, signs = signed_partition(torch_rng(), SIZE, SIZE)
    target = torch.zeros(SIZE, SIZE)
    target[torch.arange(SIZE), places[:, 0]] = signs[:, 0]
    heads = play(
        "ravan", rounds=12, rank=8, alpha=8.0, settings={"heads": 2}, target=target, rate=0.4
    )
    assert heads.state.tensors[NAME].numel() == 32
    plain = play("fedavg", rounds=12, target=target, rate=0.4)
    assert error(heads, target) < 0.6 < 0.7 < error(plain, target)


def torch_rng():
    from fedloom.randomness import generator

    return generator(0, "a flat target")


def test_a_rank_that_cannot_be_divided_is_told(experiment):
    with pytest.raises(
        SettingsError, match=r"adapter.rank = 2 is that of all heads together, .*set it to 4"
    ):
        experiment(method={"name": "ravan"}, adapter={"rank": 2})
    with pytest.raises(SettingsError, match=r"adapter.rank = 10 .*set it to 8$"):
        experiment(method={"name": "ravan"}, adapter={"rank": 10})
    with pytest.raises(SettingsError, match="it has fixed factors of its own"):
        experiment(method={"name": "ravan", "heads": 2}, adapter={"start": "somewhere"})
    assert Ravan(RavanSettings()).heads == CLIENTS == 4


def test_rounds_of_a_model_send_h_times_r_over_h_squared(experiment, federate):
    found = federate(
        experiment(
            method={"name": "ravan"},
            adapter={"rank": 8},
            training={"learning_rate": 1e-2, "local_steps": 2},
        )
    )
    assert {tuple(t.shape) for t in found.state.tensors.values()} == {(4, 2, 2)}
    assert found.parts.method.traffic(found.parts.initial).up == 4 * 16 * len(found.state.tensors)
    downs = {n: t for n, t in found.adapter.items() if A in n}
    assert any(bool(t.any()) for t in downs.values())
    assert found.records[-1].train["loss"] > 0
