"""Whose a reply is: by its signature, or by the stream that it came over, and by nothing it says itself."""

import pytest

from fedloom.engines.flower.run_clients import ASKED, GONE, REVOKED, UNSEEN, RunClients
from fedloom.errors import IdentityError, MessageError
from fedloom.federation.records import Absence, Participant
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key, read_key, sign
from fedloom.wire.envelope import PROTOCOL, Joined, ReplyHeader, RequestHeader, seal

RUN = "a" * 32


@pytest.fixture
def site(tmp_path):
    lines = [make_key(tmp_path / f"{n}.key").read_text() for n in range(3)]
    for number, line in enumerate(lines):
        Members(tmp_path / "members.toml").allow(f"site-{number}", line)
    owners = {10: 0, 20: 1, 30: 7, 40: 2}
    roster = RunClients(
        lambda: Members(tmp_path / "members.toml"),
        [Participant(number, f"site-{number}") for number in range(3)],
        owners=lambda: owners,
        model="m",
    )

    def reply(client, by=None, **facts):
        header = ReplyHeader(run=RUN, began=1, client=client, round=0, number=1, **facts)
        key = read_key(tmp_path / f"{by}.key") if by is not None else None
        return seal(header, b"", key and (lambda text: sign(key, text)))

    return roster, reply


def asked(client):
    return RequestHeader(kind="join", run=RUN, began=[-1], client=client, number=1)


def test_a_signature_or_its_own_stream_says_whose_it_is(site):
    roster, reply = site
    assert roster.trusted(reply(1, by=1), asked(1)).client == 1
    assert roster.trusted(reply(1), asked(1), stream=1).client == 1


@pytest.mark.parametrize("stream", [None, 0])
@pytest.mark.parametrize("by", [None, 0])
@pytest.mark.parametrize("question", [0, 1])
def test_nobody_speaks_for_another(site, stream, by, question):
    roster, reply = site
    with pytest.raises(MessageError, match="not signed with the key of client 1"):
        roster.trusted(reply(1, by=by), asked(question), stream=stream)


def ready(**facts):
    return Joined(rows=3, held_out=1, model="m", version="0", protocol=PROTOCOL, **facts)


def test_a_client_is_where_it_said_last(site):
    roster, reply = site
    for node in (10, 20):
        roster.register(node, reply(1, by=1, joined=ready()), asked(1))
    assert roster.nodes == {1: 20} and list(roster.judged) == [1]
    assert roster.unknown({20, 40}) == {40: 2}
    assert roster.unknown({40}) == {40: 2} and roster.nodes == {}


def test_who_is_not_expected_is_not_asked(site):
    roster, _ = site
    assert roster.unknown({10, 30, 50}) == {10: 0}  # 30 is of a member that this run is not for


def test_a_clients_number_is_its_place_in_the_run(tmp_path):
    members = Members(tmp_path / "members.toml")
    for name in ("a", "b", "c"):
        members.allow(name, make_key(tmp_path / f"{name}.key").read_text())
    roster = RunClients(
        lambda: members,
        [Participant(2, "c"), Participant(0, "a")],
        owners=lambda: {5: 0, 6: 1, 7: 2},
    )
    assert roster.unknown({5, 6, 7}) == {5: 1, 7: 0}
    header = ReplyHeader(run=RUN, began=1, client=0, round=0, number=1)
    for name, sound in (("c", True), ("a", False)):
        key = read_key(tmp_path / f"{name}.key")
        reply = seal(header, b"", lambda text, key=key: sign(key, text))
        if sound:
            assert roster.trusted(reply, asked(0)).client == 0
        else:
            with pytest.raises(MessageError, match="client 0"):
                roster.trusted(reply, asked(0))
    outside = seal(header.model_copy(update={"client": 2}), b"", lambda text: sign(key, text))
    with pytest.raises(MessageError, match="client 2"):
        roster.trusted(outside, asked(0))


def test_who_could_not_join_is_left_alone_for_a_while(site):
    roster, reply = site
    roster.register(10, reply(0, by=1), asked(0))
    roster.register(20, "Node Unavailable", asked(1))
    assert roster.unknown({10, 20, 40}) == {40: 2}
    assert {c: own.reason for c, own in roster.absent().items()} == {
        0: "it is not signed with the key of client 0",
        1: "Node Unavailable",
        2: UNSEEN,
    }


def test_a_client_with_another_file_of_a_class_is_told(site):
    roster, reply = site
    roster.plugins = {"method": "a" * 64, "objective": "b" * 64}
    both = {"method": "a" * 64, "objective": "b" * 64, "other": "c" * 64}
    roster.register(10, reply(0, by=0, joined=ready(plugins=both)), asked(0))
    roster.register(
        20, reply(1, by=1, joined=ready(plugins={**both, "method": "d" * 64})), asked(1)
    )
    roster.register(40, reply(2, by=2, joined=ready(plugins={"method": "a" * 64})), asked(2))
    told = "give both the same file, then restart the client"
    assert roster.nodes == {0: 10}
    assert {c: own.reason for c, own in roster.absent().items()} == {
        1: f"its file of method.name is another one: SHA-256 {'d' * 12}, the server's is {'a' * 12}: {told}",
        2: f"its file of objective.name is another one: SHA-256 unknown, the server's is {'b' * 12}: {told}",
    }


def test_another_protocol_is_told_apart_from_another_release(site):
    roster, reply = site
    old = Joined(rows=3, held_out=1, model="m", version="0.0.9")
    roster.register(20, reply(1, by=1, joined=old), asked(1))
    assert "has fedloom 0.0.9 (protocol 1), the server" in roster.absent()[1].reason
    assert "upgrade the older one" in roster.absent()[1].reason
    roster.register(20, reply(1, by=1, joined=ready()), asked(1))  # of release 0
    assert 1 not in roster.absent()


def test_who_says_nothing_is_asked_again_within_the_patience_of_a_run(site, monkeypatch):
    roster, reply = site
    now = 0.0
    monkeypatch.setattr("fedloom.engines.flower.run_clients.time.monotonic", lambda: now)
    asked_at = []
    for second in range(300):
        now = float(second)
        for node, client in roster.unknown({20}).items():
            roster.asked(node, client)
            asked_at.append(second)
    assert asked_at == [0, 15, *range(45, 300, 30)]
    assert roster.absent()[1].reason == ASKED
    roster.register(20, reply(1, by=1, joined=ready()), asked(1))
    assert roster.unknown({20}) == {} and 1 not in roster.absent()
    roster.lost(1, "its connection broke")  # it is asked at once, and so is one that was away
    assert roster.unknown({20}) == {20: 1}
    roster.asked(20, 1)
    assert roster.unknown({20}) == {} and roster.unknown(set()) == {}
    assert roster.unknown({20}) == {20: 1}


def test_an_absence_has_the_last_reason_and_the_moment_when_it_began(site, monkeypatch):
    roster, reply = site
    now = 1000.0
    monkeypatch.setattr("fedloom.engines.flower.run_clients.time.time", lambda: now)
    roster.register(20, reply(1, by=1, joined=ready()), asked(1))
    assert 1 not in roster.absent()
    now = 2000.0
    roster.lost(1, "its connection broke")
    now = 2001.0
    assert roster.absent()[1] == Absence(2000.0, "its connection broke")
    roster.unknown({10})  # its node is not online any more
    assert roster.absent()[1] == Absence(2000.0, GONE)
    roster.register(20, "its model cannot be loaded", asked(1))
    assert roster.absent()[1] == Absence(2000.0, "its model cannot be loaded")
    roster.register(20, reply(1, by=1, joined=ready()), asked(1))
    assert 1 not in roster.absent({1})
    attendance = roster.attendance()
    assert attendance[1] == {
        "client": 1, "number": 1, "name": "site-1", "since": None, "reason": "",
    }  # fmt: skip
    assert attendance[0]["reason"] == UNSEEN


def test_who_is_revoked_is_forgotten_and_his_stream_no_proof_any_more(site, tmp_path):
    roster, reply = site
    for client in (0, 1):
        answer = reply(client, by=client, joined=ready())
        roster.register(10 + 10 * client, answer, asked(client))
    assert roster.revoked() == []
    members = Members(tmp_path / "members.toml")
    members.revoke("site-1")
    assert roster.revoked() == [1] and list(roster.registered) == [0] and roster.nodes == {0: 10}
    assert roster.revoked() == [] and roster.absent()[1].reason == REVOKED
    members.allow("site-1", (tmp_path / "1.pub").read_text())
    assert roster.revoked() == [] and roster.absent()[1].reason == GONE


def test_a_slip_in_the_list_of_members_is_noted_once_and_ends_nothing(site, tmp_path):
    roster, reply = site
    notes = []
    roster.audit = lambda event, **facts: notes.append((event, facts["reason"]))
    sound = (tmp_path / "members.toml").read_text()
    assert roster.trusted(reply(1, by=1), asked(1)).client == 1
    for broken in ("[[member", 'member = [{ nme = "x" }]', "member = 5", "member = [5]"):
        (tmp_path / "members.toml").write_text(broken)
        for _ in range(2):
            assert roster.trusted(reply(1, by=1), asked(1)).client == 1
        (tmp_path / "members.toml").write_text(sound)
        assert roster.revoked() == []
    assert [event for event, _ in notes] == ["unread_members"] * 4
    assert "members.toml" in notes[0][1] and "nme" in notes[1][1]


def test_a_list_of_members_that_was_never_readable_is_an_error(tmp_path):
    (tmp_path / "members.toml").write_text('member = [{ nme = "x" }]')
    roster = RunClients(lambda: Members(tmp_path / "members.toml"), ())
    with pytest.raises(IdentityError, match="nme"):
        roster.revoked()
