"""Cohorts over the real engine: every method that waits for its trainings, failures, memory, resuming."""

import logging

import pytest
import torch

import fedloom
from engines.test_workers import played
from fedloom.engines import cohorts
from fedloom.errors import SettingsError
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from pools import with_pool

PLAIN = {"optimizer": "sgd", "learning_rate": 0.5, "local_steps": 2, "batch_size": 4}
"""Adam divides by the gradient's own size, and so magnifies rounding."""

METHODS = {
    "fedavg": {},
    "scaffold": {},
    "feddyn": {"alpha": 0.1},
    "apfl": {"mixing_rate": 0.5},
    "ffa_lora": {},
    "ditto": {"strength": 0.1},
    "pfedme": {"steps": 2, "strength": 1.0, "local_rate": 0.5},
    "flexlora": {},
    "fed_sb": {},
    "random_projection": {"dimension": 100},
    "fedmap": {"precision": 1.0},
}


def settings_of(experiment, name, cohort, **sections):
    sections = {"training": PLAIN, "adapter": {"dropout": 0.1}, **sections}
    if name == "flexlora":  # clients 0 and 2 are alike
        groups = {"large": {"clients": [0, 2], "rank": 4}, "small": {"clients": [1], "rank": 2}}
        sections["clients"] = {"groups": groups}
        sections["adapter"] = {"rank": 4, "dropout": 0.1}
    if name == "pfedme":  # four steps on each batch: a second round magnifies rounding
        sections["federation"] = {"rounds": 1, "clients": 3}
    method = {"name": name, **METHODS[name]}
    return experiment(
        method=method, objective={"name": "dpo"}, simulation={"cohort": cohort}, **sections
    )


def kept(played):
    """Return all tensors of the server and of what clients store."""
    stored = {
        (c, n): t for c, own in played.parts.local.store.flat().items() for n, t in own.items()
    }
    return {**played.state.tensors, **stored}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_whether_clients_are_trained_together(experiment, federate, name):
    alone = federate(settings_of(experiment, name, 1))
    together = federate(settings_of(experiment, name, 2))
    one, other = kept(alone), kept(together)
    start = alone.parts.method.initial_state(alone.parts.initial).tensors
    assert one.keys() == other.keys()
    apart = sum((one[name] - other[name]).square().sum() for name in one)
    moved = sum((one[name] - tensor).square().sum() for name, tensor in start.items())
    assert 0 < float((apart / moved).sqrt()) < 1e-5
    for record, found in zip(alone.records, together.records, strict=True):
        assert found.client_train.keys() == record.client_train.keys()
        for client, metrics in record.client_train.items():
            assert found.client_train[client] == pytest.approx(metrics, rel=1e-3, abs=1e-4)
        costs = [
            sorted((c.client, c.phase, c.flops, c.tokens, c.steps, c.exchanges) for c in own.costs)
            for own in (record, found)
        ]
        assert costs[0] == costs[1]


def test_a_cohort_repeats_to_the_bit_and_goes_on_after_a_stop(experiment, tmp_path):
    def run(folder):
        settings = settings_of(
            experiment, "scaffold", 2, output={"folder": str(tmp_path / folder), "verify": False}
        )
        return fedloom.run(settings)

    run("one"), run("two")
    fedloom.resume(tmp_path / "two", from_round=1)
    one, two = (
        next((tmp_path / name).rglob("adapter_model.safetensors")).read_bytes()
        for name in ("one", "two")
    )
    assert one == two


def test_where_memory_does_not_suffice_clients_are_trained_one_by_one(
    experiment, federate, monkeypatch, caplog
):
    def none_left(*args):
        raise MemoryError

    alone = federate(settings_of(experiment, "fedavg", 1))
    monkeypatch.setattr(cohorts, "train_together", none_left)
    with caplog.at_level(logging.WARNING):
        found = federate(settings_of(experiment, "fedavg", 2))
    assert "memory does not suffice for 2 clients together" in caplog.text
    for name, tensor in alone.state.tensors.items():
        assert torch.equal(found.state.tensors[name], tensor)


def test_a_handler_that_trains_by_itself_goes_on_as_before(experiment, federate, caplog):
    def by_itself(parts):
        def train(client, payload):
            client.model.write(payload.tensors)
            result = client.train(payload.numbers["learning_rate"])
            return fedloom.wire.messages.Payload(
                client.model.read(), {"examples": len(client.share)}, result.metrics
            )

        parts.local.handlers = {**parts.local.handlers, "train": train}

    alone = federate(settings_of(experiment, "fedavg", 1))
    with caplog.at_level(logging.WARNING):
        found = federate(settings_of(experiment, "fedavg", 3), by_itself)
    assert caplog.text.count("trained one by one") == 1
    for name, tensor in alone.state.tensors.items():
        assert torch.equal(found.state.tensors[name], tensor)


def test_the_run_says_why_clients_are_trained_one_by_one(experiment):
    settings = experiment(
        adapter={"kind": "ia3", "rank": 8}, objective={"name": "dpo"}, simulation={"cohort": "auto"}
    )
    warnings = assemble(settings, partition_data(settings)).accounts.warnings
    assert any("trained one by one: more is trained than LoRA's two" in text for text in warnings)


@pytest.mark.parametrize("value", [0, "many", 2.5])
def test_a_cohort_is_auto_or_a_number(experiment, value):
    with pytest.raises(SettingsError, match='give "auto", or a number of clients from 1') as error:
        experiment(simulation={"cohort": value})
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=getattr(pytest.mark, "slow" if n == "scaffold" else "full")) for n in METHODS]
)  # fmt: skip
def test_a_cohort_is_a_workers_unit_of_work_and_has_the_same_bits(experiment, name):
    """Also where a worker ends: the cohort is trained once more."""
    settings = settings_of(experiment, name, 2, federation={"rounds": 2, "clients": 3})
    alone = played(settings, assemble(settings, partition_data(settings)))
    parts, pool = with_pool(settings, seed=3, dies=[False, True, False, True])
    assert played(settings, parts) == alone
    assert any(len(unit) == 2 for unit in pool.units)


@pytest.mark.full
def test_workers_say_of_an_action_that_its_handler_trains_by_itself(experiment):
    """From the next exchange on its clients are units by themselves, as in one process."""
    settings = experiment(
        method={"name": "fedamole"},
        adapter={"kind": "experts", "rank": 2, "experts": 4},
        simulation={"cohort": 3},
        training={"local_steps": 1},
    )
    alone = played(settings, assemble(settings, partition_data(settings)))
    parts, _ = with_pool(settings, size=2, seed=1)
    assert played(settings, parts) == alone
