"""All commands and the mistakes that people make with them: one clear message each, no traceback.

In one process; ``test_early.py`` starts each command once as a process of its own.
"""

import pytest

EXPERIMENTS = {
    "a file that is not there": ("gone.toml",),
    "a folder": ("empty",),
    "the folder of a run": ("run",),
    "an empty file": ("empty.toml",),
    "no TOML": ("broken.toml",),
    "bytes that are no text": ("bytes.toml",),
    "a section with a typing mistake": ("typing.toml",),
    "a key with a typing mistake": ("key.toml",),
    "a value of another type": ("type.toml",),
    "--set without =": ("good.toml", "--set", "federation.rounds"),
    "--set of no section": ("good.toml", "--set", "rounds=3"),
    "an option that is none": ("good.toml", "--rounds", "3"),
}
COMMANDS = {
    "run": ("run",),
    "partition": ("partition",),
    "data show": ("data", "show"),
    "advise": ("advise",),
    "compare": ("compare",),
}


@pytest.fixture
def place(tmp_path, monkeypatch, experiment):
    """A folder with an experiment, what is none, and what is left of runs."""
    monkeypatch.chdir(tmp_path)
    good = experiment(output={"folder": str(tmp_path / "new")})
    (tmp_path / "good.toml").write_text(good.to_toml())
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "broken.toml").write_text("[model\npath = 3")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe[")
    (tmp_path / "typing.toml").write_text("[fedration]\nrounds = 3\n")
    (tmp_path / "key.toml").write_text("[federation]\nround = 3\n")
    (tmp_path / "type.toml").write_text("[federation]\nrounds = 'three'\n")
    (tmp_path / "list.toml").write_text(
        "[federation]\n[compare]\namount = 1\nobjectives = ['dpo', 'ipoo']\n"
    )
    for name in ("empty", "run", "started"):
        (tmp_path / name).mkdir()
    for name in ("run", "started"):
        (tmp_path / name / "experiment.toml").write_text(experiment().to_toml())
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "page.html").write_text("mine")
    return tmp_path


def told(call, *words):
    """Return what a mistake is told as, after checking that it is one message."""
    code, out = call(*words)
    assert code not in (0, None) and "Traceback" not in out
    assert sum(line.startswith("fedloom: ") for line in out.splitlines()) == 1 or "Error" in out
    assert len(out.splitlines()) <= 12
    return " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("mistake", EXPERIMENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_experiment(call, place, command, mistake):
    told(call, *COMMANDS[command], *EXPERIMENTS[mistake])
    assert not list(place.glob("*.svg"))


OTHERS = {
    "run run": "run is the folder of a run: fedloom run --resume run goes on with it, fedloom report run",
    "run empty": "empty is a folder, and an experiment is a file in TOML",
    "run good.toml --from-round 2": "--from-round and --fresh-client go with --resume FOLDER",
    "run --resume gone": "no run folder at gone",
    "run --resume empty": "empty is no run folder: it has no experiment.toml",
    "run --resume started": "no run was begun in started",
    "run --resume good.toml": "no run folder at good.toml",
    "run": "give an experiment file, or --resume FOLDER",
    "run good.toml --engine flowr": "'flowr' is no engine",
    "run good.toml --set output.folder=nope/x": "there is no folder nope to hold x: make it, or mend",
    "run good.toml --set output.folder=started": "output.folder 'started' is not empty",
    "run good.toml --set model.path=./gone": "model.path './gone' is not a folder",
    "run good.toml --set data.source=./gone.csv --set data.kind=preference": "data file not found",
    "demo --set federation.round=1": "did you mean 'rounds'",
    "init good.toml": "good.toml is there already: give another name",
    "init nope/x.toml": "there is no folder nope to hold x.toml",
    "init empty": "empty is a folder: name a file in it",
    "partition good.toml --picture page.html": "page.html is there already: give another name with --picture",
    "partition good.toml --picture nope/x.svg": "there is no folder nope to hold x.svg",
    "compare good.toml": "[compare] is missing",
    "compare list.toml": "compare.objectives 'ipoo': did you mean 'ipo'?",
    "compare list.toml --to nope/x": "there is no folder nope to hold x",
    "advise good.toml --uplink quick": "'quick' is no quantity",
    "evaluate": "give a run folder or an experiment in TOML",
    "evaluate gone": "gone is no adapter: it has no adapter_config.json",
    "evaluate gone.toml": "file not found: gone.toml",
    "evaluate empty": "empty is no adapter",
    "evaluate started": "started has no global adapter: its run has not ended",
    "evaluate base": "the base model is scored on an experiment",
    "evaluate good.toml --adapter gone": "gone is no adapter",
    "evaluate good.toml --adapter good.toml": "good.toml is an experiment, not an adapter",
    "evaluate good.toml --to run": "run is not empty: choose another folder with --to",
    "evaluate good.toml --to nope/x": "there is no folder nope to hold x",
    "evaluate good.toml --lm-eval mmlu": "good.toml is an experiment, not an adapter",
    "evaluate base --lm-eval good.toml": "--lm-eval good.toml: no task; give names that lm-eval knows",
    "evaluate base --lm-eval mmlu,,arc": "--lm-eval has an empty task",
    "evaluate base --benchmark mtbench": "no benchmark 'mtbench'",
    "evaluate base --benchmark gone.jsonl": "data file not found: gone.jsonl",
    "evaluate base --benchmark x.jsonl --adapter run": "--adapter goes with an experiment or run folder",
    "evaluate --judge-audit empty --judge refusl": "no judge 'refusl': give refusal, reference, longest",
    "evaluate --judge-audit empty --judge longest": "empty holds no judged pairs",
    "evaluate --judge-audit empty": "--judge-audit needs a judge",
    "export gone": "no run folder at gone",
    "export started": "started has no global adapter",
    "export started --to nope/x": "there is no folder nope to hold x",
    "export started --client -1": "-1 is not in the range",
    "forget gone --client 1": "no run folder at gone",
    "forget run --client 1": "run holds nothing that client 1 keeps",
    "report gone": "no run folder at gone",
    "report empty": "empty is no run folder",
    "report started": "started",
    "report run --to page.html": "page.html is there already: give another name with --to, or --force",
    "report run --to nope/x.html": "there is no folder nope to hold x.html",
    "report run --to empty": "empty is a folder: name a file in it with --to",
    "audit verify gone": "gone",
    "audit match gone run": "gone",
    "keys new good.toml": "good.toml is there already",
    "members list --home good.toml": "good.toml",
    "members allow": "give either NAME and its public key, or --folder",
    "members revoke nobody --home empty": "nobody",
    "certs --home empty --days 0": "0 is not in the range",
    "certs --home empty --days 99999999": "99999999 is not in the range",
    "server stop --home gone": "no server runs in gone",
    "server backup x --home empty": "empty is no server's folder",
    "server restore gone": "gone",
    "client check gone.toml": "gone.toml",
    "client leave --home gone": "gone",
    "client approve x --home gone": "x",
    "status --home gone": "no server was started in gone",
    "stop --home gone": "no server was started in gone",
    "follow --home gone": "no server was started in gone",
    "dance": "No such command",
    "run --resum gone": "No such option",
}  # fmt: skip
"""What is given, and what is said of it."""


@pytest.mark.parametrize("words", OTHERS)
def test_a_mistake_is_told_in_these_words(call, place, words):
    assert OTHERS[words] in told(call, *words.split())
    assert (place / "page.html").read_text() == "mine" and not (place / "nope").exists()


def test_a_host_without_a_name(call, place):
    assert "'' is no name or address of a machine" in told(call, "certs", "--host", "")


def test_memory_that_does_not_suffice_is_one_line(call, place, monkeypatch):
    from fedloom import runner

    said = (
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64000000000 bytes. Error"
    )

    def fail(*given, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(runner, "run_experiment", fail)
    line = told(call, "run", "good.toml")
    assert line.startswith(
        "fedloom: memory does not suffice (64.0 GB were asked for at once): set a"
    )


def test_the_version(call):
    import fedloom

    assert call("--version") == (0, f"fedloom {fedloom.__version__}\n")


def test_force_writes_over(call, place):
    assert call("init", "good.toml", "--force")[0] == 0
    assert (place / "good.toml").read_text().startswith("# A federated experiment.")


def test_a_picture_of_our_own_choice_gets_a_number(call, place):
    for name in ("good-partition.svg", "good-partition-2.svg", "good-partition-3.svg"):
        code, out = call("partition", "good.toml", "--set", "name=good")
        assert code == 0 and f"picture: {name}" in out
    assert call("partition", "good.toml", "--set", "name=good", "--force")[1].endswith(
        "picture: good-partition.svg\n"
    )
