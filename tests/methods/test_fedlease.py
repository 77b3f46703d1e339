"""FedLEASE: groups by what clients trained alone, an expert and a router of each, the others held."""

import pytest
import torch

from absent import ALL_OF_IT, CLIENTS, ROUNDS, Schedule, played
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods.bases.client_groups import groups_of
from fedloom.methods.bases.expert_groups import (
    OthersHeld,
    factors_of,
    mixture,
    nearest,
    own_expert,
    single,
)
from fedloom.methods.fedlease import warm_up_rounds
from fedloom.models.experts import ExpertModel, attach_experts
from fedloom.models.load import load_backbone
from fedloom.tensors import join_parts

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
