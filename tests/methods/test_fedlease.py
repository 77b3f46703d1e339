"""FedLEASE: groups by what clients trained alone, an expert and a router of each, the others held."""

from types import SimpleNamespace

import pytest
import torch

from absent import ALL_OF_IT, CLIENTS, ROUNDS, Schedule, played
from fedloom.aggregation.rules import AggregationSettings
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods.bases.client_groups import groups_of, warm_up_rounds
from fedloom.methods.bases.expert_groups import (
    OthersHeld,
    factors_of,
    mixture,
    nearest,
    own_expert,
    single,
)
from fedloom.methods.contract.client import carried_out
from fedloom.methods.fedlease import TRIAL, FedLEASE, FedLEASESettings
from fedloom.models.experts import ExpertModel, attach_experts
from fedloom.models.load import load_backbone
from fedloom.tensors import join_parts, tensor_bytes
from fedloom.training.settings import ALONE, Part
from fedloom.wire.messages import Payload, Reply, decode

ADAPTER = {"kind": "experts", "router": "linear", "rank": 2, "experts": 3, "targets": ["q_proj"]}


def group(number):
    own = torch.full((1, 2), float(number))
    return {"x.experts.0.A": own, "x.experts.0.B": own.T, "x.router": own.expand(5, 2)}


def test_a_group_is_sent_its_own_expert_first_and_the_others_in_order():
    state = join_parts(**{f"expert/{number:03d}": group(number) for number in range(3)})
    found = mixture(state, 1)
    assert list(found) == sorted(found)
    values = {name: float(tensor[0, 0]) for name, tensor in found.items()}
    assert [values[f"x.experts.{place}.A"] for place in range(3)] == [1, 0, 2]
    assert values["x.router"] == 1 and mixture({}, 0) == {}
    assert single(found).keys() == {"x.experts.0.A", "x.experts.0.B", "x.router"}
    assert single(found)["x.router"].shape == (1, 2)
    assert own_expert(found).keys() == {"x.experts.0.A", "x.experts.0.B"}


def test_a_newcomer_joins_the_group_whose_members_are_nearest():
    vectors = {0: (1.0, 0.0), 1: (2.0, 1.0), 2: (0.0, 1.0), 3: (-1.0, 3.0), 9: (0.1, 1.0)}
    tensors = {f"alone/x.experts.0.B/{c:06d}": torch.tensor([v]) for c, v in vectors.items()}
    assert list(factors_of(tensors)) == [0, 1, 2, 3, 9]
    assert nearest(tensors, {0: 0, 1: 0, 2: 1, 3: 1}, [9]) == {9: 1}


@pytest.mark.parametrize(("trial", "part"), [(0.0, ALONE), (1.0, Part(0, 2))])
def test_a_training_on_trial_is_half_of_a_round_and_begins_where_the_last_one_ended(trial, part):
    held, parts = {}, []

    def training_steps(rate, *, purpose, part):
        yield from ()
        parts.append((rate, purpose, part))
        held["x.experts.0.A"] = held["x.experts.0.A"] + 1
        return SimpleNamespace(metrics={"loss": 1.0})

    model = SimpleNamespace(write=held.update, read=lambda: dict(held))
    client = SimpleNamespace(
        store={}, session={}, initial=group(5), share=[0] * 7, model=model, training_steps=training_steps
    )  # fmt: skip
    method = FedLEASE(FedLEASESettings())
    request = Payload({}, {"learning_rate": 0.1, "trial": trial})
    for value in (6.0, 7.0):
        reply = carried_out(method.handlers()["alone"](client, request))
        assert reply.tensors.keys() == {"x.experts.0.A", "x.experts.0.B"}
        assert reply.tensors["x.experts.0.A"][0, 0] == value and reply.numbers == {"examples": 7}
    assert parts == [(0.1, "alone ", part)] * 2 and client.session == {"probed": trial > 0}


def test_the_warm_up_is_a_share_of_the_rounds():
    assert [warm_up_rounds(0.2, rounds) for rounds in (1, 2, 4, 25)] == [1, 1, 1, 5]


def test_a_training_moves_its_own_expert_and_the_router_alone(model_folder, table):
    table["adapter"] = ADAPTER
    settings = Experiment.from_table(table).adapter
    backbone = attach_experts(load_backbone(str(model_folder), pad_token_id=0), settings)
    model = ExpertModel(backbone, settings, 0)
    before, held = model.read(), OthersHeld(model)
    optimizer = torch.optim.AdamW(model.parameters.values(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        for parameter in model.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        held.before(model.parameters)
        optimizer.step()
        held.after(model.parameters)
    for name, tensor in model.read().items():
        moved = ".experts.0." in name or name.endswith("router")
        assert torch.equal(tensor, before[name]) != moved, name


def test_another_adapter_is_refused(table):
    table["method"] = {"name": "fedlease"}
    with pytest.raises(SettingsError, match=r'adapter.router = "linear", not \'lora\''):
        Experiment.from_table(table)
    table["adapter"], table["method"]["groups"] = ADAPTER, 4
    with pytest.raises(SettingsError, match=r"method\.groups = 4 is above adapter\.experts = 3"):
        Experiment.from_table(table)
    table["method"] = {"name": "fedamole"}
    with pytest.raises(SettingsError, match="routes by the experts themselves"):
        Experiment.from_table(table)


@pytest.fixture
def lease(model_folder, table):
    """Make the method with a server of 3 experts and so many rounds."""
    table["adapter"] = ADAPTER
    settings = Experiment.from_table(table).adapter
    backbone = attach_experts(load_backbone(str(model_folder), pad_token_id=0), settings)
    model = ExpertModel(backbone, settings, 0)

    def make(rounds=5, **own):
        method = FedLEASE(FedLEASESettings(**own))
        method.setup(SimpleNamespace(model=model, aggregation=AggregationSettings(), rounds=rounds))
        return method

    return make


def drive(method, answering, members=6):
    """Play rounds in which all members are asked and some answer at random; return what was asked."""
    draws, state, asked = torch.Generator().manual_seed(0), method.initial_state({}), []
    presence = Presence.of(dict.fromkeys(range(members), 4))
    for number, there in enumerate(answering, 1):
        cohort = Cohort(number, tuple(range(members)), presence, 1e-3)
        steps = method.round(state, cohort)
        exchange = next(steps)
        try:
            while True:
                replies = []
                for client in sorted(exchange.requests.keys() & there):
                    specs = exchange.reply_schema.tensors
                    own = {s.name: torch.randn(s.shape, generator=draws) for s in specs}
                    replies.append(Reply(client, Payload(own, {"examples": 4})))
                asked.append((cohort, exchange))
                exchange = steps.send(Replies(replies))
        except StopIteration as stop:
            state = stop.value
    return state, asked


def test_a_round_after_the_warm_up_is_what_is_counted(lease):
    method = lease()
    whole = method.drawn
    up = {n: t for n, t in whole.items() if ".experts.0." in n or n.endswith("router")}
    found = method.traffic(own_expert(whole))
    assert (found.down, found.up) == (tensor_bytes(whole), tensor_bytes(up)) and found.up > 0


def test_the_warm_up_goes_on_until_three_are_known(lease):
    """Nobody answers in it: without clients there are no groups, and no round would train."""
    everybody = set(range(6))
    state, asked = drive(lease(rounds=8), [set(), {1}, {1, 2}, {1, 4}, everybody])
    actions = [(cohort.round, exchange.action) for cohort, exchange in asked]
    assert actions == [
        (1, "alone"),
        (2, "alone"),
        (3, "alone"),
        (4, "alone"),
        (5, "alone"),
        (5, "train"),
    ]
    trials = [
        decode(next(iter(e.requests.values())), e.request_schema).numbers[TRIAL.name]
        for _, e in asked
        if e.action == "alone"
    ]
    assert trials == [0, 0, 0, 0, 1]  # whole trainings, but in a round that trains a mixture too
    assert asked[-2][1].requests.keys() == {0, 3, 5} and groups_of(state).keys() == everybody


def test_a_client_that_never_answers_does_not_keep_the_others_from_groups(lease):
    """Of six rounds three are waited; then there are groups of the two that are known."""
    state, asked = drive(lease(rounds=6), [{0, 1}] * 6, members=3)
    actions = [(cohort.round, exchange.action) for cohort, exchange in asked]
    both = [(number, action) for number in (4, 5, 6) for action in ("alone", "train")]
    assert actions == [(1, "alone"), (2, "alone"), (3, "alone"), *both]
    assert groups_of(state).keys() == {0, 1}
    tried = [e.requests.keys() for c, e in asked if c.round > 3 and e.action == "alone"]
    assert tried == [{2}] * 3  # on trial, in case it comes
    assert "formed of the 2 of 3 clients that answered" in asked[3][0].warnings[0]


def test_a_warm_up_without_an_answer_goes_on(lease):
    state, asked = drive(lease(rounds=4), [set(), set(), set(), {0}], members=3)
    assert [exchange.action for _, exchange in asked] == ["alone"] * 4 and not groups_of(state)


@pytest.mark.parametrize(
    ("there", "members", "own", "warned"),
    [({0, 1, 2}, 6, {}, True), ({0, 1, 2, 3}, 6, {}, False), ({0, 1, 2}, 3, {}, False),
     ({0, 1, 2}, 6, {"groups": 2}, False), ({0, 1, 2}, 6, {"groups": 3}, True)],
)  # fmt: skip
def test_groups_of_too_few_clients_are_said(lease, there, members, own, warned):
    _, asked = drive(lease(**own), [there, set(range(members))], members)
    (first, *_), last = asked[0], asked[-1][0]
    assert not first.warnings and bool(last.warnings) == warned
    if warned:
        assert "formed of the 3 of 6 clients that answered" in last.warnings[0]
        assert "method.warm_up_share" in last.warnings[0]


def test_row_level_privacy_is_refused_by_the_method(table):
    table |= {"method": {"name": "fedlease"}, "adapter": ADAPTER}
    table["privacy"] = {"unit": "row", "target_epsilon": 5.0, "delta": 1e-3}
    with pytest.raises(SettingsError) as told:
        Experiment.from_table(table)
    assert any("method.name = 'fedlease' cannot: it needs" in text for text in told.value.problems)


@pytest.fixture
def play(table):
    def run(schedule, name="fedlease", **settings):
        table["method"] = {"name": name, **settings}
        table["adapter"] = ADAPTER if name == "fedlease" else {"rank": 2}
        table["training"] |= {"local_steps": 1, "batch_size": 4}
        table["federation"] = {"clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2}
        table["data"] |= {"builtin_rows": 40}
        return played(Experiment.from_table(table), schedule)

    return run


@pytest.mark.slow
def test_who_is_absent_keeps_its_group_and_who_is_new_is_tried(play):
    found = play(Schedule(away={1: {3}, 2: {3}, 3: {0}}), groups=2)
    assert found.of("alone", 1).keys() == {0, 1, 2} and found.of("alone", 3).keys() == {3}
    assert groups_of(found.states[1]).keys() == {0, 1, 2}
    assert groups_of(found.states[-1]).keys() == {0, 1, 2, 3}
    groups, state = groups_of(found.states[2]), found.states[2].tensors
    for number in set(groups.values()):  # a group's expert is the mean of its members that answered
        sent = [r for c, (_, r) in found.of("train", 3).items() if groups[c] == number]
        for name in sent[0].tensors if sent else ():
            whole = sum(reply.tensors[name].double() for reply in sent) / len(sent)
            assert torch.allclose(state[f"expert/{number:03d}/{name}"].double(), whole, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedlease", "fedbiscuit"])
def test_all_absences_and_the_opposite_order_are_the_same_bits(play, name):
    plain = play(ALL_OF_IT, name)
    turned = Schedule(ALL_OF_IT.away, ALL_OF_IT.late, ALL_OF_IT.left, backwards=True)
    assert [s.digest() for s in play(turned, name).states] == [s.digest() for s in plain.states]
