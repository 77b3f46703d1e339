"""Pages from run folders: self-contained, escaped, and honest about what is missing."""

import json
import re
import shutil

import pytest

import fedloom
from fedloom.errors import OutputError
from fedloom.experiment.experiment import Experiment
from fedloom.reports.run_data import read_run
from fedloom.reports.run_page import render, write_report
from fedloom.storage.run_folder import RunFolder


@pytest.fixture
def folder(experiment, once, tmp_path):
    """A copy of the folder of a run."""
    built = experiment(partition={"kind": "dirichlet", "column": "domain"})
    made = once("run", lambda: fedloom.run(built).folder)
    return shutil.copytree(made, tmp_path / "copy")


def test_one_run(folder):
    page = write_report([folder]).read_text()
    assert page.count("<svg") == 7 and "</html>" in page
    assert "measured" in page and "derived" in page
    made = Experiment.from_toml(folder / "experiment.toml").output.folder
    assert f"fedloom run {made}/experiment.toml" in page
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['after']:.3f}" in page and summary["adapter"]["sha256"][:16] in page


def test_a_page_says_what_became_of_pairs(experiment):
    result = fedloom.run(experiment(objective={"name": "kto"}, partition={"feedback": "spread"}))
    page = render([read_run(result.folder)])
    assert "dealt over all clients (KTOR)" in page and "expected by chance" in page


def test_the_page_needs_no_network(folder):
    page = write_report([folder]).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page and "<script src" not in page and "url(http" not in page


def test_what_models_and_data_say_is_escaped(folder):
    evil = "<script>alert(1)</script>"
    samples = [
        {
            "prompt": evil,
            "before": evil,
            "after": evil,
            "wanted": evil,
            "unwanted": None,
            "group": evil,
        }
    ]
    RunFolder(folder).write_json("samples.json", samples)
    partition = json.loads((folder / "partition.json").read_text())
    partition["values"].append("<img src=x onerror=alert(1)>")
    RunFolder(folder).write_json("partition.json", partition)
    rounds = (
        (folder / "rounds.jsonl")
        .read_text()
        .replace('"rejected": []', json.dumps({"rejected": [{"client": 1, "reason": evil}]})[1:-1])
    )
    violation = {"client": 1, "kind": evil, "reason": evil, "count": 2}
    rounds = rounds.replace('"offences": []', json.dumps({"offences": [violation]})[1:-1])
    gone = [{"client": 1, "since": evil, "reason": evil}]
    rounds = rounds.replace('"absent": []', json.dumps({"absent": gone})[1:-1])
    rounds = rounds.replace('"weighed": {}', json.dumps({"weighed": {evil: [3.0, 2]}})[1:-1])
    (folder / "rounds.jsonl").write_text(rounds)
    page = write_report([folder]).read_text()
    assert page.count("<script") == 1 and "<img" not in page  # the script is the page's own
    assert page.count("&lt;script&gt;") >= 8


def test_offences_are_shown_by_client_and_answers_left_out_are_not_without_end(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    of = {"client": 1, "kind": "out_of_range", "reason": "it was -7", "count": 2}
    last |= {"round": 2, "offences": [of, {**of, "kind": "forged", "count": 1}]}
    last["rejected"] = [{"client": 1, "reason": f"reason {n}"} for n in range(130)]
    later = {**last, "round": 3, "offences": [of], "rejected": [], "paused": {"1": 9}}
    text = "\n".join([*lines[:-1], json.dumps(last), json.dumps(later)])
    (folder / "rounds.jsonl").write_text(text + "\n")
    page = write_report([folder]).read_text()
    row = "<td>1</td><td>forged 1, out of range 4</td><td>2</td><td>1</td><td>it was -7</td>"
    assert row in page
    assert "reason 99" in page and "reason 100" not in page
    assert "30 more answers were left out" in page


def test_who_was_missing_is_shown_with_rounds_and_reason(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    away = {"client": 1, "since": "2026-01-02T03:04:05+00:00", "reason": "no <rows>"}
    records = [{**last, "round": n, "absent": [away] if n != 4 else []} for n in (2, 3, 4, 5)]
    records[3]["absent"].append({**away, "client": 0, "reason": "not connected"})
    text = "\n".join([*lines[:-1], *map(json.dumps, records)])
    (folder / "rounds.jsonl").write_text(text + "\n")
    run = json.loads((folder / "run.json").read_text())
    run["members"] = [{"client": 1, "number": 7, "name": "south"}]
    RunFolder(folder).write_json("run.json", run)
    page = write_report([folder]).read_text()
    row = "<tr><td>1</td><td>south</td><td>2 to 3, 5</td><td>2026-01-02T03:04:05+00:00</td>"
    assert row + "<td>no &lt;rows&gt;</td></tr>" in page
    assert "<tr><td>0</td><td></td><td>5</td>" in page


def test_a_run_that_was_stopped_says_so(folder):
    (folder / "summary.json").unlink()
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "cli')  # torn by a kill
    page = write_report([folder]).read_text()
    assert "This run has not finished" in page and "round 2 of 2" in page


def test_a_run_without_any_round_still_gives_a_page(folder):
    for name in ("summary.json", "rounds.jsonl", "costs.jsonl"):
        (folder / name).unlink()
    assert "Nothing has been evaluated yet" in write_report([folder]).read_text()


def test_rejected_clients_and_dropped_rows_are_shown(folder):
    run = json.loads((folder / "run.json").read_text())
    run["data"] |= {
        "malformed": 2,
        "bad_rows": ["x.jsonl row 7: label"],
        "dropped": {"no completion": 3},
    }
    del run["data"]["account"]  # as in folders of earlier versions
    RunFolder(folder).write_json("run.json", run)
    page = write_report([folder]).read_text()
    assert (
        "2 malformed rows" in page
        and "x.jsonl row 7" in page
        and "3 rows dropped: no completion" in page
    )


def test_the_account_of_rows_is_shown(folder):
    run = json.loads((folder / "run.json").read_text())
    account = run["data"]["account"]["source"]
    account |= {"rows": 4321, "dropped": {"not among <b>": 7}, "unaccounted": 0}
    run["data"]["account"]["warnings"] = ["mind <this>"]
    RunFolder(folder).write_json("run.json", run)
    page = write_report([folder]).read_text()
    assert "What became of the rows" in page and "<td>read</td><td>4\u202f321</td>" in page
    assert "<td>dropped: not among &lt;b&gt;</td><td>7</td>" in page
    assert "mind &lt;this&gt;" in page and "unaccounted for" not in page


@pytest.mark.slow
def test_several_runs_are_compared(experiment, tmp_path):
    folders = []
    for seed in (0, 1):
        for method in ("fedavg", "local_only"):
            output = {"folder": str(tmp_path / f"{method}-{seed}")}
            own = {
                "federation": {"seed": seed, "rounds": 1},
                "data": {"builtin_rows": 30},
                "output": output,
            }
            built = experiment(method={"name": method}, **own)
            folders.append(fedloom.run(built).folder)
    page = write_report(folders, tmp_path / "all.html").read_text()
    assert "4 runs compared" in page and "Over seeds" in page
    assert "not estimable from 2 seeds: needs at least 5" in page and "±" not in page
    for folder in folders:
        assert folder.name in page


@pytest.mark.slow
def test_many_clients_and_values_become_a_heat_map(experiment):
    built = experiment(
        objective={"name": "classification"},
        data={"source": "builtin:labelled", "builtin_rows": 300},
        partition={"kind": "dirichlet", "column": "label"},
        federation={"clients": 45, "rounds": 1},
        evaluation={"per_client": False},
    )
    page = write_report([fedloom.run(built).folder]).read_text()
    assert "<image" in page or "pcolormesh" in page or "label: 8 values" in page


def test_bad_folders(tmp_path, folder):
    with pytest.raises(OutputError, match="no run folder at"):
        write_report([tmp_path / "gone"])
    (folder / "run.json").unlink()
    with pytest.raises(OutputError, match="stopped before it began"):
        write_report([folder])
    (folder / "run.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        write_report([folder])


def test_a_page_of_many_clients_is_small_and_searched(folder):
    """Rows are data of which the page draws what is searched; text of the data ends no script."""
    many = 2000
    partition = json.loads((folder / "partition.json").read_text())
    evil = "</script><img src=x>"
    one = {**partition["clients"][0], "counts": {evil: 3, "b": 1}}
    partition |= {"values": [evil, "b"], "clients": [{**one, "client": c} for c in range(many)]}
    RunFolder(folder).write_json("partition.json", partition)
    metric = json.loads((folder / "run.json").read_text())["metric"]["name"]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in lines:
        clients = record["evaluation"]["clients"]
        own = next(iter(clients["each"].values()))
        clients["each"] = {str(c): {**own, metric: 1 - c / many} for c in range(many)}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([folder]).read_text()
    assert len(page) < 600_000 and page.count("<tr>") < 400 and "<img" not in page
    data = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    holdings, shown = map(json.loads, data)
    everybody = [str(client) for client in range(many)]
    assert [row[0] for row in holdings] == everybody and holdings[0][2] == f"{evil}: 3, b: 1"
    assert [row[0] for row in shown] == everybody[::-1]  # the worst first
    assert "50 of 2" in page and "Worst tenth" in page and "lower tenth" in page
    assert page.count("<path") < 2000  # no client is a point of its own
