"""The random subspace: its estimator, its function by hand, and real rounds in it."""

from functools import partial

import numpy as np
import pytest
import torch

from fedloom.federation.compressed_traffic import compressed
from fedloom.methods.bases.trained_coordinates import signed_partition
from fedloom.methods.random_projection import SUBSPACE, RandomProjection, RandomProjectionSettings
from fedloom.randomness import generator
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data

PLAIN = {"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 2}


def matrix(size, parts, rng):
    """S, ``(size, parts)``."""
    places, signs = signed_partition(rng, size, parts)
    whole = torch.zeros(size + 1, parts)
    for part in range(parts):
        whole[places[part], part] = signs[part]
    return whole[:size]


@pytest.mark.parametrize(("size", "parts"), [(12, 4), (13, 5), (7, 7), (9, 1), (3, 2)])
def test_every_place_is_in_one_part_and_parts_are_alike(size, parts):
    found = matrix(size, parts, np.random.default_rng(0))
    assert found.abs().sum(1).tolist() == [1.0] * size
    counts = found.abs().sum(0)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(found.T @ found, torch.diag(counts))  # orthogonal


def test_the_estimator_has_no_bias_and_the_variance_that_is_said():
    """g = 1, 2, .., 12 with d' = 4: |g|^2 = 650, and the variance is (12 / 4 - 1) 650 = 1,300."""
    rng, g, draws = np.random.default_rng(1), torch.arange(1.0, 13.0), 4_000
    total, squares = torch.zeros(12), 0.0
    for _ in range(draws):
        places, signs = signed_partition(rng, 12, 4)
        found = torch.zeros(12)
        found[places.flatten()] = (signs * (signs * g[places]).sum(1, keepdim=True)).flatten()
        total += found
        squares += float((found - g).square().sum())
    # a number's variance is 2 / 11 of the squares of the others, at most 2 / 11 * 649
    five_sigma = 5 * (2 / 11 * 649 / draws) ** 0.5
    assert (total / draws - g).abs().max() < five_sigma
    assert squares / draws == pytest.approx(1300, rel=0.05)


def test_the_adapter_is_its_start_moved_by_s_u():
    start = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor([5.0, 6.0, 7.0])}
    method = RandomProjection(RandomProjectionSettings(dimension=3))
    u = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    found = method.function(start, 9, {})({SUBSPACE: u})
    s = matrix(7, 3, generator(9, SUBSPACE))
    whole = torch.tensor([5.0, 6.0, 7.0, 1.0, 2.0, 3.0, 4.0]) + s @ u  # tensors by name
    assert torch.equal(torch.cat([found["a"], found["b"].flatten()]), whole)
    g = torch.arange(1.0, 8.0)
    (torch.cat([found["a"], found["b"].flatten()]) @ g).backward()
    assert torch.allclose(u.grad, s.T @ g)


def test_rounds_stay_in_the_subspace(experiment, federate):
    found = federate(
        experiment(
            method={"name": "random_projection", "dimension": 50}, training={"local_steps": 2}
        )
    )
    assert {n: tuple(t.shape) for n, t in found.state.tensors.items()} == {SUBSPACE: (50,)}
    names = sorted(found.adapter)
    moved = torch.cat([(found.adapter[n] - found.parts.initial[n]).flatten() for n in names])
    assert moved.abs().max() > 1e-4
    places, signs = signed_partition(generator(0, SUBSPACE), len(moved), 50)
    for part, own in zip(places, signs, strict=True):
        values = (own * torch.cat([moved, torch.zeros(1)])[part])[own != 0]
        assert torch.allclose(values, values[0].expand(len(values)), atol=1e-6)


def test_with_as_many_dimensions_as_numbers_it_is_fedavg(experiment, federate):
    """S turns no step of plain SGD, but for signs: up to rounding."""
    sections = {"training": PLAIN, "partition": {"kind": "size", "sizes": [1.0, 2.0, 3.0]}}
    plain = federate(experiment(**sections))
    all_of_it = {"name": "random_projection", "dimension": 1 << 20}
    found = federate(experiment(method=all_of_it, **sections))
    moved = max(float((plain.adapter[n] - t).abs().max()) for n, t in plain.parts.initial.items())
    apart = max(float((plain.adapter[n] - t).abs().max()) for n, t in found.adapter.items())
    assert apart < 1e-4 * moved


def test_the_closed_form_with_codecs_is_of_what_travels(experiment):
    """Coordinates are a vector, which is sent as it is whatever the codec."""
    own = experiment(method={"name": "random_projection", "dimension": 64}, wire={"up": "int4"})
    parts = assemble(own, partition_data(own))
    sent = parts.method.sent_shapes(parts.initial)
    plain = parts.method.traffic(parts.initial)
    assert compressed(plain, sent, own.wire).up == plain.up == 4 * 64


def test_the_function_counts_once_before_the_first_step_and_twice_a_step(experiment, federate):
    """And once as it is loaded: two steps have six."""
    own = experiment(
        method={"name": "random_projection", "dimension": 50},
        training={"local_steps": 2},
        federation={"rounds": 1},
    )

    def counting(each, parts):
        parts.method.function_flops = lambda adapter: each

    flops = []
    for each in (0.0, 1e6):
        found = federate(own, partial(counting, each))
        flops.append([c.flops for c in found.costs(0, 0) if c.phase == "train"])
    assert [b - a for a, b in zip(*flops, strict=True)] == [6e6]
