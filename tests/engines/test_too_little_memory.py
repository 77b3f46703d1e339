"""A client whose memory does not suffice for a batch: it goes on with less at a time, and says so."""

import logging

import pytest
import torch

import fedloom
from fedloom.audit import events
from fedloom.errors import RoundFailed
from fedloom.models.adapters import AdapterModel
from fedloom.training.memory import fitting, is_out_of_memory
from sampling import every


@pytest.fixture
def memory_for(monkeypatch):
    """Let only so many sequences pass through the model at a time while it trains."""

    def limit(sequences):
        real = AdapterModel.__call__

        def call(self, *, input_ids, **options):
            if torch.is_grad_enabled() and len(input_ids) > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return real(self, input_ids=input_ids, **options)

        monkeypatch.setattr(AdapterModel, "__call__", call)

    return limit


def states(folder):
    return [event["state"] for event in events(folder, "round")]


@pytest.mark.parametrize("method", every(3, ["fedavg", "fedpdpo", "scaffold"]))
def test_the_rest_of_the_run_is_that_of_smaller_micro_batches(
    experiment, memory_for, method, tmp_path, caplog
):
    def run(name, **training):
        settings = experiment(
            method={"name": method},
            training={"local_steps": 3, **training},
            output={"folder": str(tmp_path / name)},
        )
        return states(fedloom.run(settings).folder)

    said = run("said", micro_batch_size=2)
    memory_for(4)  # two pairs
    with caplog.at_level(logging.WARNING):
        assert run("found") == said
    warnings = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(warnings) == 6, "8, 4 and 2 examples, once a client and not in every round"
    assert "client 0: out of memory; begins again with 4 examples at a time" in warnings[0]


def test_a_client_for_which_one_example_is_too_much_is_left_out(experiment, memory_for):
    memory_for(1)
    with pytest.raises(RoundFailed, match="not even one example at a time fits into memory"):
        fedloom.run(experiment(training={"local_steps": 1}))


def test_errors_of_this_machine_are_known():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert is_out_of_memory(found.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_other_errors_are_not_tried_again():
    tried = []

    def work(size):
        tried.append(size)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting(work, 8, "client 0")
    assert tried == [8]
