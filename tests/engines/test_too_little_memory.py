"""A client whose memory does not suffice for a batch: it goes on with less at a time, and says so."""

import logging
from dataclasses import replace

import pytest
import torch

import fedloom
from engines.test_contract import training
from fedloom.errors import RoundFailed
from fedloom.models.adapters import AdapterModel
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.security.audit_log import events
from fedloom.training.memory import fitting, is_out_of_memory
from sampling import every


@pytest.fixture
def memory_for(monkeypatch):
    """Let only so many tokens, or sequences, pass through the model at a time while it trains."""

    run = AdapterModel._run

    def limit(tokens=1 << 30, sequences=1 << 30):
        def call(self, input_ids, real, **options):
            too_much = input_ids.numel() > tokens or len(input_ids) > sequences
            if torch.is_grad_enabled() and too_much:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return run(self, input_ids, real, **options)

        monkeypatch.setattr(AdapterModel, "_run", call)

    return limit


def states(folder):
    return [event["state"] for event in events(folder, "round")]


@pytest.mark.parametrize("method", every(3, ["fedavg", "fedper", "scaffold"]))
def test_the_rest_of_the_run_is_that_of_smaller_passes(
    experiment, memory_for, method, tmp_path, caplog
):
    def run(name, **training):
        settings = experiment(
            method={"name": method},
            objective={"name": "orpo"},  # the last bits of references follow passes of their own
            training={"local_steps": 3, **training},
            output={"folder": str(tmp_path / name)},
        )
        return states(fedloom.run(settings).folder)

    in_tokens, in_examples = run("tokens", tokens_per_pass=256), run("rows", micro_batch_size=4)
    memory_for(tokens=256)
    with caplog.at_level(logging.WARNING):
        assert run("found") == in_tokens
    memory_for(sequences=4)  # four pairs, whose prompts are read once
    with caplog.at_level(logging.WARNING):
        assert run("counted", micro_batch_size=8) == in_examples
    warnings = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(warnings) == 12, "2048 halved 3 times, once a client and not in every round; 8 once"
    assert warnings[0] == (
        "client 0: out of memory; begins again with 1024 tokens at a time, and the same results up to "
        "rounding: training.tokens_per_pass = 1024 says so from the start"
    )
    assert "client 0: out of memory; begins again with 4 examples at a time" in warnings[9]


def test_a_client_for_which_one_example_is_too_much_is_left_out(experiment, memory_for):
    memory_for(sequences=1)
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


def test_nothing_of_a_step_that_was_broken_off_enters_the_next_training(experiment):
    """Gradients of a training that failed between two passes are not added to another client's."""
    settings = experiment(training={"local_steps": 1, "micro_batch_size": 2})
    parts = assemble(settings, partition_data(settings))
    engine, exchange = parts.local, training(parts)
    (whole,) = engine.exchange(replace(exchange, requests={1: exchange.requests[1]}))

    model = engine.resources[0].model
    for parameter in model.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    (again,) = engine.exchange(replace(exchange, requests={1: exchange.requests[1]}))
    assert again.data == whole.data
