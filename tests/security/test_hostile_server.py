"""A hostile server's experiments against an honest client with the default policy.

Nothing is read but the named columns of the named file, nothing is computed beyond the bounds, and the
replies do not tell what is there from what is not. It is asked in a process of its own, whose every `open`
is overheard (``hostile_experiments.py``).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.deployment.error_report import LINES
from fedloom.security.keys import make_key
from security.hostile_experiments import ACCEPTED, PROBES, REFUSED

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(model_folder, tmp_path_factory):
    """What became of it: a client's rows with columns that it does not name, and what else lies there."""
    folder = tmp_path_factory.mktemp("client")
    for name in ("model", "other", "evil"):
        shutil.copytree(model_folder, folder / name)
    config = json.loads((folder / "evil" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "evil" / "config.json").write_text(json.dumps(config))
    (folder / "evil" / "own.py").write_text(f"open({str(folder / 'marker')!r}, 'w')\n")
    rows = [
        {
            "question": f"Who is {i}?", "good": f"It is {i}.", "bad": "No idea.",
            "ssn": f"S-{i}", "notes": f"HIV-{i}",
        }
        for i in range(40)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    secret = text.replace("question", "prompt").replace("good", "chosen").replace("bad", "rejected")
    (folder / "secret.jsonl").write_text(secret.replace("Who is", "Hush"))
    make_key(folder / "client.key")
    environment = {
        **os.environ, "FEDLOOM_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(
            [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, TESTS / "security" / "hostile_experiments.py", folder],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


def test_there_are_enough():
    assert len(ACCEPTED) + len(REFUSED) > 40


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_chooses_rows_or_models_has_no_effect(found, name):
    one, folder = found["accepted"][name], str(found["folder"])
    assert one["error"] is None
    assert (
        one["rows"] == 40 and one["max_length"] == 256
    )  # all: clients are not judged by their own
    assert "Who is" in one["texts"] and not any(one["columns"])
    for secret in ("S-", "HIV", "Hush"):
        assert secret not in one["texts"]
    named = (f"{folder}/rows.jsonl", f"{folder}/model", f"{folder}/one/", f"{folder}/cache")
    read = [path for path in one["opened"] if path.startswith(folder)]
    assert f"{folder}/rows.jsonl" in read
    assert all(path.startswith(named) for path in read), read
    assert not any(path.startswith(("/etc/passwd", "/home")) for path in one["opened"])


@pytest.mark.parametrize("name", [*REFUSED, "classes"])
def test_what_is_beyond_the_bounds_is_refused_by_its_line_and_costs_nothing(found, name):
    one, folder = found["refused"][name], str(found["folder"])
    line = REFUSED[name][0] if name in REFUSED else "policy.max_width"
    assert one["told"] == f"{line}: {LINES[line]}"
    own = (f"{folder}/one/", f"{folder}/rows.jsonl", f"{folder}/worker.log", f"{folder}/cache")
    assert all(p.startswith(own) for p in one["opened"] if p.startswith(folder)), one["opened"]
    rows = f"{folder}/rows.jsonl" in one["opened"]
    assert not rows or line == "policy.max_steps"  # whose count is known by the rows alone
    assert one["seconds"] < 2


def test_all_of_them_together_train_nothing_and_take_no_memory(found):
    assert found["steps"] == 0
    assert found["memory"] < 50 * 1024  # KiB


@pytest.mark.parametrize("name", PROBES)
def test_replies_do_not_tell_what_is_there_from_what_is_not(found, name):
    for who, replies in found["probes"][name].items():
        assert len(replies) > 1 and len(set(replies)) == 1, (who, replies)
        assert str(found["folder"]) not in replies[0] and "passwd" not in replies[0]
    errors = {
        who: json.loads(replies[0]).get("error") for who, replies in found["probes"][name].items()
    }
    assert "data: this client offers no rows" in errors["three"]
    if name == "model.path":
        assert errors["one"] is None and errors["two"].startswith("policy.models: ")


def test_nothing_is_connected_to_started_written_or_run(found):
    assert found["connected"] == []
    assert not found["written"] and not (found["folder"] / "marker").exists()


def test_the_clients_own_log_says_everything(found):
    log = (found["folder"] / "worker.log").read_text()
    for said in (
        "adapter.rank = 10000000 is above 256",
        "model.path = '/etc/passwd'",
        "1000000000 batches",
    ):
        assert said in log
