"""Clients of different ranks: what becomes of the ranks that only some hold, by hand and over rounds."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import fedloom
import linear_bench as bench
from fedloom.aggregation.lora import rank_in_use, resized, slices
from fedloom.errors import MessageError, SettingsError
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.packed_factors import pack, unpack
from fedloom.methods.flexlora import FlexLoRA, FlexLoRASettings
from fedloom.methods.hetlora import HetLoRA, HetLoRASettings, tail_gradient
from fedloom.runs.observers import Silent
from fedloom.tensors import State
from fedloom.wire.messages import Reply, decode

A, B = "x.lora_A.weight", "x.lora_B.weight"
METHODS = {"flexlora": (FlexLoRA, FlexLoRASettings), "hetlora": (HetLoRA, HetLoRASettings)}


def diagonal(*values):
    """The adapter of the product diag(values), of that rank, with the roots on either side."""
    roots = torch.diag(torch.tensor(values).sqrt())
    return {A: torch.nn.functional.pad(roots, (0, 5 - len(values))), B: roots.clone()}


def singular_values(adapter):
    return [round(float(v), 5) for v in torch.linalg.svdvals(adapter[B] @ adapter[A])]


def play(name, mode, adapter, ranks, rounds=1, rows=None, train=lambda client, own: own):
    """Play rounds in which clients do ``train``; return the adapter and the last round's cohort."""
    make, settings = METHODS[name]
    method = make(settings(slices=mode))
    method.server = SimpleNamespace(ranks=dict(enumerate(ranks)))
    rows = rows or [1.0] * len(ranks)
    state = method.initial_state(adapter)
    for number in range(1, rounds + 1):
        cohort = Cohort(number, tuple(range(len(ranks))), {}, 0.1)
        steps = method.round(state, cohort)
        exchange = next(steps)
        replies = []
        for client in cohort.clients:
            sent = decode(exchange.requests[client], exchange.request_schema).tensors
            own = train(client, unpack(sent, resized(adapter, ranks[client])))
            payload = SimpleNamespace(tensors=pack(own), numbers={"examples": rows[client]})
            replies.append(Reply(client, payload))
        with pytest.raises(StopIteration) as stop:
            steps.send(replies)
        state = stop.value.value
    return state.tensors, cohort


@pytest.mark.parametrize(
    ("name", "mode", "seconds"),
    [
        ("flexlora", "holders", [2.0, 2.0, 2.0]),
        ("hetlora", "holders", [2.0, 2.0, 2.0]),
        ("flexlora", "padded", [0.5, 0.125, 0.03125]),
        ("hetlora", "padded", [0.16362, 0.01025, 0.00064]),
    ],
)
def test_clients_that_do_not_train_leave_the_adapter_as_it_is(name, mode, seconds):
    """Ranks 1, 1, 1, 2 from (3, 2). Padded flexlora keeps a fourth of the second product in a round, and
    hetlora of either factor the weight sqrt(13) / (sqrt(13) + 9) = .2860 of whom holds it: .0818 of 2."""
    found = [
        singular_values(play(name, mode, diagonal(3.0, 2.0), [1, 1, 1, 2], rounds)[0])
        for rounds in (1, 2, 3)
    ]
    assert [first for first, _ in found] == [3.0, 3.0, 3.0]
    assert [second for _, second in found] == pytest.approx(seconds, abs=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_who_holds_a_slice_alone_decides_it(name):
    """A client of rank 1 sends diag(1), one of rank 2 diag(1, 3); rows are equal."""
    sent = {0: diagonal(1.0), 1: diagonal(1.0, 3.0)}
    sent[0] = {A: sent[0][A], B: torch.nn.functional.pad(sent[0][B], (0, 0, 0, 1))}
    found, _ = play(name, "holders", diagonal(1.0, 1.0), [1, 2], train=lambda k, own: sent[k])
    assert sorted(singular_values(found)) == [1.0, 3.0]
    padded, _ = play("flexlora", "padded", diagonal(1.0, 1.0), [1, 2], train=lambda k, own: sent[k])
    assert sorted(singular_values(padded)) == [1.0, 1.5]


@pytest.mark.parametrize("name", METHODS)
def test_what_nobody_in_a_round_holds_stays_and_can_be_trained(name):
    """The first round of a run, in which B is zero, with a client of rank 1 alone: it makes B_0 (1, 0)."""
    torch.manual_seed(0)
    fresh = {A: torch.randn(3, 5), B: torch.zeros(3, 3)}

    def train(client, own):
        return {A: own[A], B: torch.tensor([[1.0], [0.0], [0.0]])}

    kept, cohort = play(name, "holders", fresh, [1], train=train)
    assert cohort.notes["rank_in_use"] == 1.0 and not cohort.warnings
    assert torch.equal(kept[A][1:], fresh[A][1:])  # what moves B[:, 1:] as soon as somebody has it
    product = torch.zeros(3, 5)
    product[0] = fresh[A][0]
    assert torch.allclose(kept[B] @ kept[A], product, atol=1e-6)
    dead, _ = play(name, "padded", fresh, [1], train=train)
    assert float(dead[A][1:].norm()) < 1e-6 and float(dead[B][:, 1:].norm()) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_adapter_stays_fresh_where_nobody_trains(name):
    fresh = {A: torch.rand(2, 5), B: torch.zeros(2, 2)}
    kept, cohort = play(name, "holders", fresh, [2, 2])
    assert torch.equal(kept[A], fresh[A]) and cohort.notes["rank_in_use"] == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_a_rank_that_falls_is_told(name):
    whole = diagonal(3.0, 2.0, 1.0)
    kept, cohort = play(name, "holders", whole, [1, 1])
    assert cohort.notes["rank_in_use"] == rank_in_use(kept) == 3.0 and not cohort.warnings
    _, cohort = play(name, "padded", whole, [1, 1])
    assert cohort.notes["rank_in_use"] == 1.0
    assert cohort.warnings == [
        "round 1: the rank in use of the shared adapter fell from 3 to 1 of 3 (mean over the layers); "
        'method.slices = "holders" keeps what a round\'s clients do not hold'
    ]


def test_slices_by_hand():
    assert slices([1, 4, 4, 2], 8) == [(0, 1, (0, 1, 2, 3)), (1, 2, (1, 2, 3)), (2, 4, (1, 2)), (4, 8, ())]  # fmt: skip
    assert slices([3, 3], 3) == [(0, 3, (0, 1))]


PAIRS = {
    "data": {"source": "builtin:opposed", "builtin_rows": 90},
    "partition": {"kind": "size", "sizes": [1.0] * 6},
    "federation": {"clients": 6, "clients_per_round": 2},
    "adapter": {"rank": 4, "alpha": 8.0},
    "training": {"learning_rate": 1e-2, "local_steps": 2},
    "clients": {"groups": {"small": {"clients": [0, 1, 2, 3], "rank": 1}}},
}


def ranks_over_rounds(federate, experiment, name, mode, rounds, monkeypatch):
    told = []
    monkeypatch.setattr(Silent, "warning", lambda self, text: told.append(text))
    own = {**PAIRS, "federation": {**PAIRS["federation"], "rounds": rounds}}
    found = federate(experiment(method={"name": name, "slices": mode}, **own))
    large = [not {4, 5}.isdisjoint(record.clients) for record in found.records]
    return [record.train["rank_in_use"] for record in found.records], large, told


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_over_twenty_rounds_with_two_of_six_clients_no_rank_is_lost(
    name, federate, experiment, monkeypatch
):
    ranks, large, told = ranks_over_rounds(federate, experiment, name, "holders", 20, monkeypatch)
    assert 5 <= sum(large) <= 15, "some rounds have clients of rank 1 alone"
    first = large.index(True)
    assert ranks == sorted(ranks) and ranks[first:] == [4.0] * (20 - first) and not told
    ranks, _, told = ranks_over_rounds(federate, experiment, name, "padded", 20, monkeypatch)
    assert ranks[-1] < 4.0
    assert len(told) == sum(after < before for before, after in pairwise(ranks))


PRUNING = {"pruning": 0.75, "penalty": 0.05, "least_rank": 2}


def test_ranks_are_pruned_where_the_tail_lost_weight_and_never_grow():
    first = bench.start(4, seed=3)
    first[bench.B] = 0.5 * torch.ones(bench.SIZE, 4)
    plain = bench.play("hetlora", rounds=4, rank=4, adapter=first)
    found = bench.play("hetlora", rounds=4, rank=4, adapter=first, settings=PRUNING)
    assert all(cohort.details == {} for cohort in plain.cohorts) and not plain.state.numbers
    ranks = [[int(own) for own in cohort.details["ranks"].values()] for cohort in found.cohorts]
    assert ranks[-1] != [4] * 4 and min(map(min, ranks)) >= 2
    for before, after in pairwise([[4] * 4, *ranks]):
        assert all(
            new in (old, max(2, old * 3 // 4)) for old, new in zip(before, after, strict=True)
        )
    for number in range(2, 5):  # what is sent has the rank of the table
        for client in range(4):
            request, reply = found.sent[number, "train", client]
            assert len(request.tensors["factors"]) == ranks[number - 2][client]
            assert len(reply.tensors["factors"]) == ranks[number - 1][client]
    assert {c: int(own["rank"]["rank"]) for c, own in found.kept.items()} == dict(
        enumerate(ranks[-1])
    )


def test_ranks_that_nobody_holds_any_more_are_not_served():
    first = bench.start(4, seed=3)
    first[bench.B] = 0.5 * torch.ones(bench.SIZE, 4)
    settings = {**PRUNING, "penalty": 2.0}
    found = bench.play("hetlora", rounds=3, rate=0.02, adapter=first, rank=4, settings=settings)
    held = [max(cohort.details["ranks"].values()) for cohort in found.cohorts]
    assert held[-1] < 4
    for most, cohort, state in zip(held, found.cohorts, found.states, strict=True):
        down, up = state.tensors[bench.A], state.tensors[bench.B]
        assert len(down) == 4 and not down[most:].any() and not up[:, most:].any()
        assert down[:most].any(1).all() and up[:, :most].any(0).all() and not cohort.warnings
    some = HetLoRA(HetLoRASettings(**PRUNING))
    some.server = SimpleNamespace(ranks={0: 4, 1: 4, 2: 3})
    kept = some.still_held(State(first, {"rank/000000": 2.0, "rank/000002": 2.0}))
    assert all(torch.equal(kept[name], first[name]) for name in first)  # client 1, away, holds all


def test_the_penalty_is_the_gradient_of_the_norms_product():
    torch.manual_seed(1)
    own = {
        name: torch.nn.Parameter(torch.randn(shape)) for name, shape in ((A, (4, 5)), (B, (3, 4)))
    }
    (own[A][2:].norm() * own[B][:, 2:].norm()).backward()
    expected = {name: 0.5 * p.grad.clone() for name, p in own.items()}
    for parameter in own.values():
        parameter.grad = torch.zeros_like(parameter)
    tail_gradient(2, 0.5)(own)
    assert all(torch.allclose(p.grad, expected[name], atol=1e-6) for name, p in own.items())
    zero = {A: torch.nn.Parameter(torch.ones(4, 5)), B: torch.nn.Parameter(torch.zeros(3, 4))}
    for parameter in zero.values():
        parameter.grad = torch.zeros_like(parameter)
    tail_gradient(2, 0.5)(zero)
    assert all(bool(p.grad.isfinite().all()) for p in zero.values()) and not zero[A].grad.any()


def test_the_penalty_of_small_tails_and_of_none_by_hand():
    """Tails of norm 0.1 and 0.2: 0.5 x 0.2 on the one, 0.5 x 0.1 on the other."""
    own = {A: torch.tensor([[1.0], [0.1]]), B: torch.tensor([[1.0, 0.2]])}
    for first, weight, expected in (
        (1, 0.5, (0.1, 0.05)),
        (2, 0.5, (0.0, 0.0)),
        (1, 0.0, (0.0, 0.0)),
    ):
        parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in own.items()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        tail_gradient(first, weight)(parameters)
        assert parameters[A].grad[1].item() == pytest.approx(expected[0])
        assert parameters[B].grad[0, 1].item() == pytest.approx(expected[1])
        assert not parameters[A].grad[0] and not parameters[B].grad[0, 0]
    alone = {A: torch.nn.Parameter(own[A]), B: torch.nn.Parameter(own[B])}
    alone[A].grad = torch.zeros(2, 1)  # B is frozen
    tail_gradient(1, 0.5)(alone)
    assert not alone[A].grad.any() and alone[B].grad is None


def test_clients_weigh_by_the_norms_of_products_and_by_rows_where_all_are_zero():
    method = HetLoRA(HetLoRASettings())
    replies = [Reply(k, SimpleNamespace(numbers={"examples": n})) for k, n in ((0, 2.0), (1, 5.0))]
    zero = {A: torch.ones(1, 2), B: torch.zeros(2, 1)}
    some = {A: torch.tensor([[3.0, 0.0]]), B: torch.tensor([[0.0], [0.5]])}
    assert method.weights(replies, [zero, zero]) == [2.0, 5.0]
    assert method.weights(replies, [zero, some]) == pytest.approx([0.0, 1.5])


def test_a_rank_that_no_pruning_gives_is_refused_and_settings_without_pruning_are_told(experiment):
    method = HetLoRA(HetLoRASettings(**PRUNING))
    check = method.check_of({0: 4})
    for rank in (3, 4):
        check(0, SimpleNamespace(tensors={"factors": torch.zeros(rank, 2)}))
    with pytest.raises(
        MessageError, match="rank 2, and it was sent rank 4, which it may prune to 3"
    ):
        check(0, SimpleNamespace(tensors={"factors": torch.zeros(2, 2)}))
    with pytest.raises(
        SettingsError, match=r"method\.least_rank is of pruning: set method\.pruning below 1"
    ):
        experiment(method={"name": "hetlora", "least_rank": 2})
    with pytest.raises(SettingsError, match="prunes ranks between rounds"):
        experiment(
            method={"name": "hetlora", "pruning": 0.9}, training={"keep_optimizer_state": True}
        )


@pytest.mark.slow
def test_pruned_ranks_are_resumed_and_clients_are_judged_by_them(experiment, tmp_path):
    settings = experiment(
        method={"name": "hetlora", "pruning": 0.5, "penalty": 1.0},
        adapter={"rank": 4},
        federation={"rounds": 3},
        training={"learning_rate": 1e-2, "local_steps": 2},
        output={"folder": str(tmp_path / "run"), "verify": False},
    )
    whole = fedloom.run(settings)
    adapter = (whole.folder / "adapter/adapter_model.safetensors").read_bytes()
    rounds = [json.loads(line) for line in (whole.folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds[-1]["details"]["ranks"] != {"0": 4, "1": 4, "2": 4}
    fedloom.resume(whole.folder, from_round=2)
    assert (whole.folder / "adapter/adapter_model.safetensors").read_bytes() == adapter
