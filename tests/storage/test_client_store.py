"""The client store: pending until a round ends, and the same after a trip through a checkpoint."""

import pytest
import torch

from fedloom.errors import CheckpointError
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint
from fedloom.storage.client_store import ClientStore
from fedloom.tensors import State


def test_what_a_round_stores_counts_when_it_is_over():
    store = ClientStore()
    store.stage(3, {"adapter": {"w": torch.ones(1)}})
    assert store.slots(3)["adapter"]["w"].item() == 1.0  # the client itself sees it at once
    assert store.flat() == {} and store.changed == set()
    store.finish_round()
    assert store.flat()[3]["adapter|w"].item() == 1.0 and store.changed == {3}


def test_unchanged_slots_are_not_marked():
    store = ClientStore({0: {"adapter|w": torch.ones(1)}})
    store.stage(0, store.slots(0))
    store.finish_round()
    assert store.changed == set()


def test_a_copy_of_the_slots_leaves_the_store_alone():
    store = ClientStore({0: {"adapter|w": torch.ones(1)}})
    store.slots(0)["other"] = {}
    assert list(store.slots(0)) == ["adapter"]


def test_flat_and_back():
    store = ClientStore()
    store.stage(
        1, {"adapter": {"a.b": torch.ones(2)}, "optimizer": {"a.b/step": torch.tensor(3.0)}}
    )
    store.finish_round()
    back = ClientStore(store.flat()).slots(1)
    assert torch.equal(back["adapter"]["a.b"], torch.ones(2))
    assert back["optimizer"]["a.b/step"].item() == 3.0


def test_what_is_undone_is_as_it_was_before_the_exchange():
    store = ClientStore({0: {"adapter|w": torch.zeros(1)}})
    for value in (1.0, 2.0):
        store.begin_exchange()
        for _ in range(2):
            store.stage(0, {"adapter": {"w": torch.full((1,), value)}})
            value += 0.5
    store.discard(0)
    store.discard(0)
    store.discard(5)
    assert store.slots(0)["adapter"]["w"].item() == 1.5
    store.begin_exchange()
    store.discard(0)
    assert store.slots(0)["adapter"]["w"].item() == 1.5
    store.finish_round()
    assert store.changed == {0} and store.flat()[0]["adapter|w"].item() == 1.5


def test_what_was_the_first_of_a_round_is_undone_to_the_round_before():
    store = ClientStore({0: {"adapter|w": torch.zeros(1)}})
    store.begin_exchange()
    store.stage(0, {"adapter": {"w": torch.ones(1)}})
    store.discard(0)
    store.finish_round()
    assert store.changed == set() and store.slots(0)["adapter"]["w"].item() == 0.0


class Counted(dict):
    """Tensors by client, and who was asked for."""

    def __init__(self, *given):
        super().__init__(*given)
        self.asked = []

    def __getitem__(self, client):
        self.asked.append(client)
        return super().__getitem__(client)

    def get(self, client, other=None):
        if client in self:
            return self[client]
        return other


def of_size(client, size=1000):
    return {"adapter|w": torch.full((size,), float(client))}


def test_only_clients_that_take_part_are_read_and_few_stay_in_memory():
    saved = Counted({client: of_size(client) for client in range(100)})
    store = ClientStore(saved, recent=8000)  # bytes of two
    assert 7 in store and 100 not in store and saved.asked == []
    for client in (3, 4, 3, 5, 3, 4):  # 4 is let go of for 5, and read again
        assert store.slots(client)["adapter"]["w"][0] == client
    assert saved.asked == [3, 4, 5, 4]
    store.stage(5, {"adapter": {"w": torch.zeros(1)}})
    store.stage(6, {})
    store.finish_round()
    assert list(store.flat()) == [c for c in range(100) if c != 6] and 6 not in store
    assert store.flat()[5]["adapter|w"].tolist() == [0.0] and store.changed == {5, 6}
    saved.asked.clear()
    now = Counted({5: {"adapter|w": torch.zeros(1)}})
    store.saved(now)
    assert store.changed == set() and list(store.flat()) == [5]
    assert store.slots(5)["adapter"]["w"].tolist() == [0.0] and now.asked == saved.asked == []


def test_a_store_goes_on_from_a_checkpoint_and_only_who_changed_is_written(tmp_path):
    clients = {client: of_size(client) for client in range(20)}
    kept = checkpoint.save(tmp_path, Checkpoint(1, State({}), clients, "f"))
    store = ClientStore(checkpoint.load(tmp_path, "f").clients, recent=0)
    store.stage(3, {"adapter": {"w": torch.ones(2)}})
    store.finish_round()
    asked = Counted(dict.fromkeys(store.flat()))
    asked[3] = store.flat()[3]
    kept = checkpoint.save(
        tmp_path, Checkpoint(2, State({}), asked, "f"), store.changed, kept.folder
    )
    assert asked.asked == [3]
    store.saved(kept)
    back = checkpoint.load(tmp_path, "f").clients
    assert list(back) == list(range(20)) and len(back) == 20 and 20 not in back
    assert back[3]["adapter|w"].tolist() == [1, 1] and torch.equal(
        back[4]["adapter|w"], clients[4]["adapter|w"]
    )
    (kept.folder / "client-0004.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"client-0004\.safetensors cannot be read any more"):
        store.slots(4)
