"""Checkpoints: exact, atomic, checksummed, and refused when they are not ours."""

import contextlib
import errno
import json
from dataclasses import replace

import pytest
import torch

from fedloom.errors import CheckpointError, OutputError
from fedloom.federation.presence import Presence
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint
from fedloom.tensors import State, with_own_memory


def state(round, fingerprint="f" * 64):
    tensors = {"z": torch.full((3,), round / 3), "a": torch.arange(2, dtype=torch.bfloat16)}
    clients = {
        0: {"adapter|w": torch.tensor([float(round)])},
        7: {"adapter|w": torch.tensor([7.0])},
    }
    return Checkpoint(round, State(tensors, {"beta": 0.1}), clients, fingerprint)


def test_round_trip_is_exact(tmp_path):
    checkpoint.save(tmp_path, state(3))
    back = checkpoint.load(tmp_path, "f" * 64)
    assert back.round == 3 and back.state.numbers == {"beta": 0.1}
    assert list(back.state.tensors) == ["z", "a"]
    for name, tensor in state(3).state.tensors.items():
        assert torch.equal(back.state.tensors[name], tensor)
        assert back.state.tensors[name].dtype == tensor.dtype
    assert torch.equal(back.clients[7]["adapter|w"], torch.tensor([7.0]))


def test_tensors_over_one_memory_are_kept_apart(tmp_path):
    """A method may keep what it was sent twice, or a part of it, or a transposed one."""
    w = torch.arange(6.0).view(2, 3)
    own = {"w": w, "same": w, "row": w[1], "turned": w.T, "none": torch.zeros(0)}
    checkpoint.save(
        tmp_path, Checkpoint(1, State(own), {0: {f"s|{n}": t for n, t in own.items()}}, "f" * 64)
    )
    back = checkpoint.load(tmp_path, "f" * 64)
    for name, tensor in own.items():
        assert torch.equal(back.state.tensors[name], tensor)
        assert torch.equal(back.clients[0][f"s|{name}"], tensor)
    found = with_own_memory(own)
    assert found["w"].data_ptr() != found["same"].data_ptr() and torch.equal(found["row"], w[1])
    halves = dict(zip("ab", torch.arange(4.0).split(2), strict=True))
    kept = with_own_memory(halves)  # beside each other in one buffer: nothing is copied
    assert all(kept[n].data_ptr() == halves[n].data_ptr() for n in halves)


def test_who_was_there_is_kept_and_a_checkpoint_of_before_says_so(tmp_path):
    table = Presence.of({0: 5, 7: 9}).closed(3, {0}, {7}).to_table()
    checkpoint.save(tmp_path, replace(state(3), presence=table))
    back = Presence.from_table(checkpoint.load(tmp_path, "f" * 64).presence)
    assert back == Presence(rows={0: 5, 7: 9}, answered_last={0: 3})
    checkpoint.save(tmp_path, state(4))
    assert checkpoint.load(tmp_path, "f" * 64).presence is None


def test_the_newest_two_are_kept_and_unchanged_clients_are_linked(tmp_path):
    for round in range(4):
        checkpoint.save(tmp_path, state(round), changed={0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0003"]
    inode = {
        p: (tmp_path / p / "client-0007.safetensors").stat().st_ino
        for p in ("round-0002", "round-0003")
    }
    assert inode["round-0002"] == inode["round-0003"]
    assert checkpoint.load(tmp_path, "f" * 64).clients[0]["adapter|w"].item() == 3.0
    assert checkpoint.load(tmp_path, "f" * 64, 2).clients[0]["adapter|w"].item() == 2.0


def test_a_truncated_checkpoint_is_refused_and_the_one_before_is_offered(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    file = tmp_path / "round-0002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"round-0002 is damaged .*--from-round 1"):
        checkpoint.load(tmp_path, "f" * 64)
    assert checkpoint.load(tmp_path, "f" * 64, 1).round == 1


@pytest.mark.parametrize(
    "name", ["state.safetensors", "state.json", "manifest.json", "client-0007.safetensors"]
)
def test_any_flipped_or_missing_file_is_noticed(tmp_path, name):
    checkpoint.save(tmp_path, state(1))
    file = tmp_path / "round-0001" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path, "f" * 64)
    file.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path, "f" * 64)


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path):
    checkpoint.save(tmp_path, state(1, "a" * 64))
    with pytest.raises(CheckpointError, match="belongs to another experiment"):
        checkpoint.load(tmp_path, "b" * 64)


def test_no_checkpoint_and_no_such_round_are_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path, "f" * 64)
    checkpoint.save(tmp_path, state(1))
    with pytest.raises(CheckpointError, match="there are: 1"):
        checkpoint.load(tmp_path, "f" * 64, 5)


@contextlib.contextmanager
def full_disk(monkeypatch):
    """What is done meets a full disk, and says so."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as own:
        own.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            yield


def test_a_full_disk_leaves_the_one_before_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    with full_disk(monkeypatch):
        checkpoint.save(tmp_path, state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["round-0001"]
    assert checkpoint.load(tmp_path, "f" * 64).round == 1


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path):
    checkpoint.save(tmp_path, state(1))
    (tmp_path / ".round-0002.123").mkdir()
    (tmp_path / ".round-0002.123" / "state.json").write_text(json.dumps({}))
    assert checkpoint.load(tmp_path, "f" * 64).round == 1


def test_a_client_whose_store_is_damaged_starts_afresh_only_when_asked(tmp_path):
    clients = {c: {"personal|own": torch.full((2,), float(c))} for c in (0, 3)}
    checkpoint.save(tmp_path, Checkpoint(1, State({"a": torch.ones(1)}), clients, "x"))
    (tmp_path / "round-0001" / "client-0003.safetensors").write_bytes(b"broken")
    message = r"client-0003\.safetensors does not match .*--fresh-client 3"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, "x")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, "x", fresh=[0])
    assert list(checkpoint.load(tmp_path, "x", fresh=[3]).clients) == [0]


def test_a_client_that_leaves_is_forgotten_in_every_checkpoint(tmp_path):
    for round in (1, 2):
        clients = {c: {"personal|own": torch.full((2,), float(c))} for c in (0, 3)}
        checkpoint.save(tmp_path, Checkpoint(round, State({"a": torch.ones(1)}), clients, "x"))
    assert checkpoint.forget(tmp_path, 3) == 2
    assert not list(tmp_path.rglob("client-0003*"))
    for round in (1, 2):
        assert list(checkpoint.load(tmp_path, "x", round).clients) == [0]
    assert checkpoint.forget(tmp_path, 3) == 0


def test_who_is_stopped_while_it_forgets_leaves_checkpoints_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    with full_disk(monkeypatch):
        checkpoint.forget(tmp_path, 7)
    assert list(checkpoint.load(tmp_path, "f" * 64).clients) == [0, 7]
    assert checkpoint.forget(tmp_path, 7) == 1
    assert list(checkpoint.load(tmp_path, "f" * 64).clients) == [0]
