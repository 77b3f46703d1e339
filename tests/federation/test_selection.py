"""Who is drawn for a round: by hand, the same bits as before, and one error for each mistake."""

import json
import sys

import numpy as np
import pytest

import fedloom
from fedloom.errors import PluginError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.presence import Membership, Presence
from fedloom.federation.selection import (
    SELECTIONS,
    Poisson,
    UniformSettings,
    draw,
    draw_candidates,
    make_selection,
)
from fedloom.randomness import generator


def drawn(name, presence, size, round=1, **settings):
    own = SELECTIONS[name][0](name=name, **settings)
    return draw(make_selection(own), presence, size, 5, round)


def test_uniform_draws_the_bits_of_earlier_releases():
    there = tuple(range(3, 400, 3))
    presence = Presence.of(dict.fromkeys(there, 4))
    for round in range(1, 40):
        rng = generator(5, "cohort", round=round)
        before = rng.choice(there, size=20, replace=False)
        assert drawn("uniform", presence, 20, round) == tuple(sorted(before.tolist()))
    assert drawn("uniform", presence, 1000) == there


def test_secret_coins_go_by_ids_and_not_by_the_seed_or_who_else_is_a_member():
    """Coins of round 2 for the ids 0 to 7 by hand: below 0.5 are those of 1, 4 and 7."""
    coins = {2: [0.9, 0.1, 0.5, 0.7, 0.2, 0.6, 0.8, 0.4999]}
    asked = []

    def secret(round, n):
        asked.append((round, n))
        return np.array(coins[round][:n])

    selection = Poisson(0.5, secret)
    selection.begin(2, {})
    for members, wanted in (
        (range(8), (1, 4, 7)),
        ((1, 2, 7), (1, 7)),
        ((0, 3, 4), (4,)),
        ((3,), ()),
    ):
        presence = Presence.of(dict.fromkeys(members, 4))
        assert draw(selection, presence, 3, 5, 2) == draw(selection, presence, 3, 6, 2) == wanted
    assert asked[::2] == [(2, 8), (2, 8), (2, 5), (2, 4)]


def test_rows_draws_in_proportion_to_them():
    """Of 1, 2 and 5 rows the first drawn is that of 5 in 5/8 of all rounds, give or take 4 deviations."""
    presence = Presence.of({2: 1, 4: 2, 7: 5})
    found = [drawn("rows", presence, 1, round)[0] for round in range(1, 2001)]
    for client, share in ((2, 1 / 8), (4, 2 / 8), (7, 5 / 8)):
        deviation = np.sqrt(2000 * share * (1 - share))
        assert abs(found.count(client) - 2000 * share) < 4 * deviation
    pairs = [drawn("rows", presence, 2, round) for round in range(1, 2001)]
    least = 1 / 8 * (2 / 7 + 5 / 7) + 2 / 8 * (1 / 6) + 5 / 8 * (1 / 3)  # 2 is first, or second
    assert abs(sum(2 in pair for pair in pairs) / 2000 - least) < 4 * np.sqrt(
        least * (1 - least) / 2000
    )


def test_availability_takes_those_first_that_were_heard_of_longest_ago_or_never():
    presence = Presence.of(dict.fromkeys(range(6), 4))
    presence = presence.closed(1, (0, 1), (2,)).closed(2, (3, 0), ())
    assert {drawn("availability", presence, 3, r) for r in range(1, 30)} == {(2, 4, 5)}
    ones = {drawn("availability", presence, 4, r) for r in range(1, 30)}
    assert ones == {(1, 2, 4, 5)}  # 1 answered in round 1, 0 and 3 in round 2
    assert len({drawn("availability", presence, 1, r) for r in range(1, 30)}) == 3


def test_availability_may_take_those_first_that_stayed():
    everybody = Membership(tuple(range(5)), rows=dict.fromkeys(range(5), 4))
    presence = Presence().begun(1, everybody, range(5), {}).closed(1, (0, 1, 3), ())
    presence = presence.begun(2, everybody, {0, 2, 3, 4}, {}).closed(2, (0,), (3,))
    presence = presence.begun(3, everybody, range(5), {})
    for round in range(1, 20):  # 1 was away, 3 failed, 2 and 4 never answered
        assert 0 in drawn("availability", presence, 1, round, prefer="steady")
    assert len({drawn("availability", presence, 2, r, prefer="steady") for r in range(1, 40)}) == 4


def test_a_presence_in_one_process_is_that_of_going_through_all_clients():
    rows = {client: client + 1 for client in range(50)}
    everybody = Membership(tuple(rows), rows=rows)
    short, whole = Presence(), Presence()
    for round, asked in enumerate(((1, 2), (2, 49), (0,)), 1):
        short = short.begun(round, everybody, rows, {})
        whole = whole.begun(round, everybody, set(rows), {})
        assert short == whole and short.available is everybody.enrolled
        short, whole = (own.closed(round, asked, (7,)) for own in (short, whole))
    assert short.to_table() == whole.to_table()
    assert "rows" not in short.to_table(rows=False)
    assert short.without((0, 3)).available == (1, 2, *range(4, 50))
    assert short.are_available((0, 49)) and not short.are_available((0, 50))


OWN = """
from fedloom.federation.selection import Selection
from fedloom.settings.schema import NamedSettings

class LastSettings(NamedSettings):
    step: int = 1

class Last(Selection):
    Settings = LastSettings
    def draw(self, presence, size, rng):
        return presence.available[::-self.settings.step][:size]

class Twice(Selection):
    def draw(self, presence, size, rng):
        return [presence.available[0]] * size

class Nobody(Selection):
    def draw(self, presence, size, rng):
        return None

class Asking(Last):
    def candidates(self, presence, size, rng):
        import numpy as np

        return np.array([0, 9])

class Without(Selection):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "chosen.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("chosen", None)


def test_a_class_of_the_users(own):
    presence = Presence.of(dict.fromkeys(range(9), 4))
    assert drawn("chosen:Last", presence, 3, step=2) == (4, 6, 8)
    with pytest.raises(
        PluginError, match=r"Twice\.draw returned \[0, 0\]: it must return 2 different"
    ):
        drawn("chosen:Twice", presence, 2)
    with pytest.raises(PluginError, match=r"Nobody\.draw returned None"):
        drawn("chosen:Nobody", presence, 2)
    asking = make_selection(SELECTIONS["chosen:Asking"][0](name="chosen:Asking"))
    with pytest.raises(PluginError, match=r"Asking\.candidates returned array.*some different"):
        draw_candidates(asking, presence, 2, 5, 1)


@pytest.mark.parametrize(
    ("selection", "told"),
    [
        ("rowz", "selection.name = 'rowz': did you mean 'rows'?"),
        ("oort", "selection.rows = 2"),
        ({"name": "rows", "prefer": "rare"}, "selection.prefer is a setting of availability"),
        ({"name": "availability", "prefer": "x"}, "selection.prefer = 'x': allowed: rare, steady"),
        ("nowhere:Last", "selection.name = 'nowhere:Last': there is no module nowhere here"),
        ("chosen:Lost", "selection.name = 'chosen:Lost': module chosen has no class 'Lost'"),
        ("chosen:Without", "it must define draw"),
        ({"name": "chosen:Last", "step": "two"}, "selection.step = 'two'"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_mistakes_are_told_in_one_line(own, selection, told, earlier):
    """In [selection], and in federation.selection of older files."""
    if selection == "oort":
        selection = {"name": "oort", "rows": 2}
    named = {"name": selection} if isinstance(selection, str) else selection
    table = {"federation": {"selection": selection}} if earlier else {"selection": named}
    with pytest.raises(SettingsError) as raised:
        Experiment.from_table(table)
    assert len(raised.value.problems) == 1 and told in raised.value.problems[0]


@pytest.mark.parametrize("selection", [3, {"prefer": "rare"}, ["rows"]])
def test_what_is_no_selection_of_an_older_file_is_told(selection):
    with pytest.raises(SettingsError, match="must be a name, or a table with one"):
        Experiment.from_table({"federation": {"selection": selection}})


def test_older_files_say_it_in_federation_and_no_file_says_it_twice():
    older = Experiment.from_table({"federation": {"selection": "rows", "clients": 4}})
    newer = Experiment.from_table({"federation": {"clients": 4}, "selection": {"name": "rows"}})
    assert older.to_table() == newer.to_table() and newer.selection.name == "rows"
    assert older.notes == ("federation.selection is read as the section [selection], its new name",)
    table = {"federation": {"selection": {"name": "availability", "prefer": "steady"}}}
    assert Experiment.from_table(table).selection.prefer == "steady"
    with pytest.raises(SettingsError, match=r"\[selection\] too, which is its new name"):
        Experiment.from_table({**table, "selection": {"name": "rows"}})
    assert "selection" not in Experiment().to_table(defaults=False)
    assert Experiment.from_table(newer.to_table(defaults=False)) == newer


def test_a_client_imports_no_selection_of_a_server(own):
    table = {"selection": {"name": "chosen:Without"}}
    asked = Experiment.from_table(table, importable=lambda section, name: False)
    assert "chosen" not in sys.modules and asked.selection == UniformSettings()


def test_a_run_records_its_selection_and_asks_those_that_it_draws(experiment, own):
    federation = {"clients": 4, "clients_per_round": 2, "rounds": 2}
    chosen = {"name": "availability"}
    result = fedloom.run(experiment(federation=federation, selection=chosen))
    rounds = map(json.loads, (result.folder / "rounds.jsonl").read_text().splitlines())
    asked = [client for record in rounds for client in record["clients"]]
    assert sorted(asked) == [0, 1, 2, 3]  # nobody twice before everybody once
    assert json.loads((result.folder / "run.json").read_text())["selection"] == {
        "name": "availability",
        "prefer": "rare",
    }
    chosen = {"name": "chosen:Last", "step": 3}
    other = {"folder": str(result.folder.parent / "other")}
    again = fedloom.run(experiment(federation=federation, selection=chosen, output=other))
    rounds = map(json.loads, (again.folder / "rounds.jsonl").read_text().splitlines())
    assert [record["clients"] for record in rounds] == [[], [0, 3], [0, 3]]
    run = json.loads((again.folder / "run.json").read_text())
    assert run["plugins"]["selection"]["name"] == "Last"
