"""Flower has one node for each member that is let in, whatever became of it before."""

import base64

import pytest
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedloom.deployment import flower_nodes
from fedloom.deployment.flower_nodes import FlowerNodes, read_nodes
from fedloom.errors import ConnectionFailed, OutputError
from fedloom.security.audit_log import AuditLog, events
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key


class Flower:
    """Stands for Flower's server: takes each key once and for ever."""

    def __init__(self):
        self.used, self.alive, self.calls, self.failing = set(), {}, [], []

    def register(self, public, name):
        self._fail(name)
        if public in self.used:
            raise ConnectionFailed("Flower's server refuses: Public key already in use.")
        self.used.add(public)
        node = 100 + len(self.used)
        self.alive[node] = name
        self.calls.append(f"+{name}")
        return node

    def unregister(self, node):
        self._fail(self.alive[node])
        self.calls.append(f"-{self.alive.pop(node)}")

    def nodes(self):
        return dict.fromkeys(self.alive, "online")

    def _fail(self, name):
        if name in self.failing:
            raise ConnectionFailed("Flower's server does not answer")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


class Site:
    def __init__(self, folder):
        self.folder, self.flower = folder, Flower()
        for name in ("north", "south"):
            make_key(folder / f"{name}.key")
            self.members().allow(name, self.public(name))
        self.log = AuditLog(folder / "audit.jsonl")
        self.path = folder / "nodes.toml"

    def public(self, name):
        return (self.folder / f"{name}.pub").read_text()

    def members(self):
        return Members(self.folder / "members.toml")

    def nodes(self):
        return FlowerNodes(self.flower, self.members, self.path, self.log.record)


def test_it_follows_the_file_and_says_so(site):
    nodes = site.nodes()
    nodes.follow()
    nodes.follow()
    assert site.flower.calls == ["+north", "+south"] and read_nodes(site.path) == {101: 0, 102: 1}
    site.members().revoke("south")
    nodes.follow()
    assert site.flower.calls[2:] == ["-south"] and read_nodes(site.path) == {101: 0}
    assert nodes.of(1) is None and nodes.of(0).node == 101
    noted = [
        (e["event"], e.get("name", e.get("allowed")))
        for e in events(site.folder, "members", "revoked")
    ]
    assert noted == [("members", 2), ("revoked", "south")]


def test_who_is_let_in_again_has_another_node(site):
    nodes = site.nodes()
    nodes.follow()
    for _ in range(2):
        site.members().revoke("south")
        nodes.follow()
        site.members().allow("south", site.public("south"))
        nodes.follow()
    assert site.flower.calls[2:] == ["-south", "+south"] * 2
    assert nodes.of(1).node == 104 and read_nodes(site.path) == {101: 0, 104: 1}


def test_who_was_let_out_and_in_between_two_looks_keeps_its_node(site):
    nodes = site.nodes()
    nodes.follow()
    site.members().revoke("south")
    site.members().allow("south", site.public("south"))
    nodes.follow()
    assert site.flower.calls == ["+north", "+south"]


def test_another_key_is_another_node_and_another_name_is_not(site):
    nodes = site.nodes()
    nodes.follow()
    site.members().rename("north", "arctic")
    site.members().rotate("south", make_key(site.folder / "new.key").read_text())
    nodes.follow()
    assert read_nodes(site.path) == {101: 0, 103: 1} and site.flower.alive == {
        101: "north",
        103: "south",
    }


def test_a_number_that_another_has_now_is_another_node(site):
    nodes = site.nodes()
    nodes.follow()
    site.members().revoke("north")
    site.members().remove("north")
    site.members().allow("west", make_key(site.folder / "west.key").read_text())
    nodes.follow()
    assert nodes.of(0).node == 103 and site.flower.alive == {102: "south", 103: "west"}


def test_a_start_with_a_server_of_flower_that_knows_nobody_knows_all(site):
    site.nodes().follow()
    site.flower = Flower()  # its database was lost, or deleted
    nodes = site.nodes()
    nodes.follow()
    assert site.flower.calls == ["+north", "+south"] and nodes.of(0) is not None


def test_who_flower_forgot_is_told_anew(site):
    nodes = site.nodes()
    nodes.follow()
    del site.flower.alive[102]
    nodes.follow()
    assert nodes.of(1).node == 102
    nodes.doubt()
    nodes.follow()
    assert nodes.of(1).node == 103 and nodes.of(0).node == 101


def test_requests_are_signed_by_the_nodes_own_key_and_not_the_members(site):
    nodes = site.nodes()
    nodes.follow()
    said = dict(nodes.of(0).headers())
    key = bytes_to_public_key(base64.b64decode(said[b"flwr-public-key"]))
    signature = base64.b64decode(said[b"flwr-signature"])
    assert verify_signature(key, said[b"flwr-timestamp"], signature)
    assert key != site.members().key(0)


def test_what_fails_keeps_the_others_from_nothing_and_is_tried_again(site, monkeypatch):
    monkeypatch.setattr(flower_nodes, "RETRY", 0.0)
    nodes = site.nodes()
    site.flower.failing = ["north"]
    for _ in range(3):
        nodes.keep_following()
    assert site.flower.calls == ["+south"] and nodes.of(0) is None
    site.flower.failing = []
    nodes.keep_following()
    assert site.flower.calls == ["+south", "+north"]
    site.flower.failing = ["north"]
    site.members().revoke("north")
    nodes.keep_following()
    assert nodes.of(0) is None  # nothing of it is passed on, whatever Flower says
    site.flower.failing = []
    nodes.keep_following()
    assert site.flower.calls[2:] == ["-north"]
    reasons = [event["reason"] for event in events(site.folder, "nodes_failed")]
    assert len(reasons) == 2 and all("does not answer" in reason for reason in reasons)


def test_a_slip_in_the_list_ends_nothing(site, monkeypatch):
    monkeypatch.setattr(flower_nodes, "RETRY", 0.0)
    nodes = site.nodes()
    nodes.keep_following()
    path = site.folder / "members.toml"
    content = path.read_text()
    for wrong in (content + "[[member]\n", content + '[[member]]\nnam = "x"\n', "member = 5\n"):
        path.write_text(wrong)
        nodes.keep_following()
    assert nodes.of(0) is not None and nodes.of(1) is not None
    path.write_text(content)
    nodes.keep_following()
    (event,) = events(site.folder, "nodes_failed")
    assert "not TOML" in event["reason"]


def test_what_failed_is_not_tried_again_at_once(site, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(flower_nodes.time, "monotonic", lambda: now[0])
    nodes = site.nodes()
    site.flower.failing = ["north"]
    nodes.keep_following()
    site.flower.failing = []
    nodes.keep_following()
    assert site.flower.calls == ["+south"]
    now[0] += flower_nodes.RETRY
    nodes.keep_following()
    assert site.flower.calls == ["+south", "+north"]


def test_a_full_disk_keeps_nobody_out(site, monkeypatch):
    write, full = flower_nodes.write_atomically, [True]

    def write_atomically(path, *rest):
        if full:
            raise OutputError("No space left on device")
        write(path, *rest)

    monkeypatch.setattr(flower_nodes, "write_atomically", write_atomically)
    nodes = site.nodes()
    with pytest.raises(OutputError):
        nodes.follow()
    assert nodes.of(0) is not None
    full.clear()
    nodes.follow()
    assert site.flower.calls == ["+north", "+south"] and read_nodes(site.path) == {101: 0, 102: 1}


def test_a_damaged_list_of_nodes_is_of_nobody(site):
    site.path.write_text("[[")
    assert read_nodes(site.path) == {} and read_nodes(site.folder / "none") == {}
