"""All commands and the mistakes that people make with them: one clear message each, no traceback.

In one process; ``test_early.py`` starts each command once as a process of its own.
"""

import os
import shlex
import shutil
import time
from collections import Counter

import pytest
import typer

from fedloom.commands.explain import sections
from fedloom.commands.main import app
from fedloom.security.certificates import make_authority
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key
from sampling import every

MORE_ABOUT = "more: fedloom explain "
NAMES = {section.name for section in sections()}

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
    "data stats": ("data", "stats"),
    "data check": ("data", "check"),
    "advise": ("advise",),
    "compare": ("compare",),
    "tune": ("tune",),
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
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "experiment.toml").write_text("[model\npath = 3")
    (tmp_path / "page.html").write_text("mine")
    return tmp_path


@pytest.fixture
def federation_place(place, once, tmp_path_factory):
    """The folder with a server's folder, whose member is amy, and keys too."""

    def make():
        made = tmp_path_factory.mktemp("federation")
        make_authority(made / "server", ["localhost"])
        for name in ("client", "other"):
            make_key(made / f"{name}.key")
        Members(made / "server" / "members.toml").allow("amy", (made / "client.pub").read_text())
        (made / "bad.pub").write_text("no key")
        (made / "log.jsonl").write_text("{}\n")
        rows = "[data]\nsource = 'builtin:preferences'\nshare = 'experiment'\n"
        (made / "client.toml").write_text(rows)
        return made

    shutil.copytree(once("federation", make), place, dirs_exist_ok=True)
    mask = os.umask(0o022)
    yield place
    os.umask(mask)  # clients change it for themselves


def told(call, *words):
    """Return what a mistake is told as, after checking that it is one message."""
    code, out = call(*words)
    assert code not in (0, None) and "Traceback" not in out
    assert sum(line.startswith("fedloom: ") for line in out.splitlines()) == 1 or "Error" in out
    assert len(out.splitlines()) <= 12
    more = [line for line in out.splitlines() if line.startswith(MORE_ABOUT)]
    assert {line.removeprefix(MORE_ABOUT) for line in more} <= NAMES
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
    "run --resume empty": "empty is not a run folder: it has no experiment.toml",
    "run --resume started": "no run was begun in started",
    "run --resume good.toml": "no run folder at good.toml",
    "run": "give an experiment file, or --resume FOLDER",
    "run good.toml --engine flowr": "'flowr' is not an engine",
    "run good.toml --set output.folder=nope/x": "there is no folder nope to hold x: create it, or correct",
    "run good.toml --set output.folder=started": "output.folder 'started' is not empty",
    "run good.toml --set model.path=./gone": "model.path './gone' is not a folder",
    "run good.toml --set data.source=./gone.csv --set data.kind=preference": "data file not found",
    "demo --set federation.round=1": "did you mean 'rounds'",
    "init good.toml": "good.toml is there already: give another name",
    "init nope/x.toml": "there is no folder nope to hold x.toml",
    "init empty": "empty is a folder: name a file in it",
    "init x.toml --from-flower key.toml": "it has no [tool.flwr.app.config], so it is no Flower app",
    "partition good.toml --picture page.html": "page.html is there already: give another name with --picture",
    "partition good.toml --picture nope/x.svg": "there is no folder nope to hold x.svg",
    "compare good.toml": "[compare] is missing",
    "compare list.toml": "compare.objectives 'ipoo': did you mean 'ipo'?",
    "compare list.toml --to nope/x": "there is no folder nope to hold x",
    "advise good.toml --uplink quick": "'quick' is not a quantity",
    "evaluate": "give a run folder or an experiment in TOML",
    "evaluate gone": "gone is not an adapter: it has no adapter_config.json",
    "evaluate gone.toml": "file not found: gone.toml",
    "evaluate empty": "empty is not an adapter",
    "evaluate started": "started has no global adapter: its run has not ended",
    "evaluate base": "the base model is scored on an experiment",
    "evaluate good.toml --adapter gone": "gone is not an adapter",
    "evaluate good.toml --adapter good.toml": "good.toml is an experiment, not an adapter",
    "evaluate good.toml --to run": "run is not empty: choose another folder with --to",
    "evaluate good.toml --to nope/x": "there is no folder nope to hold x",
    "evaluate good.toml --lm-eval mmlu": "good.toml is an experiment, not an adapter",
    "evaluate base --lm-eval good.toml": "--lm-eval good.toml: no task; give names that lm-eval knows",
    "evaluate base --lm-eval mmlu,,arc": "--lm-eval has an empty task",
    "evaluate base --benchmark mtbench": "no benchmark 'mtbench'",
    "evaluate base --benchmark gone.jsonl": "data file not found: gone.jsonl",
    "evaluate base --benchmark x.jsonl --adapter run": "--adapter goes with an experiment or run folder",
    "evaluate --judge-audit empty --judge refusl": "no judge 'refusl': did you mean 'refusal'?",
    "evaluate --judge-audit empty --judge longest": "empty holds no judged pairs",
    "evaluate --judge-audit empty": "--judge-audit needs a judge",
    "merge gone empty --output x": "gone is not an adapter: it has no adapter_config.json",
    "merge good.toml empty --output x": "good.toml is an experiment, not an adapter",
    "merge run started --output nope/x": "there is no folder nope to hold x",
    "merge run started --output run": "run is not empty; give another folder with --output",
    "merge run --output x": "merging needs two adapters at least, and 1 is given",
    "merge run started --output x --rule tise": "it is one of task_arithmetic, ties, dare, knots",
    "merge run started --output x --weights 1,a": "give numbers with commas between, such as 1,2,1",
    "export gone": "no run folder at gone",
    "export started": "started has no global adapter",
    "export started --to nope/x": "there is no folder nope to hold x",
    "export started --client -1": "-1 is not in the range",
    "forget gone --client 1": "no run folder at gone",
    "forget run --client 1": "run holds no store or model of client 1",
    "report gone": "no run folder at gone",
    "report empty": "empty is not a run folder",
    "report started": "started",
    "report run --to page.html": "page.html is there already: give another name with --to, or --force",
    "report run --to nope/x.html": "there is no folder nope to hold x.html",
    "report run --to empty": "empty is a folder: name a file in it with --to",
    "audit verify gone": "gone",
    "audit match gone run": "gone",
    "audit privacy run": "run is a run: its released adapter is attacked with rows that their owner names",
    "audit privacy run --rows gone.jsonl": "there are no rows at gone.jsonl: --rows names a JSONL file",
    "audit privacy gone": "gone",
    "audit privacy spoilt": "spoilt/experiment.toml has 1 mistake",
    "audit privacy spoilt --rows log.jsonl": "spoilt/experiment.toml has 1 mistake",
    "audit privacy started --rows page.html": "started has no global adapter: its run has not ended",
    "audit privacy broken.toml": "broken.toml has 1 mistake: - not TOML",
    "audit privacy empty --rows log.jsonl": "empty is not a run folder: it has no experiment.toml",
    "audit privacy good.toml --rows good.toml": "good.toml",
    "keys new good.toml": "good.toml is there already",
    "members list --home good.toml": "good.toml",
    "members allow": "give either NAME and its public key, or --folder",
    "members revoke nobody --home empty": "nobody",
    "certs --home empty --days 0": "0 is not in the range",
    "certs --home empty --days 99999999": "99999999 is not in the range",
    "server stop --home gone": "no server runs in gone",
    "server backup x --home empty": "empty is not a server's folder",
    "server restore gone": "gone",
    "client check gone.toml": "gone.toml",
    "client leave --home gone": "gone",
    "audit verify empty.toml": "empty.toml is empty, and no run or client leaves it so: lines are missing",
    "members revoke amy --home gone": "there is no server's folder gone: give it with --home",
    "keys new nope/x.key": "there is no folder nope to hold x.key: create it, or correct the path after",
    "certs --home good.toml": "good.toml is a file: name a folder with --home",
    "demo --set output.folder=nope/x": "there is no folder nope to hold x: create it, or correct the path",
    "report run": "run.json is not what a run wrote, it lacks name, fedloom, versions",
    "forget started --client 1": "started holds no store or model of client 1: no run was begun there",
    "client approve x --home gone": "there is no client's folder gone: give it with --home",
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


MORE = {
    "run": ("good.toml --set objective.name=dop", "good.toml --engine", "nope/x.toml"),
    "demo": (
        "x", "--rounds 3", "--set", "--set federation.rounds", "--set rounds=1",
        "--set federation.rounds=0", "--set federation.rounds=three", "--set method.name=fedavgg",
        "--set data.source=./gone.jsonl", "--set output.folder=run", "--set output.folder=nope/x",
    ),
    "init": (
        "a.toml b.toml", "--force-it", "''", "good.toml/x.toml", "/proc/x.toml", "--to x.toml", "run", ".",
        "--set a=b", "x.toml --from-flower", "x.toml --from-flower gone", "x.toml --from-flower empty",
        "x.toml --from-flower broken.toml", "x.toml --from-flower good.toml", "good.toml --from-flower run",
    ),
    "merge": (
        "", "run started", "run started --output", "run started --output x --space tensors",
        "run started --output x --scale 0", "run started --output x --rule ties --density 2",
        "run started --output x --rank 0", "run started --output x --seed -1",
    ),
    "explain": (
        "", "''", "' '", "zzz", "E0308", "no-run-folder-att", "--name no-run-folder-at", "-x", "no-run-folder-at --quiet",
        "qwerty asdf", "no-run-folder-at no-run-folder-at",
    ),
    "export": (
        "", "empty", "good.toml", "run", "started --client one", "started --client 7",
        "started --reward", "started --too x", "started run",
    ),
    "forget": (
        "", "gone", "run", "run --client one", "run --client -1", "empty --client 1",
        "good.toml --client 1", "started --client 1", "run started --client 1", "run --clients 1",
    ),
    "report": (
        "", "good.toml", "run", "run gone", "run --out x.html", "log.jsonl", "''", "server",
    ),
    "audit verify": (
        "", "empty", "good.toml", "empty.toml", "bytes.toml", "log.jsonl", "run", "run started",
        "--home run", "''",
    ),
    "audit match": (
        "", "run", "run gone", "empty empty", "good.toml good.toml", "log.jsonl log.jsonl",
        "started started", "bytes.toml run", "run started x", "--run run", "empty.toml empty.toml",
    ),
    "audit privacy": (
        "", "gone", "gone.toml", "empty", "run", "started", "run --rows gone.jsonl", "started --rows good.toml",
        "good.toml --rows gone.jsonl", "good.toml --canaries -1", "good.toml --canaries many",
        "good.toml --rounds 0", "good.toml --set data.source=./gone.jsonl", "good.toml --set nothing",
        "log.jsonl", "bytes.toml", "empty.toml", "run --rows log.jsonl --set federation.rounds=1", "''",
    ),
    "keys new": (
        "nope/x.key", "empty", "good.toml/x.key", "client.key", "a.key b.key", "--bits 4096", "''",
        "client.pub", "/proc/x.key", ".",
    ),
    "certs": (
        "--home good.toml", "--home good.toml/x", "--home nope/x", "--home server --days ten",
        "--home server --host 'a b'", "--home server --host http://x.org",
        "--home server --host x.org:9092", "--hosts x.org", "x.org", "--host", "--home /proc/x",
    ),
    "members allow": (
        "ben", "ben gone.pub --home server", "ben bad.pub --home server",
        "ben client.key --home server", "ben client.pub --home server",
        "amy other.pub --home server", "a/b other.pub --home server", "'' other.pub --home server",
        "ben other.pub --home good.toml", "ben other.pub --home gone",
        "ben other.pub x --home server", "--folder empty --home server",
        "--folder gone --home server", "ben other.pub --folder empty --home server",
        "ben empty --home server",
    ),
    "members revoke": (
        "", "ben --home server", "Amy --home server", "amy --home gone", "amy --home good.toml",
        "'' --home server", "amy ben --home server", "amy --hom server", "1 --home server",
        "client.pub --home server",
    ),
    "members rename": (
        "", "amy --home server", "ben carl --home server", "amy a/b --home server",
        "amy '' --home server", "amy ben --home gone", "amy ben --home good.toml",
        "amy ben carl --home server", "amy ben --force --home server", "amy ben --home empty",
    ),
    "members rotate": (
        "", "amy --home server", "ben other.pub --home server", "amy gone.pub --home server",
        "amy bad.pub --home server", "amy other.key --home server", "amy empty --home server",
        "amy other.pub --home gone", "amy other.pub --home good.toml",
        "amy other.pub x --home server",
    ),
    "members withdraw": (
        "", "ben --home server", "Amy --home server", "'' --home server", "amy --home gone",
        "amy --home good.toml", "amy --home empty", "amy ben --home server",
        "amy --agian --home server", "1 --home server", "--again --home server",
    ),
    "members remove": (
        "", "ben --home server", "amy --home server", "Amy --home server", "'' --home server",
        "amy --home gone", "amy --home good.toml", "amy --home empty", "amy ben --home server",
        "amy --yes --home server",
    ),
    "members list": (
        "--home gone", "--home good.toml/x", "amy", "--all", "--home", "--json", "server",
        "--home server --home gone", "--homes server", "-h",
    ),
    "server start": (
        "--home good.toml", "--home empty", "--home gone", "--home server --port 0",
        "--home server --port 99999", "--home server --port http",
        "--home server --host nowhere.invalid", "--home server --metrics :x",
        "--home server --metrics localhost:99999", "--home server --metrics 0.0.0.0:9100",
        "--home server x", "--prot 9092",
    ),
    "server stop": (
        "--home good.toml", "--home empty", "--home server", "server", "--now", "--home",
        "--home good.toml/x", "--home run", "--home ''", "--all",
    ),
    "server backup": (
        "", "x --home gone", "x --home good.toml", "good.toml --home server",
        "nope/x --home server", "empty --home server", "x --home server --passphrase-file gone",
        "x --home server --passphrase-file empty",
        "x --home server --passphrase-file empty.toml", "x y --home server",
        "x --home server --run",
    ),
    "server restore": (
        "", "empty --home new", "good.toml --home new", "empty.toml --home new",
        "good.toml --home server", "good.toml --home good.toml", "good.toml --home nope/x",
        "good.toml --home new --passphrase-file gone", "good.toml x", "run --home new",
        "good.toml --force",
    ),
    "client join": (
        "", "--server", "localhost:9", "--server localhost:x", "--server localhost:99999",
        "--server ''", "--server http://localhost:9092", "--server localhost:9 --ca gone.pem",
        "--server localhost:9 --key gone.key --ca server/ca.pem",
        "--server localhost:9 --key client.pub --ca server/ca.pem",
        "--server localhost:9 --key client.key --ca good.toml",
        "--server localhost:9 --key client.key --ca server/ca.pem --data gone.toml",
        "--server localhost:9 --key client.key --ca server/ca.pem --data broken.toml",
        "--server localhost:9 --key client.key --ca server/ca.pem --data typing.toml",
        "--server localhost:9 --key client.key --ca server/ca.pem --data empty",
        "--server localhost:9 --key client.key --ca server/ca.pem --home good.toml",
        "--server localhost:9 --key client.key --ca server/ca.pem --home nope/x",
    ),
    "client check": (
        "", "empty", "broken.toml", "bytes.toml", "typing.toml", "key.toml",
        "client.toml gone.toml", "client.toml empty", "client.toml --client -1",
        "client.toml good.toml x", "--set a=b",
    ),
    "client approve": (
        "--home gone", "x --home good.toml", "x --home empty", "x --home server", "x --home run",
        "'' --home empty", "x y", "--yse x", "--home", "--home good.toml/x",
    ),
    "client budget": (
        "--home good.toml", "--home gone", "--home good.toml/x", "--home nope/x", "x", "--hom x",
        "--home", "--all", "--json", "empty", "--run x",
    ),
    "client leave": (
        "--home good.toml", "--home empty", "--home server", "--home run", "x", "--home", "--now",
        "--home good.toml/x", "--server localhost:9", "--home ''",
    ),
    "status": (
        "--home good.toml", "--home empty", "--home server", "--home run", "x", "--home", "--jsn",
        "--home good.toml/x", "--run x", "run",
    ),
    "stop": (
        "--home good.toml", "--home empty", "--home server", "x --home server", "x --home gone",
        "x y", "--home", "--all", "'' --home empty", "--home good.toml/x",
    ),
    "chat": (
        "", "gone", "good.toml", "empty", "started", "run", "log.jsonl", "gone x", "gone --beside",
        "gone --temperature 3", "gone --temperature hot", "gone --top-p 2", "gone --seed -1",
        "gone --max-tokens 0", "gone --besides base", "run --client 1",
    ),
    "serve": (
        "", "gone", "good.toml", "empty", "started", "run", "log.jsonl", "gone --port 99999",
        "gone --port http", "gone --host", "gone --waiting 65", "gone --seed -1", "gone --client -1",
        "started --client 1",
    ),
    "watch": (
        "", "gone", "good.toml", "empty", "gone x", "gone --port 99999", "gone --port http", "''",
        "log.jsonl", "gone --live", "nope/x",
    ),
    "label": (
        "", "gone", "gone log.jsonl", "gone log.jsonl --out", "gone log.jsonl --out y.jsonl",
        "run gone.jsonl --out y.jsonl", "good.toml log.jsonl --out y.jsonl",
        "empty log.jsonl --out y.jsonl", "started log.jsonl --out y.jsonl",
        "run log.jsonl --out nope/y.jsonl", "run log.jsonl --out page.html", "run log.jsonl x --out y",
    ),
    "data fingerprint": (
        "", "client.toml", "client.toml --key", "client.toml --key client.key --output out",
        "client.toml --key gone --output out", "client.toml --key good.toml --output out",
        "client.toml --key empty --output out", "gone.toml --key k --output out --new-key",
        "broken.toml --key k --output out --new-key", "empty.toml --key k --output out --new-key",
        "client.toml --key good.toml --output out --new-key",
        "client.toml --key k --output page.html --new-key", "client.toml --key nope/k --output x --new-key",
        "client.toml --key k --output k --new-key",
        "client.toml --key k --output nope/x --new-key", "client.toml --key k --output empty --new-key",
    ),
    "data overlap": (
        "", "page.html", "gone gone", "page.html gone", "empty empty", "good.toml good.toml",
        "bytes.toml bytes.toml", "empty.toml page.html", "log.jsonl log.jsonl", "'' ''",
        "client.key client.pub", "good.toml --key k",
    ),
    "follow": (
        "--home good.toml", "--home empty", "--home server", "x --home server", "x --home gone",
        "x y", "--home", "--all", "run", "--home good.toml/x",
    ),
}  # fmt: skip
"""Mistakes of each command whose words are not looked at one by one."""

ALL = [(name, given) for name, own in MORE.items() for given in own]


@pytest.mark.parametrize("mistake", every(20, ALL), ids=" ".join)
def test_a_mistake_is_one_message_at_once(call, federation_place, mistake):
    """Without a model in less than two seconds of CPU, and nothing is made."""
    command, given = mistake
    before = sorted(federation_place.rglob("*"))
    start = time.process_time()
    line = told(call, *command.split(), *shlex.split(given))
    assert time.process_time() - start < 2.0
    assert "[Errno" not in line and "Missing command" not in line
    made = set(federation_place.rglob("*")).difference(before)
    assert not {path for path in made if "lock" not in path.name}


def test_every_command_has_ten_mistakes():
    known = Counter({command: len(own) for command, own in MORE.items()})
    known.update({name: len(EXPERIMENTS) for name in COMMANDS})
    commands = set(leaves(typer.main.get_command(app)))
    for words in OTHERS:
        one, two = words.split(maxsplit=2)[0], " ".join(words.split()[:2])
        known[two if two in commands else one] += 1
    assert {name: known[name] for name in commands if known[name] < 10} == {}
    assert known.keys() - commands == {"dance"}


def leaves(command, name=""):
    """Yield the names of all commands."""
    if not hasattr(command, "commands"):
        yield name
        return
    for own, sub in command.commands.items():
        yield from leaves(sub, f"{name} {own}".strip())


def test_a_host_without_a_name(call, place):
    assert "'' is not a name or address of a machine" in told(call, "certs", "--host", "")


def test_memory_that_does_not_suffice_is_one_line(call, place, monkeypatch):
    from fedloom.runs import run

    said = (
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64000000000 bytes. Error"
    )

    def fail(*given, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(run, "run_experiment", fail)
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


HINTS = {
    "rn good.toml": "did you mean 'run'?",
    "run good.toml --worker 2": "did you mean '--workers'?",
    "run good.toml --engine simulatoin": "did you mean 'simulation'?",
    "run good.toml --set model.path=tinny": "did you mean 'tiny'?",
    "run good.toml --set model.path=./llamma": "did you mean 'llama'?",
    "run good.toml --set objective.name=dop": "did you mean 'dpo'?",
    "run good.toml --set method.name=fedprx": "did you mean 'fedprox'?",
    "run good.toml --set training.lerning_rate=1": "did you mean 'learning_rate'?",
    "run good.toml --set partition.kind=column --set partition.column=domian": "did you mean 'domain'?",
    "run good.toml --set data.source=builtin:preference": "did you mean 'builtin:preferences'?",
    "run good.toml --set adapter.targets=q_prj": "did you mean 'q_proj'?",
    "run good.toml --set wire.up=int3x": "did you mean 'int3'?",
    "evaluate base --benchmark vicunna": "did you mean 'vicuna'?",
    "export run --format merge": "did you mean 'merged'?",
    "merge run started --output x --rule tise": "did you mean 'ties'?",
}
"""Names with a typing mistake: of commands, options, settings, choices, columns, methods and models."""


@pytest.mark.slow
@pytest.mark.parametrize("words", HINTS)
def test_the_nearest_name_is_told_once(call, place, words):
    (place / "llama").mkdir()
    (place / "llama" / "config.json").write_text("{}")
    said = told(call, *words.split()).lower()
    assert said.count(HINTS[words]) == 1, said
