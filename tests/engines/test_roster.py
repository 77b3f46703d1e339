"""Whose a reply is: by its signature, or by the stream that it came over, and by nothing it says itself."""

from importlib.metadata import version

import pytest

from fedloom.engines.roster import Roster
from fedloom.envelope import Joined, ReplyHeader, RequestHeader, seal
from fedloom.errors import IdentityError, MessageError
from fedloom.identity import Members, make_key, read_key, sign

RUN = "a" * 32


@pytest.fixture
def site(tmp_path):
    lines = [make_key(tmp_path / f"{n}.key").read_text() for n in range(2)]
    for number, line in enumerate(lines):
        Members(tmp_path / "clients.toml").allow(f"site-{number}", line)
    roster = Roster(lambda: Members(tmp_path / "clients.toml"), (), model="m")

    def reply(client, by=None, **facts):
        header = ReplyHeader(run=RUN, began=1, client=client, round=0, number=1, **facts)
        key = read_key(tmp_path / f"{by}.key") if by is not None else None
        return seal(header, b"", key and (lambda text: sign(key, text)))

    return roster, reply


def asked(client=None):
    return RequestHeader(kind="join", run=RUN, began=[-1], client=client, number=1)


def test_a_signature_or_its_own_stream_says_whose_it_is(site):
    roster, reply = site
    assert roster.trusted(reply(1, by=1), asked(1)).client == 1
    assert roster.trusted(reply(1), asked(1), stream=1).client == 1


@pytest.mark.parametrize("stream", [None, 0])
@pytest.mark.parametrize("by", [None, 0])
@pytest.mark.parametrize("question", [None, 1])
def test_nobody_speaks_for_another(site, stream, by, question):
    roster, reply = site
    with pytest.raises(MessageError, match="not signed with the key of client 1"):
        roster.trusted(reply(1, by=by), asked(question), stream=stream)


def test_a_client_is_where_it_said_last(site):
    roster, reply = site
    joined = Joined(rows=3, held_out=1, model="m", version=version("fedloom"))
    for node in (10, 20):
        roster.welcome(node, reply(1, by=1, joined=joined), asked())
    assert roster.nodes == {1: 20} and list(roster.judged) == [1]
    assert roster.unknown({20, 30}) == [30]
    assert roster.unknown({30}) == [30] and roster.nodes == {}


def test_who_could_not_join_is_left_alone_for_a_while(site):
    roster, reply = site
    roster.welcome(10, reply(1, by=0), asked())
    roster.welcome(20, "Node Unavailable", asked())
    assert roster.unknown({10, 20, 30}) == [30] and sorted(roster.problems) == [10, 20]


def test_who_says_nothing_is_asked_again_each_time_later(site, monkeypatch):
    roster, reply = site
    now = 0.0
    monkeypatch.setattr("fedloom.engines.roster.time.monotonic", lambda: now)
    asked_at = []
    for second in range(300):
        now = float(second)
        for node in roster.unknown({10}):
            roster.asked(node)
            asked_at.append(second)
    assert asked_at == [0, 15, 45, 105, 225]
    joined = Joined(rows=3, held_out=1, model="m", version=version("fedloom"))
    roster.welcome(10, reply(1, by=1, joined=joined), asked())
    assert roster.unknown({10}) == []
    roster.lost(1)  # it is asked at once, and so is one that was away
    assert roster.unknown({10}) == [10]
    roster.asked(10)
    assert roster.unknown({10}) == [] and roster.unknown(set()) == []
    assert roster.unknown({10}) == [10]


def test_who_is_revoked_is_forgotten_and_his_stream_no_proof_any_more(site, tmp_path):
    roster, reply = site
    joined = Joined(rows=3, held_out=1, model="m", version=version("fedloom"))
    for client in (0, 1):
        roster.welcome(10 + client, reply(client, by=client, joined=joined), asked())
    assert roster.revoked() == []
    Members(tmp_path / "clients.toml").revoke("site-1")
    assert roster.revoked() == [1] and list(roster.joined) == [0] and roster.nodes == {0: 10}
    assert roster.revoked() == []


def test_a_slip_in_the_list_of_members_is_noted_once_and_ends_nothing(site, tmp_path):
    roster, reply = site
    notes = []
    roster.audit = lambda event, **facts: notes.append((event, facts["reason"]))
    sound = (tmp_path / "clients.toml").read_text()
    assert roster.trusted(reply(1, by=1), asked(1)).client == 1
    for broken in ("[[client", 'client = [{ nme = "x" }]', "client = 5", "client = [5]"):
        (tmp_path / "clients.toml").write_text(broken)
        for _ in range(2):
            assert roster.trusted(reply(1, by=1), asked(1)).client == 1
        (tmp_path / "clients.toml").write_text(sound)
        assert roster.revoked() == []
    assert [event for event, _ in notes] == ["unread_members"] * 4
    assert "clients.toml" in notes[0][1] and "nme" in notes[1][1]


def test_a_list_of_members_that_was_never_readable_is_an_error(tmp_path):
    (tmp_path / "clients.toml").write_text('client = [{ nme = "x" }]')
    roster = Roster(lambda: Members(tmp_path / "clients.toml"), ())
    with pytest.raises(IdentityError, match="nme"):
        roster.revoked()
