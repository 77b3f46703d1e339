"""Ditto, pFedMe, fine-tuning and FedDPA by hand on two quadratics; what travels in the others.

Client k minimises ||w - t_k||^2 / 2, so a step of plain SGD at rate 0.1 takes w to w - 0.1 (w - t_k). The
numbers are worked out here with that rule alone, one coordinate at a time.
"""

from types import SimpleNamespace

import pytest
import torch

from fedloom.aggregation.lora import stacked
from fedloom.errors import SettingsError
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.bases.personal_parts import PERSONAL
from fedloom.methods.ditto import Ditto, DittoSettings
from fedloom.methods.fdlora import PRIVATE, FDLoRA, FDLoRASettings
from fedloom.methods.fedavg_ft import FedAvgFT, FedAvgFTSettings
from fedloom.methods.feddpa import FedDPA, FedDPASettings
from fedloom.methods.pfedme import PFedMe, PFedMeSettings, envelope_step
from fedloom.tensors import State
from fedloom.training.settings import Part
from fedloom.wire.messages import Payload, Reply

TARGETS = {0: (1.0, -1.0), 1: (3.0, 2.0)}
FEDAVG = [[0.475, 1.0475], [0.85975, 1.085975], [1.1713975, 1.11713975]]


def descend(w, target, steps=2, strength=0.0, towards=0.0):
    for _ in range(steps):
        w = w - 0.1 * (w - target + strength * (w - towards))
    return w


def own(found, client):
    return found.kept[client][ADAPTER]["lora_w"].tolist()


def test_ditto_trains_fedavg_and_a_personal_adapter_near_what_it_received(play):
    found = play(Ditto(DittoSettings(strength=0.5)))
    for one, expected in zip(found.adapters, FEDAVG, strict=True):
        assert one == pytest.approx(expected, abs=1e-12)
    received = [[0.0, 1.0], *FEDAVG[:2]]
    for client, targets in TARGETS.items():
        for axis, target in enumerate(targets):
            v = received[0][axis]
            for start in received:
                v = descend(v, target, strength=0.5, towards=start[axis])
            assert own(found, client)[axis] == pytest.approx(v, abs=1e-7)


COUNTS = pytest.mark.parametrize(
    ("counted", "rows"), [({}, 1), ({"weights": "equal"}, 1), ({"weights": "rows"}, 3)]
)
"""What clients count: alike by default, as in the papers; the second has three times the first's rows."""


@COUNTS
def test_pfedme_moves_w_by_the_envelopes_gradient_after_every_k_steps(play, counted, rows):
    settings = PFedMeSettings(strength=2.0, steps=3, local_rate=0.1, server_rate=0.5, **counted)
    found = play(PFedMe(settings), rounds=1)
    for axis, start in enumerate((0.0, 1.0)):
        local = {}
        for client, targets in TARGETS.items():
            w = theta = start
            for _ in range(2):  # two batches, three steps each
                theta = descend(theta, targets[axis], steps=3, strength=2.0, towards=w)
                w = w - 0.1 * 2.0 * (w - theta)
            local[client] = w
            assert own(found, client)[axis] == pytest.approx(theta, abs=1e-7)
        mean = (local[0] + rows * local[1]) / (1 + rows)
        assert found.adapters[0][axis] == pytest.approx(start + 0.5 * (mean - start), abs=1e-7)


def test_with_a_rate_of_1_the_server_goes_to_the_mean_itself():
    """1e8 + (0.1 - 1e8) is 0 in float32."""
    method = PFedMe(PFedMeSettings())
    cohort = Cohort(1, (0,), Presence.of({0: 1}), 0.1)
    playing = method.round(State({"w": torch.tensor([1e8])}), cohort)
    next(playing)
    answer = Reply(0, Payload({"w": torch.tensor([0.1])}, {"examples": 1}))
    with pytest.raises(StopIteration) as stop:
        playing.send(Replies([answer]))
    assert torch.equal(stop.value.value.tensors["w"], torch.tensor([0.1]))


def test_the_envelope_step_waits_for_its_turn():
    w, theta = {"a": torch.zeros(1)}, {"a": torch.nn.Parameter(torch.ones(1))}
    move = envelope_step(w, 0.25, every=2)
    seen = []
    for _ in range(4):
        move(theta)
        seen.append(w["a"].item())
    assert seen == [0.0, 0.25, 0.25, 0.4375]


def test_after_the_last_round_every_client_fine_tunes_the_shared_adapter(play):
    found = play(FedAvgFT(FedAvgFTSettings(passes=2)), rounds=2)
    assert found.adapters[-1] == pytest.approx(FEDAVG[1], abs=1e-12)
    for client, targets in TARGETS.items():
        expected = [descend(FEDAVG[1][axis], targets[axis], steps=4) for axis in (0, 1)]
        assert own(found, client) == pytest.approx(expected, abs=1e-12)


def test_those_who_did_not_take_part_fine_tune_too(play):
    found = play(FedAvgFT(FedAvgFTSettings()), rounds=1, cohort=(1,))
    assert ADAPTER in found.kept[0] and ADAPTER in found.kept[1]


def test_feddpa_trains_its_adapters_apart(play):
    each = play(FedDPA(FedDPASettings()))
    assert each.adapters[-1] == pytest.approx(FEDAVG[-1], abs=1e-12)
    alone = [descend(start, TARGETS[0][axis], steps=6) for axis, start in enumerate((0.0, 1.0))]
    assert own(each, 0) == pytest.approx(alone, abs=1e-7)
    after = play(FedDPA(FedDPASettings(variant="F")))
    fitted = [descend(FEDAVG[-1][axis], TARGETS[0][axis]) for axis in (0, 1)]
    assert own(after, 0) == pytest.approx(fitted, abs=1e-12)
    of = {v: FedDPA(FedDPASettings(variant=v)).trainings_of for v in ("T", "F")}
    assert [of["T"](round, 3) for round in (1, 2, 3)] == [2, 2, 2]
    assert [of["F"](round, 3) for round in (1, 2, 3)] == [1, 1, 2]


@COUNTS
def test_fdlora_starts_from_local_training_and_moves_by_nesterov(play, counted, rows):
    """The first change is counted one and a half times, the second with three quarters of it beside."""
    found = play(FDLoRA(FDLoRASettings(private_every=2, **counted)), rounds=2)
    for axis in (0, 1):

        def mean(w, axis=axis):
            ends = [descend(w, TARGETS[client][axis]) for client in (0, 1)]
            return (ends[0] + rows * ends[1]) / (1 + rows)

        start = mean((0.0, 1.0)[axis])  # of what clients made of the start by themselves
        first = mean(start) - start
        one = start + 1.5 * first
        second = mean(one) - one
        two = one + second + 0.5 * (0.5 * first + second)
        assert found.adapters[0][axis] == pytest.approx(one, abs=1e-7)
        assert found.adapters[1][axis] == pytest.approx(two, abs=1e-7)
        for client in (0, 1):  # of round 2, as trained from what was received
            private = found.kept[client][PRIVATE]["lora_w"][axis].item()
            assert private == pytest.approx(descend(one, TARGETS[client][axis]), abs=1e-7)


def test_fdlora_uses_the_best_mixture_that_it_tried(play):
    found = play(FDLoRA(FDLoRASettings(budget=100, penalty=0.0)), rounds=1)
    shared = torch.tensor(found.adapters[-1], dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(-1.5, 1.5, 121, dtype=torch.float64)] * 2)
    for client, target in TARGETS.items():
        private = found.kept[client][PRIVATE]["lora_w"]
        aim = torch.tensor(target, dtype=torch.float64)
        costs = (grid @ torch.stack([shared, private]) - aim).square().sum(1)
        cost = float((torch.tensor(own(found, client)) - aim).square().sum())
        assert cost == pytest.approx(float(costs.min()), rel=0.02)
        assert cost < min(float((w - aim).square().sum()) for w in (shared, private))


@pytest.mark.parametrize(
    ("make", "rounds", "last"),
    [
        (Ditto(DittoSettings()), [Part(0, 2), Part(1, 2)], []),
        (FedDPA(FedDPASettings()), [Part(0, 2), Part(1, 2)], []),
        (FedDPA(FedDPASettings(variant="F")), [Part(0, 1)], [Part(1, 2)]),
        (FedAvgFT(FedAvgFTSettings(passes=2)), [Part(0, 1)], [Part(1, 3), Part(2, 3)]),
    ],
)
def test_trainings_of_a_round_divide_its_work(play, make, rounds, last):
    """After the last one there are those of its own request; the shared adapter's has been the first part."""
    found = play(make, rounds=3)
    for number in (1, 2, 3):
        parts = [
            part for round, client, _, part, _ in found.trainings if (round, client) == (number, 0)
        ]
        of = len(rounds) + len(last)
        assert parts == (rounds if number < 3 or not last else [Part(0, of), *last])


def test_fine_tuning_may_have_a_rate_of_its_own(play):
    for settings, rate in (({}, 0.1), ({"learning_rate": 0.5}, 0.5)):
        found = play(FedAvgFT(FedAvgFTSettings(**settings)), rounds=1)
        assert [own[-1] for own in found.trainings] == [0.1, 0.1, rate, rate]
    purposes = [own[2] for own in play(FedAvgFT(FedAvgFTSettings(passes=2)), rounds=1).trainings]
    assert purposes == ["", "", "tuning 0 ", "tuning 1 ", "tuning 0 ", "tuning 1 "]


def test_fdlora_trains_alone_before_it_trains_the_shared_adapter(play):
    """Half of the first round's work each; later the shared adapter's training has all of it."""
    found = play(FDLoRA(FDLoRASettings()), rounds=2).trainings
    assert {own[3] for own in found if own[2]} == {Part(0, 2)}
    assert [own[3] for own in found if not own[2]] == [Part(1, 2)] * 2 + [Part(0, 1)] * 2


@pytest.mark.parametrize(("penalty", "weights"), [(1.9, (1.0, 1.0)), (2.1, (0.0, 1.0))])
def test_fdlora_s_penalty_is_of_the_mean_size_of_both_weights(penalty, weights):
    """Shared 1, private 2, loss (x - 3)^2: shared alone 4 + p / 2, private 1 + p / 2, both 0 + p."""
    held, asked = {}, []

    def loss(batches):
        asked.append(batches)
        return (held["w"].item() - 3) ** 2

    model = SimpleNamespace(write=held.update, read=lambda: dict(held))
    private = {"w": torch.tensor([2.0])}
    client = SimpleNamespace(store={PRIVATE: private}, model=model, loss=loss, share=[0] * 7)
    method = FDLoRA(FDLoRASettings(budget=3, batches=2, penalty=penalty))
    reply = method._mix(client, Payload({"w": torch.tensor([1.0])}))
    assert tuple(reply.metrics.values()) == weights and asked == [2, 2, 2]
    assert reply.numbers == {"examples": 7}
    assert client.store[ADAPTER]["w"].item() == weights[0] + 2 * weights[1]
    assert all(spec.holds(1.5) and not spec.holds(1.51) for spec in method.mixed)
    assert all(spec.holds(-1.5) and not spec.holds(-1.51) for spec in method.mixed)


def test_fdlora_begins_with_each_adapter_and_their_sum():
    """Shared 1, private 2: whatever the bound."""
    held, tried = {}, []
    model = SimpleNamespace(write=held.update, read=lambda: dict(held))
    store = {PRIVATE: {"w": torch.tensor([2.0])}}

    def loss(batches):
        tried.append(held["w"].item())
        return 0.0

    client = SimpleNamespace(store=store, model=model, loss=loss, share=[0])
    FDLoRA(FDLoRASettings(budget=3, bound=3))._mix(client, Payload({"w": torch.tensor([1.0])}))
    assert tried == [1.0, 2.0, 3.0]


def test_stacked_adapters_have_the_weighted_sum_of_products():
    torch.manual_seed(0)
    adapters = [
        {"l.lora_A.weight": torch.randn(r, 5), "l.lora_B.weight": torch.randn(4, r), "h": torch.ones(2)}
        for r in (2, 3)
    ]  # fmt: skip
    both = stacked(adapters, [0.25, 0.75])
    product = both["l.lora_B.weight"] @ both["l.lora_A.weight"]
    expected = sum(
        p * a["l.lora_B.weight"] @ a["l.lora_A.weight"]
        for p, a in zip((0.25, 0.75), adapters, strict=True)
    )
    assert both["l.lora_A.weight"].shape == (5, 5)
    assert torch.allclose(product, expected, atol=1e-6)
    assert both["h"].tolist() == [1.0, 1.0]


OPPOSED = {
    "data": {"source": "builtin:opposed", "builtin_rows": 80},
    "partition": {"kind": "column", "column": "side", "client_test_fraction": 0.2},
    "federation": {"clients": 4, "rounds": 2},
}
CLASSES = {
    "data": {"source": "builtin:labelled", "builtin_rows": 120},
    "objective": {"name": "classification"},
    "federation": {"clients": 2, "rounds": 1},
    "partition": {"client_test_fraction": 0.2},
}


def names(tensors):
    return {
        part
        for name in tensors
        for part in ("lora_A", "lora_B", "own.head", "score")
        if part in name
    }


@pytest.mark.parametrize(
    ("method", "task", "shared", "kept"),
    [
        ("fedper", OPPOSED, {"lora_A", "lora_B"}, {"own.head"}),
        ("fedrep", OPPOSED, {"lora_A", "lora_B"}, {"own.head"}),
        ("fedper", CLASSES, {"lora_A", "lora_B"}, {"score"}),
        ("fedsa_lora", OPPOSED, {"lora_A"}, {"lora_B"}),
        ("fedsa_lora", CLASSES, {"lora_A"}, {"lora_B", "score"}),
    ],
)
def test_what_travels_and_what_stays(experiment, federate, method, task, shared, kept):
    found = federate(experiment(method={"name": method}, **task))
    assert names(found.state.tensors) == shared
    own = [found.parts.engine.store.slots(c)[PERSONAL] for c in found.parts.engine.sizes()]
    assert all(names(tensors) == kept for tensors in own)
    (name,) = [n for n in own[0] if "B.weight" in n or "head.weight" in n or "score" in n][:1]
    assert not torch.equal(own[0][name], own[1][name])
    size = sum(t.numel() * 4 for t in found.state.tensors.values())
    (cost, *_) = found.costs(client=0)
    assert 0 <= cost.bytes_down - size < 1024 and 0 <= cost.bytes_up - size < 1024


def test_ffa_lora_never_trains_a_and_halves_the_bytes(experiment, federate):
    found = federate(experiment(method={"name": "ffa_lora"}, **OPPOSED))
    assert names(found.state.tensors) == {"lora_B"}
    assert not any(found.parts.engine.store.slots(c) for c in range(4))
    for name, tensor in found.adapter.items():
        assert torch.equal(tensor, found.parts.initial[name]) == (".lora_A." in name)
    plain = federate(experiment(method={"name": "fedavg"}, **OPPOSED))
    assert found.costs(0)[0].flops < plain.costs(0)[0].flops


@pytest.mark.parametrize("method", ["fedsa_lora", "ffa_lora", "feddpa"])
def test_factors_are_of_lora(experiment, method):
    with pytest.raises(SettingsError, match=r'use adapter\.kind = "lora"'):
        experiment(method={"name": method}, adapter={"kind": "ia3", "rank": 8}, **OPPOSED)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "ditto"},
        {"name": "pfedme", "steps": 2},
        {"name": "fedavg_ft"},
        {"name": "feddpa"},
        {"name": "fdlora", "penalty": 0},
    ],
    ids=lambda method: method["name"],
)
@pytest.mark.parametrize("task", [OPPOSED, CLASSES], ids=["pairs", "classes"])
def test_clients_are_judged_by_what_they_would_use(experiment, federate, method, task):
    rows = task["data"]["builtin_rows"] // 2
    own = experiment(method=method, **{**task, "data": {**task["data"], "builtin_rows": rows}})
    found = federate(own, evaluate=True)
    losses = [m["loss"] for m in found.records[-1].evaluation.clients.values()]
    assert len(set(losses)) == len(losses)
    assert not found.records[-1].rejected


def test_a_setting_of_another_method_is_refused(experiment):
    with pytest.raises(SettingsError, match=r"method\.mix is a setting of feddpa"):
        experiment(method={"name": "ditto", "mix": 0.2})
