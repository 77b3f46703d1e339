"""Whose a reply is: by its signature, or by the stream that it came over, and by nothing it says itself."""

from importlib.metadata import version

import pytest

from fedloom.engines.roster import Roster
from fedloom.envelope import Joined, ReplyHeader, RequestHeader, seal
from fedloom.errors import MessageError
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
