"""The command line: few options, no tracebacks, clean ends."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from fedloom.commands import main
from fedloom.experiment.experiment import Experiment


@pytest.fixture
def file(experiment, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(experiment().to_toml())
    return path


def test_the_commands_and_options_are_these_and_no_others():
    command = typer.main.get_command(main.app)
    commands = {}
    for name, sub in command.commands.items():
        inner = getattr(sub, "commands", None)
        commands |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: sub}
    found = {
        name: sorted(option for p in sub.params for option in p.opts if option.startswith("-"))
        for name, sub in commands.items()
    }
    assert found == {
        "run": [
            "--engine",
            "--fresh-client",
            "--from-round",
            "--home",
            "--live",
            "--profile",
            "--quiet",
            "--ray-address",
            "--resume",
            "--set",
            "--workers",
            "-q",
        ],
        "demo": ["--quiet", "--set", "-q"],
        "init": ["--force", "--from-flower"],
        "partition": ["--force", "--picture", "--set"],
        "evaluate": [
            "--adapter",
            "--benchmark",
            "--judge",
            "--judge-audit",
            "--limit",
            "--lm-eval",
            "--questions",
            "--set",
            "--to",
        ],
        "compare": ["--quiet", "--set", "--to", "--workers", "-q"],
        "advise": ["--client-memory", "--downlink", "--latency", "--set", "--speed", "--uplink"],
        "export": [
            "--client",
            "--format",
            "--hub",
            "--outtype",
            "--public",
            "--reward",
            "--to",
        ],
        "chat": [
            "--base-model",
            "--beside",
            "--client",
            "--max-tokens",
            "--seed",
            "--system",
            "--temperature",
            "--top-p",
        ],
        "serve": [
            "--allow-host",
            "--allow-origin",
            "--base",
            "--base-model",
            "--client",
            "--host",
            "--max-tokens",
            "--port",
            "--quiet",
            "--seed",
            "--waiting",
            "-q",
        ],
        "watch": ["--port"],
        "explain": [],
        "label": ["--force", "--out"],
        "merge": [
            "--density",
            "--output",
            "--rank",
            "--rule",
            "--scale",
            "--seed",
            "--space",
            "--weights",
        ],
        "forget": ["--client"],
        "report": ["--force", "--to"],
        "tune": ["--dry-run", "--limit", "--set"],
        "audit match": [],
        "audit privacy": [
            "--canaries",
            "--inversions",
            "--quiet",
            "--rounds",
            "--rows",
            "--set",
            "-q",
        ],
        "audit verify": [],
        "certs": ["--days", "--home", "--host"],
        "keys new": [],
        "members allow": ["--folder", "--home"],
        "members list": ["--home"],
        "members remove": ["--home"],
        "members rename": ["--home"],
        "members revoke": ["--home"],
        "members rotate": ["--home"],
        "members withdraw": ["--again", "--home"],
        "server backup": ["--encrypt", "--home", "--passphrase-file", "--runs"],
        "server restore": ["--home", "--passphrase-file"],
        "server start": ["--home", "--host", "--insecure", "--metrics", "--port"],
        "server stop": ["--home"],
        "client join": ["--ca", "--data", "--home", "--insecure", "--key", "--server"],
        "client check": ["--client"],
        "client approve": ["--home", "--yes"],
        "client budget": ["--home"],
        "client leave": ["--home"],
        "data check": ["--set"],
        "data fingerprint": ["--force", "--key", "--new-key", "--output"],
        "data overlap": [],
        "data show": ["--row", "--set"],
        "data stats": ["--force", "--html", "--set"],
        "follow": ["--home", "--live", "--quiet", "-q"],
        "status": ["--home", "--json"],
        "stop": ["--home"],
    }


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['fedloom', '--help']\n"
        "from fedloom.commands.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_run_prints_rounds_and_result(call, file):
    code, out = call("run", file)
    assert code == 0
    assert re.search(r"round 0/2 .* preference_accuracy 0\.5000", out)
    assert re.search(r"round 2/2 .* loss 0\.\d+ .* sent [\d.]+ kB down [\d.]+ kB up", out)
    assert "held-out preference_accuracy before 0.5000  after" in out and "run folder:" in out


def test_quiet_prints_the_result_alone(call, file):
    code, out = call("run", file, "--quiet")
    assert code == 0 and "round 1" not in out and out.startswith("held-out preference_accuracy")


def test_settings_can_be_changed(call, file):
    code, out = call("run", file, "--set", "federation.rounds=1")
    assert code == 0 and "round 1/1" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "gone.toml"], 2, "file not found: gone.toml"),
        (["run", "{file}", "--set", "federation.round=3"], 2, "did you mean 'rounds'"),
        (["run", "{file}", "--set", "model.path=./gone"], 3, "is not a folder"),
        (
            ["run", "{file}", "--set", "data.source=./gone.csv", "--set", "data.kind=preference"],
            3,
            "data file not found",
        ),
        (["run", "--resume", "gone"], 1, "no run folder at gone"),
        (["run", "--resume", "gone", "--set", "a.b=1"], 1, "no run folder"),
        (["run"], 2, "give an experiment file, or --resume FOLDER"),
        (["run", "{file}", "--rounds", "3"], 2, "No such option"),
        (["report", "gone"], 1, "no run folder at gone"),
        (["evaluate", "{file}", "--adapter", "gone"], 3, "gone is not an adapter"),
        (["dance"], 2, "No such command"),
    ],
)
def test_mistakes_are_one_message_and_a_code(call, file, arguments, code, message):
    found, out = call(*[argument.format(file=file) for argument in arguments])
    assert found == code and message in out and "Traceback" not in out


def test_init_writes_a_file_that_runs_and_never_over_another(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("init", "mine.toml")[0] == 0
    assert tomllib.loads(Path("mine.toml").read_text())["model"]["path"] == "tiny"
    code, out = call("init", "mine.toml")
    assert code == 1 and "is there already" in out


def test_partition_shows_table_and_picture_without_a_model(call, file, tmp_path):
    picture = tmp_path / "p.svg"
    options = [
        "--set",
        "partition.kind=dirichlet",
        "--set",
        "partition.column=domain",
        "--picture",
        picture,
    ]
    code, out = call("partition", file, "--set", "model.path=./gone", *options)
    assert code == 0 and "dirichlet partition by domain" in out and "workshop" in out and "█" in out
    assert "rows by client" in out and "held out for all" in out and "unaccounted" not in out
    assert picture.read_text().startswith("<svg") and "currentColor" not in picture.read_text()


def test_partition_and_run_say_which_layout_was_recognised(
    call, file, rows_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    options = ["--set", f"data.source={rows_file(rows)}", "--set", "data.kind=preference"]
    options += ["--set", "partition.kind=iid"]
    for command in ("partition", "run"):
        code, out = call(command, file, *options)
        assert code == 0 and "rows.jsonl: layout question/chosen/rejected" in out


def test_evaluate_and_report(call, file, tmp_path):
    assert call("run", file, "--quiet")[0] == 0
    run, spellings = tmp_path / "run", []
    for number, words in enumerate(
        [
            (file, "--adapter", run / "adapter"),
            (file, "--adapter", run),
            (run,),
            (run / "adapter",),
            (run, "--adapter", run / "adapter"),
            (run, "--adapter", "base"),
        ]
    ):
        folder = tmp_path / f"scores-{number}"
        code, out = call("evaluate", *words, "--to", folder)
        assert code == 0 and f"wrote {folder / 'held_out.json'}" in out
        assert re.search(
            r"preference_accuracy = 0\.\d{6}  \(95 % interval 0\.\d{3} to [01]\.\d{3} over 12 rows\)",
            out,
        )
        spellings.append(json.loads((folder / "held_out.json").read_text())["evaluated"][0])
    assert all(own["metrics"] == spellings[0]["metrics"] for own in spellings[:5])
    assert spellings[5]["adapter"] is None and spellings[5]["metrics"]["preference_accuracy"] == 0.5
    assert spellings[0]["rows"] == spellings[0]["interval"]["units"] == 12
    code, out = call("report", tmp_path / "run", "--to", tmp_path / "page.html")
    assert code == 0 and (tmp_path / "page.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_cleanly_and_say_how_to_go_on(file, tmp_path, kind):
    process = subprocess.Popen(
        [sys.executable, "-m", "fedloom", "run", str(file), "--set", "federation.rounds=500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # What a shell starts in the background ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout:
            if line.startswith("round 2/"):
                process.send_signal(kind)
                break
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"fedloom run --resume {tmp_path / 'run'}" in err and "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").glob("round-*"))


def test_the_live_table_draws(experiment):
    """A terminal gets a table that grows; what it shows is checked through rich's own recording."""
    import io

    from rich.console import Console

    import fedloom
    from fedloom.commands.terminal import LiveTerminal, make_observer

    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    observer = make_observer(screen, quiet=False)
    assert isinstance(observer, LiveTerminal)
    fedloom.run(experiment(), observer=observer)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    last = text[text.rindex("worst client") :]
    assert [row for row in ("0/2", "1/2", "2/2") if row in last] == ["0/2", "1/2", "2/2"]


@pytest.fixture
def comparison(experiment, tmp_path):
    import tomli_w

    table = experiment(evaluation={"samples": 0}, data={"builtin_rows": 30}).to_table()
    table = tomllib.loads(Experiment.from_table(table).to_toml())
    del table["name"], table["output"]
    arms = {"dpo": {"objective": {"name": "dpo"}}, "kto": {"objective": {"name": "kto"}}}
    table["compare"] = {"budget": "steps", "amount": 1, "seeds": [0, 1], "objectives": arms}
    path = tmp_path / "grid.toml"
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.mark.slow
def test_compare_prints_a_table_and_goes_on_where_it_stopped(call, comparison, tmp_path):
    code, out = call("compare", comparison, "--to", tmp_path / "out", "--workers", 1)
    assert code == 0
    assert "2 objectives x 1 methods x 2 seeds, 1 steps per client and round" in out
    assert "4 runs to do, 1 at a time" in out and re.search(
        r"4/4 +kto-fedavg-s1 +preference_acc", out
    )
    assert re.search(r"fedavg +(0\.\d{3} \(0\.\d{3}-\d\.\d{3}\) +){2}", out)
    code, again = call("compare", comparison, "--to", tmp_path / "out", "--workers", 1)
    assert code == 0 and "4 done before, 0 runs to do" in again
    code, page = call("report", tmp_path / "out")
    assert code == 0 and "report.html" in page
    code, out = call("compare", comparison, "--to", tmp_path / "out", "--quiet")
    assert code == 0 and "runs to do" not in out


def test_a_benchmark_from_adapters_to_page(call, file, tmp_path, model_folder):
    assert call("run", file, "--quiet")[0] == 0
    questions = tmp_path / "mine.jsonl"
    questions.write_text(
        '{"question": "Two and two?", "answer": "4"}\n{"bad": 1}\n{"question": "Sky?"}\n'
    )
    folder = tmp_path / "judged"
    code, out = call(
        "evaluate", tmp_path / "run", "base", "--benchmark", questions, "--to", folder,
        "--judge", "reference", "--judge", "longest", "--set", "generation.max_new_tokens=5",
        "--set", "generation.template=plain", "--set", f"model.path={model_folder}",
    )  # fmt: skip
    assert code == 0
    assert "left out: mine.jsonl row 2: has none of the columns" in out
    assert re.search(r"reference +run +0\.000 +0\.000 to 0\.793 +1 of 2", out)
    assert "reference: 2 of 4 verdicts unusable: 2 abstained: no reference" in out
    (folder / "report.html").unlink()
    assert call("report", folder)[0] == 0 and (folder / "report.html").is_file()


def test_a_judge_is_audited(call, tmp_path):
    rows = [
        {"input": "q", "output_1": "a long good answer", "output_2": "bad", "label": 1},
        {"input": "q", "output_1": "a long bad answer", "output_2": "good", "label": 2},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = call("evaluate", "--judge-audit", tmp_path, "--judge", "longest")
    assert code == 0 and re.search(r"2/2 +0\.500 .* 0\.500 +0\.500", out)
    code, out = call("evaluate", "--judge-audit", tmp_path)
    assert code == 1 and "--judge-audit needs a judge" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a run folder or an experiment in TOML"),
        (("a", "b"), "a is not an adapter"),
        (("a", "--benchmark", "x.jsonl", "--lm-eval", "mmlu"), "give one of --benchmark"),
        (("a", "--benchmark", "mtbench"), "no benchmark 'mtbench'"),
        (("no-such-folder", "--lm-eval", "arc_easy"), "is not an adapter"),
    ],
)
def test_evaluate_says_what_it_needs(call, arguments, message):
    code, out = call("evaluate", *arguments)
    assert code != 0 and message in " ".join(out.replace("│", " ").split())


def test_advise_prints_what_each_framework_costs_and_trains_nothing(call, experiment, tmp_path):
    path = tmp_path / "x.toml"
    own = experiment(
        data={"source": "builtin:labelled"},
        objective={"name": "classification"},
        public={"rows": 12},
    )
    path.write_text(own.to_toml())
    code, text = call("advise", path, "--uplink", "10Mbit", "--client-memory", "8GB")
    assert code == 0
    for word in (
        "FedLLM, lora r=2",
        "KD-FedLLM, all logits",
        "Split-FedLLM, cut 1, int8",
        "Try FedLLM",
    ):
        assert word in text
    assert not (tmp_path / "run").exists()
    code, text = call("advise", path, "--uplink", "quick")
    assert code == 2 and "'quick' is not a quantity above 0 in bit; write it like 10Mbit" in text


def test_a_federation_without_flower_says_what_is_missing(call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "fedloom.security.keys", raising=False)
    code, out = call("certs", "--home", tmp_path)
    assert code == 2 and "cryptography is missing" in out and "fedloom[flower]" in out
