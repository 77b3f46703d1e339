"""The server's memory does not grow with the number of clients."""

import ctypes

import pytest
import torch

from fedloom import server as servers
from fedloom.accounting.ledger import Ledger, peak_memory, reset_peak_memory
from fedloom.checkpoint import State
from fedloom.deployment.children import QUIET
from fedloom.messages import (
    Answer,
    Payload,
    Schema,
    StoredTensors,
    TensorSpec,
    encode,
)
from fedloom.methods import make_method
from fedloom.methods.fedavg import FedAvgSettings
from fedloom.runner import Silent
from fedloom.server import FederationSettings, Server

ADAPTER = {
    f"layer.{i}.lora_{factor}.weight": torch.zeros((64, 4096) if factor == "A" else (4096, 64))
    for i in range(8)
    for factor in "AB"
}
M_MMAP_THRESHOLD = -3
UPDATE = sum(tensor.numel() * 4 for tensor in ADAPTER.values())


class Clients:
    """An engine whose clients each send their number, in no order."""

    def __init__(self, count):
        self.count = count

    def sizes(self):
        return dict.fromkeys(range(self.count), 10)

    def exchange(self, exchange):
        for client in reversed(range(self.count)):
            tensors = {name: torch.full_like(t, client) for name, t in ADAPTER.items()}
            payload = Payload(tensors, {"examples": 10})
            yield Answer(client, encode(payload, exchange.reply_schema))


def play(count, folder):
    """Return the state after a round, and the peak of memory in it."""
    done = []
    server = Server(
        make_method(FedAvgSettings()), Clients(count), FederationSettings(rounds=1, clients=count),
        lambda round: 1e-3, lambda state, round: None, lambda record, state: done.append(record),
        Ledger(), Silent(), spool=folder,
    )  # fmt: skip
    reset_peak_memory()
    return server.run(State(ADAPTER), 0), peak_memory()


@pytest.mark.parametrize("clients", [24, pytest.param(256, marks=pytest.mark.slow)])
def test_memory_is_flat_from_4_clients_on(clients, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "SPOOL_ABOVE", 2 * UPDATE)
    threshold = int(QUIET["MALLOC_MMAP_THRESHOLD_"])  # as the server's processes are started
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, threshold)
    play(8, tmp_path)  # what is loaded at the first use
    few, many = (play(count, tmp_path) for count in (4, clients))
    assert many[1] - few[1] < 2 * UPDATE
    assert many[0].tensors["layer.3.lora_A.weight"].unique().item() == (clients - 1) / 2


def test_what_waits_on_disk_gives_the_same_bits(tmp_path, monkeypatch):
    whole, _ = play(5, tmp_path)
    monkeypatch.setattr(servers, "SPOOL_ABOVE", 0)
    stored, _ = play(5, tmp_path)
    assert stored.digest() == whole.digest()
    assert len(list(tmp_path.iterdir())) == 5


def test_stored_tensors_are_a_dictionary_like_others(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a": torch.randn(3),
        "rows": torch.randn(2, 4),
        "c": torch.tensor(7),
    }
    specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items() if n != "rows"]
    schema = Schema((*specs, TensorSpec("rows", (5, 4), torch.float32, ragged=True)))
    path = tmp_path / "payload"
    path.write_bytes(encode(Payload(tensors), schema))
    stored = StoredTensors(path, schema)
    assert list(stored) == ["b", "a", "c", "rows"] and len(stored) == 4 and "x" not in stored
    for name in tensors:
        assert (
            torch.equal(stored[name], tensors[name]) and stored[name].dtype == tensors[name].dtype
        )
    copy = {**stored}
    assert all(
        torch.equal(copy[n], t) and torch.equal(dict(stored.items())[n], t)
        for n, t in tensors.items()
    )
    assert len(list(stored.values())) == 4 and stored.get("x") is None
    assert torch.equal(stored.get("a"), tensors["a"])
