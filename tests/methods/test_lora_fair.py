"""LoRA-FAIR in rounds: less is lost than by averaging the factors, from the same answers."""

import pytest
import torch

from fedloom.errors import SettingsError

SMALL = {
    "federation": {"clients": 3, "rounds": 1},
    "data": {"builtin_rows": 40},
    "training": {"local_steps": 4, "batch_size": 4, "learning_rate": 0.01},
}


def test_less_is_lost_than_by_the_mean_of_the_factors(experiment, federate):
    found = federate(experiment(method={"name": "lora_fair", "strength": 0.0}, **SMALL))
    plain = federate(experiment(method={"name": "fedavg"}, **SMALL))
    lost = [own.records[-1].train["aggregation_error"] for own in (found, plain)]
    assert 0 < lost[0] < lost[1]
    for name, tensor in plain.state.tensors.items():
        if "lora_A" in name:  # A is the mean, B is not
            assert torch.equal(tensor, found.state.tensors[name])
    strong = federate(experiment(method={"name": "lora_fair", "strength": 1e9}, **SMALL))
    for name, tensor in plain.state.tensors.items():
        assert torch.allclose(tensor, strong.state.tensors[name], atol=1e-6)


def test_what_it_does_not_go_with(experiment):
    for sections, words in (
        ({"adapter": {"kind": "full"}}, "treats the two factors of LoRA apart"),
        ({"aggregation": {"rule": "median"}}, "in a way of its own"),
    ):
        with pytest.raises(SettingsError, match=words):
            experiment(method={"name": "lora_fair"}, **sections)
