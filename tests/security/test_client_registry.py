"""Who is let in: one file, changed by commands that do not get into each other's way."""

import threading

import pytest

from fedloom.errors import IdentityError, OutputError, SettingsError
from fedloom.security.client_registry import Members, keys_in
from fedloom.security.keys import make_key


@pytest.fixture
def keys(tmp_path):
    """Public keys."""
    return [make_key(tmp_path / f"{n}.key").read_text() for n in range(4)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "members.toml"


def rows(path):
    return [(own.number, own.name, own.state) for own in Members(path).members]


def test_numbers_of_members_stay(path, keys):
    assert [Members(path).allow(f"site-{n}", keys[n]) for n in range(3)] == [0, 1, 2]
    assert Members(path).revoke("site-1").number == 1
    members = Members(path)
    assert members.key(1) is None and members.key(7) is None and members.key(2) is not None
    assert not members.is_allowed(1) and [own.number for own in members.allowed] == [0, 2]
    assert Members(path).allow("site-3", keys[3]) == 3  # not in the place of who is revoked
    assert Members(path).allow("site-1", keys[1]) == 1  # let in again, under its number
    assert Members(path).key(1) is not None
    assert members.allow("site-1", keys[1]) == 1 and members.is_allowed(1)  # as the file is now


def test_each_has_a_name_and_a_key_of_its_own(path, keys, tmp_path):
    Members(path).allow("site-0", keys[0])
    with pytest.raises(IdentityError, match="have the same key; each has one of its own"):
        Members(path).allow("other", keys[0])
    with pytest.raises(
        IdentityError, match=r"site-0 is member 0 with another key.*members rotate site-0"
    ):
        Members(path).allow("site-0", keys[1])
    with pytest.raises(IdentityError, match="no member has the name 'x'; there are: site-0"):
        Members(path).revoke("x")
    with pytest.raises(IdentityError, match="not a public key"):
        Members(path).allow("y", "nonsense")
    assert rows(path) == [(0, "site-0", "allowed")]


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a/b", "../x", "-x", "x" * 65, "a\nb", "\x1b[2J", "[red]"]
)
def test_what_is_no_name_is_refused(path, keys, name):
    with pytest.raises(IdentityError, match=r"member\.name"):
        Members(path).allow(name, keys[0])
    Members(path).allow("a", keys[0])
    with pytest.raises(IdentityError, match=r"member\.name"):
        Members(path).rename("a", name)
    assert rows(path) == [(0, "a", "allowed")]


@pytest.mark.parametrize("name", ["a", "site-1", "Klinikum.Süd_2", "x" * 64, "a@b.example"])
def test_names(path, keys, name):
    Members(path).allow(name, keys[0])
    assert Members(path).named(name).number == 0


def test_a_life(path, keys):
    members = Members(path)
    members.allow_all([("a", keys[0]), ("b", keys[1])])
    assert members.rename("a", "north").number == 0
    with pytest.raises(IdentityError, match="have the same name"):
        members.rename("b", "north")
    old = members.key(0)
    assert members.rotate("north", keys[2]).number == 0 and members.key(0) != old
    with pytest.raises(IdentityError, match="have the same key"):
        members.rotate("b", keys[2])
    with pytest.raises(IdentityError, match="revoke it first: `fedloom members revoke north`"):
        members.remove("north")
    members.withdraw("north")
    assert rows(path) == [(0, "north", "withdrawn"), (1, "b", "allowed")]
    assert members.remove("north").number == 0
    assert members.allow("c", keys[0]) == 0  # the number is free
    assert rows(path) == [(0, "c", "allowed"), (1, "b", "allowed")]
    assert Members(path).members[0].since[:2] == "20"


def test_of_several_all_or_none_are_let_in(path, keys, tmp_path):
    with pytest.raises(IdentityError, match="not a public key"):
        Members(path).allow_all([("a", keys[0]), ("b", "nonsense")])
    assert not path.exists()
    folder = tmp_path / "keys"
    folder.mkdir()
    with pytest.raises(OutputError, match="there is no public key"):
        keys_in(folder)
    for name in ("b", "a"):
        make_key(folder / f"{name}.key")
    assert Members(path).allow_all(keys_in(folder)) == [0, 1]
    assert [own.name for own in Members(path).members] == ["a", "b"]


def test_commands_at_the_same_time_lose_nothing(path, keys):
    failed = []

    def change(n):
        for _ in range(20):
            try:
                Members(path).allow(f"site-{n}", keys[n])
                return
            except OutputError:  # another is at it
                continue
        failed.append(n)

    threads = [threading.Thread(target=change, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(Members(path).members) == 4
    assert [own.number for own in Members(path).members] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ('[[member]]\nnam = "x"\n', IdentityError, "nam"),
        ("[[member", SettingsError, "TOML"),
        ("member = 5", IdentityError, "must hold tables"),
        ("member = [5]", IdentityError, "must hold tables"),
        ('[[member]]\nnumber = -1\nname = "a"\nkey = "k"\n', IdentityError, "number"),
        ('[[member]]\nnumber = 0\nname = "a"\nkey = "k"\nstate = "in"\n', IdentityError, "state"),
    ],
)
def test_a_damaged_list_is_not_taken_for_an_empty_one(path, content, error, words):
    path.write_text(content)
    with pytest.raises(error, match=words):
        Members(path)


def test_a_list_in_which_two_have_the_same_is_refused(path, keys):
    row = '[[member]]\nnumber = {}\nname = "{}"\nkey = "{}"\n'
    path.write_text(row.format(0, "a", "k") + row.format(0, "b", "l"))
    with pytest.raises(IdentityError, match=r"members\.toml: b and a have the same number"):
        Members(path)


def test_the_list_of_an_earlier_release_is_read_and_written_anew_with_the_next_change(path, keys):
    former = path.with_name("clients.toml")
    lines = [" ".join(key.split()[:2]) for key in keys]
    former.write_text(
        f'[[client]]\nname = "a"\nkey = "{lines[0]}"\nrevoked = false\n'
        f'[[client]]\nname = "b"\nkey = "{lines[1]}"\nrevoked = true\n'
    )
    assert rows(path) == [(0, "a", "allowed"), (1, "b", "revoked")] and not path.exists()
    assert Members(path).allow("c", keys[2]) == 2
    assert rows(path) == [(0, "a", "allowed"), (1, "b", "revoked"), (2, "c", "allowed")]
    former.unlink()
    assert len(Members(path).members) == 3
