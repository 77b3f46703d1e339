"""Members take part in runs under the numbers of clients."""

import pytest

from fedloom.deployment.participants import chosen, experiment_of, known
from fedloom.errors import SettingsError
from fedloom.federation.records import Participant
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key


@pytest.fixture
def members(tmp_path):
    own = Members(tmp_path / "members.toml")
    for name in ("a", "b", "c", "d"):
        own.allow(name, make_key(tmp_path / f"{name}.key").read_text())
    own.revoke("b")
    return own


@pytest.fixture
def read(tmp_path, members):
    """An experiment with such a [federation], and who takes part in it."""

    def make(text, *assignments):
        path = tmp_path / "x.toml"
        path.write_text(f"[federation]\n{text}\n")
        experiment = experiment_of(path, assignments, "x", "my.toml", members)
        return experiment, chosen(experiment, members)

    return make


def test_all_that_are_let_in_take_part_in_the_order_of_their_numbers(read):
    experiment, participants = read("rounds = 2")
    assert participants == [Participant(0, "a"), Participant(2, "c"), Participant(3, "d")]
    assert experiment.federation.clients == 3 and experiment.name == "x"


def test_those_that_are_named_take_part_in_that_order(read):
    experiment, participants = read('members = ["d", "a"]')
    assert participants == [Participant(3, "d"), Participant(0, "a")]
    assert experiment.federation.clients == 2
    assert read("", 'federation.members=["c"]')[1] == [Participant(2, "c")]


def test_as_many_as_the_members_are_may_be_drawn_for_a_round(read, members, tmp_path):
    for n in range(8):
        members.allow(f"more-{n}", make_key(tmp_path / f"{n}.key").read_text())
    assert read("clients_per_round = 11")[0].federation.clients == 11
    with pytest.raises(
        SettingsError, match=r"clients_per_round = 12 is above federation\.clients = 11"
    ):
        read("clients_per_round = 12")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "clients = 2",
            r"federation\.clients is 2, and 3 members are to take part \(a, c, d\): leave",
        ),
        ("clients = 4", "federation.clients is 4, and 3 members"),
        ('clients = 1\nmembers = ["a", "c"]', r"is 1, and 2 members are to take part \(a, c\)"),
        ('members = ["a", "b", "x"]', "'b' is not an allowed member; allowed are: a, c, d"),
        ('members = ["a", "a"]', "federation.members names a member twice"),
        ("members = []", "no member is allowed"),
        ("require = 9", "federation.require = 9, but there are federation.clients = 3"),
        ("require = 0", "federation.require"),
        ("require = 1.5", "federation.require"),
        ("require = true", "federation.require"),
        ('require = "some"', "federation.require"),
        ("members = 5", "federation.members"),
        ("round = 5", r"my\.toml has 1 mistake"),
    ],
)
def test_what_does_not_fit_the_members_is_told_before_anything_is_loaded(read, text, words):
    with pytest.raises(SettingsError, match=words):
        read(text)


def test_without_members_there_is_no_run(read, members):
    for name in ("a", "c", "d"):
        members.revoke(name)
    with pytest.raises(SettingsError, match="no member is allowed: `fedloom members allow"):
        read("")


def test_who_takes_part_is_known_again():
    rows = [{"client": 0, "number": 3, "name": "d"}, {"client": 1, "number": 0, "name": "a"}]
    assert known({"members": rows}) == [Participant(3, "d"), Participant(0, "a")]
    assert known({}) is None and known(None) is None
