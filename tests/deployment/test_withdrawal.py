"""Where the work of a member is, and what is without it."""

import json

import pytest

from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.withdrawal import works_of
from fedloom.security.audit_log import AuditLog
from fedloom.security.keys import make_key


@pytest.fixture
def home(tmp_path):
    own = ServerFolder(tmp_path / "server")
    own.path.mkdir()
    for name in ("north", "south"):
        own.members().allow(name, make_key(tmp_path / f"{name}.key").read_text())
    return own


@pytest.fixture
def played(home, tmp_path):
    """Make the folder of a run in which clients took part in these rounds."""
    log = AuditLog(home.path / "audit.jsonl")

    def make(name, clients, rounds, saved, adapter=None, rejected=None):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "experiment.toml").write_text("")
        members = [{"client": c, "number": n, "name": str(n)} for c, n in enumerate(clients)]
        (folder / "run.json").write_text(json.dumps({"members": members}))
        refused = [{"client": c, "reason": "late"} for c in rejected or []]
        lines = [{"round": r, "clients": c, "rejected": refused} for r, c in rounds.items()]
        (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for round in saved:
            (folder / "checkpoints" / f"round-{round:04d}").mkdir()
        if adapter:
            (folder / "summary.json").write_text(json.dumps({"adapter": {"sha256": adapter}}))
        log.record("run_folder", run="x", folder=str(folder))
        return folder

    return make


def test_runs_and_adapters_that_hold_its_work_are_named_with_what_is_without_it(home, played):
    all_of_it = {0: [], 1: [0, 1], 2: [0, 1], 3: [0, 1]}
    first = played("first", [0, 1], all_of_it, [0, 2, 3], adapter="f" * 64)
    late = played("late", [1, 0], {0: [], 1: [0], 2: [0], 3: [0, 1], 4: [0]}, [0, 1, 2, 3, 4])
    played("other", [0], {0: [], 1: [0]}, [0])
    played("refused", [0, 1], {0: [], 1: [0, 1]}, [0], rejected=[1])
    gone = played("gone", [0, 1], all_of_it, [0])
    for path in gone.rglob("*"):
        if path.is_file():
            path.unlink()
    one, two = works_of(home, home.members().named("south"))
    assert (one.folder, one.client, one.rounds, one.checkpoint) == (first, 1, [1, 2, 3], 0)
    assert (two.folder, two.client, two.rounds, two.checkpoint) == (late, 0, [1, 2, 3, 4], 0)
    assert f"{first}: in 3 rounds, 1 to 3, and in its adapter (SHA-256 ffffffffffff)" in one.text()
    assert f"fedloom run --resume {first} --from-round 0 --engine flower" in one.text()
    (north,) = [own for own in works_of(home, home.members().named("north")) if own.folder == late]
    assert north.rounds == [3] and north.checkpoint == 2 and "in round 3;" in north.text()


def test_where_nothing_saved_is_without_it_the_run_is_begun_anew(home, played):
    folder = played("first", [0, 1], {1: [0, 1], 2: [0, 1]}, [1, 2])
    (work,) = works_of(home, home.members().named("south"))
    assert work.checkpoint is None and work.others == ("north",)
    anew = f"fedloom run {folder}/experiment.toml --set 'federation.members=[\"north\"]' --set "
    anew += f"federation.clients=1 --set output.folder={folder}-without-client-1 --engine flower"
    assert anew in work.text()
    assert works_of(home, home.members().named("north").model_copy(update={"number": 9})) == []


def test_runs_that_started_from_its_work_are_named(home, played):
    first = played("first", [0, 1], {0: [], 1: [0, 1]}, [0])
    second, third = (played(name, [0], {0: [], 1: [0]}, [0]) for name in ("second", "third"))
    played("other", [0], {0: [], 1: [0]}, [0])
    for folder, id, start in ((first, "a", None), (second, "b", "a"), (third, "c", "b")):
        record = json.loads((folder / "run.json").read_text())
        began = start and {"run": start}
        (folder / "run.json").write_text(json.dumps({**record, "id": id, "start": began}))
    (work,) = works_of(home, home.members().named("south"))
    assert work.started == (second, third)
    assert f"to be started again from what is without it: {second}, {third}" in work.text()
