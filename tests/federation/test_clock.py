"""Simulated time of synchronous rounds: deadlines, over-sampling, availability and lost connections."""

import json

import pytest
import torch

from absent import Schedule, played
from fedloom.accounting.costs import REFERENCE
from fedloom.errors import RoundFailed
from fedloom.experiment.experiment import Experiment
from fedloom.federation.clock import Assignment, ClockState
from fedloom.wire.messages import Answer
from fedloom.wire.schema import Schema, TensorSpec

FAST = {"flops": 1e21, "up": 1e21, "down": 1e21}
"""Devices on which a message takes its latency and nothing else."""


@pytest.fixture
def play(table, tmp_path):
    """Play rounds with four clients, given a row of a trace for each."""

    def run(rows, federation=None, schedule=None, **sections):
        path = tmp_path / "trace.jsonl"
        given = [{"client": c, **FAST, **own} for c, own in enumerate(rows)]
        path.write_text("".join(json.dumps(own) + "\n" for own in given))
        own = {
            **table,
            "data": {**table["data"], "builtin_rows": 40},
            "training": {**table["training"], "local_steps": 1},
            "federation": {"clients": len(rows), "rounds": 2, **(federation or {})},
            "simulation": {"devices": {"trace": str(path)}},
            **sections,
        }
        return played(Experiment.from_table(own), schedule or Schedule())

    return run


def latencies(*seconds):
    return [{"latency": own} for own in seconds]


def ends(found):
    return [record.simulated.end for record in found.records]


def test_a_round_takes_as_long_as_its_slowest_client(play):
    found = play(latencies(1, 2, 3, 10))
    assert ends(found) == pytest.approx([10, 20])
    assert found.records[0].simulated.clients == pytest.approx({0: 1, 1: 2, 2: 3, 3: 10})


def test_seconds_are_those_of_the_ledger_on_the_device(play):
    """By hand: bits over rates, operations over speed, latency; scoring rows once, in the first round."""
    rows = [{"flops": 1e9, "up": 1e6, "down": 4e6, "latency": 0.5}] * 2
    found = play(rows)
    for record in found.records:
        for client in (0, 1):
            own = [cost for cost in record.costs if cost.client == client]
            assert (REFERENCE in {cost.phase for cost in own}) == (record.round == 1)
            sent = sum(8 * c.bytes_up / 1e6 + 8 * c.bytes_down / 4e6 for c in own)
            seconds = sent + sum(c.flops for c in own) / 1e9 + 0.5
            assert record.simulated.clients[client] == pytest.approx(seconds)


def test_after_the_deadline_a_client_is_left_out_with_the_reason(play):
    found = play(latencies(1, 2, 3, 10), {"deadline": 5.0})
    assert ends(found) == pytest.approx([5, 10])
    for record in found.records:
        assert record.rejected == {
            3: "late: it takes 10 s (simulated), federation.deadline is 5.00 s"
        }
        assert set(record.client_train) == {0, 1, 2}
    alone = play(latencies(1, 2, 3, 4), schedule=Schedule(late={1: {3}, 2: {3}}))
    assert [state.digest() for state in found.states] == [s.digest() for s in alone.states]


def test_of_more_clients_the_earliest_count(play):
    found = play(latencies(4, 1, 3, 2), {"clients_per_round": 2, "extra": 2, "quorum": 1.0})
    assert ends(found) == pytest.approx([2, 4])
    for record in found.records:
        assert set(record.rejected) == {0, 2} and set(record.client_train) == {1, 3}
        assert record.rejected[0] == "late: the other 2 had answered by then (simulated)"


def test_who_is_not_available_is_not_drawn_and_who_goes_away_is_lost(play):
    """Client 1 leaves at 2 s, in its work; 2 comes at 3 s, in time for round 2; 3 comes too late."""
    rows = latencies(3, 3, 3, 3)
    for own, windows in zip(rows, ([[0, 99]], [[0, 2]], [[3, 99]], [[50, 99]]), strict=True):
        own["available"] = windows
    found = play(rows)
    assert [record.clients for record in found.records] == [(0, 1), (0, 2)]
    assert found.records[0].rejected == {1: "not available any more after 2.00 s (simulated)"}
    assert ends(found) == pytest.approx([3, 6])


def test_a_round_waits_for_its_quorum_or_the_run_ends(play):
    rows = latencies(1, 1, 1, 1)
    for own, windows in zip(rows, ([[0, 99]], [[5, 99]], [[7, 99]], [[0, 1]]), strict=True):
        own["available"] = windows
    found = play(rows, {"quorum": 0.75})
    assert ends(found) == pytest.approx([8, 9])
    with pytest.raises(RoundFailed, match=r"round 1: .* 4 of 4 clients are available, as"):
        play(rows, {"quorum": 1.0})


def test_lost_connections_are_drawn_by_client_and_round(play):
    rows = [{"latency": 1, "dropout": own} for own in (0, 0, 0.5, 1)]
    found = play(rows, {"rounds": 6})
    lost = [set(record.rejected) for record in found.records]
    assert all(3 in own and not own & {0, 1} for own in lost)
    assert 0 < sum(2 in own for own in lost) < 6
    assert {w for r in found.records for w in r.rejected.values()} == {
        "lost its connection (simulated)"
    }


def test_requests_in_flight_come_back_as_they_were_sent():
    """Coded requests of a round differ by client; equal ones are kept once."""
    schema = Schema((TensorSpec("x", (2,), torch.float32),))
    sent = [(0, 1, b"all"), (1, 1, b"all"), (2, 1, b"own"), (3, 2, b"all")]
    work = tuple(
        Assignment(c, round, 0.0, 1.0, data, Answer(c, b"done"), schema if c == 2 else None)
        for c, round, data in sent
    )
    table, tensors = ClockState(3.0, frozenset({1}), work).saved()
    assert len([name for name in tensors if name.startswith("request/")]) == 3
    again = ClockState.restored(json.loads(json.dumps(table)), tensors)
    assert again == ClockState(3.0, frozenset({1}), work)
