"""Who is missing and why: thirty situations, and what terminal, status, rounds.jsonl and page say of each.

Real workers answer real messages in this process (``loopback.py``); the client of ``client-1`` is the one
that something is wrong with. Processes, and what takes time by the clock, have tests of their own
(``test_deaths.py``, ``test_members_lives.py``, ``test_network.py``).
"""

import io
import itertools
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedloom.commands.terminal import Terminal
from fedloom.deployment import worker
from fedloom.deployment.counters import Counts
from fedloom.deployment.folders import ServerFolder, ServerStatus
from fedloom.deployment.run_queue import RunQueue
from fedloom.deployment.run_requests import Asked, RunEvents, run_event_file
from fedloom.deployment.status import server_status, shown
from fedloom.engines.flower import engine as flower
from fedloom.errors import NonFiniteLoss, RoundFailed, TrainingError
from fedloom.experiment.experiment import Experiment
from fedloom.methods.fedavg import FedAvg
from fedloom.reports.run_page import write_report
from fedloom.runs.run import run_experiment
from fedloom.storage.files import lock
from fedloom.wire.envelope import Envelope, ReplyHeader
from loopback import BUILTIN, client_file, resealed

pytestmark = pytest.mark.slow

NODE = 101
"""Of client-1."""


class Site:
    """A federation of three, its server's queue, and the terminal of who watches the run."""

    def __init__(self, loopback, table, folder, monkeypatch):
        self.federation, self.table, self.folder = loopback(3), table, folder
        self.monkeypatch = monkeypatch
        self.console = Console(record=True, width=400, file=io.StringIO())
        self.mail = self.federation.mail(source=BUILTIN)
        self.home = ServerFolder(self.federation.folder / "server")
        self.home.requests.mkdir()
        starting = SimpleNamespace(start=lambda order: 1)
        self.queue = RunQueue(self.home, starting, lambda event, **facts: None, Counts())
        self.rounds = 0
        self.on_round = {}

    # what may be wrong with client-1

    def own(self, policy=None, text=None, **sections):
        """Give client-1 another file."""
        path = self.folder / "own.toml"
        client_file(path, BUILTIN, self.federation.models, policy=policy, **sections)
        if text is not None:
            path.write_text(text)
        self.mail.workers[NODE] = self.federation.worker(1, own=path)

    def rows(self, content, **data):
        """Give client-1 rows of its own."""
        path = self.folder / "rows.jsonl"
        path.write_text(content)
        own = {"source": str(path), "kind": "preference", **data}
        self.own(data={"share": "own", **own})
        self.table["data"] = {
            "source": "clients",
            "kind": "preference",
            "test_source": self.held_out(),
        }
        for client in (0, 2):
            mine = self.folder / f"rows-{client}.jsonl"
            mine.write_text(self.held_out_text())
            file = self.folder / f"own-{client}.toml"
            section = {"source": str(mine), "kind": "preference", "share": "own"}
            client_file(file, BUILTIN, self.federation.models, data=section)
            self.mail.workers[100 + client] = self.federation.worker(client, own=file)

    @staticmethod
    def held_out_text():
        rows = ({"prompt": f"Q{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(12))
        return "".join(json.dumps(row) + "\n" for row in rows)

    def held_out(self):
        path = self.folder / "held-out.jsonl"
        path.write_text(self.held_out_text())
        return str(path)

    def joins_otherwise(self, **said):
        """Have client-1 say something else of itself."""

        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            if node != NODE or header.joined is None:
                return envelope
            joined = header.joined.model_copy(update=said)
            return resealed(self.federation, 1, header.model_copy(update={"joined": joined}), b"")

        self.mail.tamper = tamper

    def answers_otherwise(self, change, joining=False, rounds=(1, 2, 3, 4, 5, 6)):
        """Change what client-1 answers: to the question who it is, or in rounds."""

        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            if (
                node != NODE
                or (header.joined is not None) != joining
                or header.round not in ((0,) if joining else rounds)
            ):
                return envelope
            return change(envelope, header)

        self.mail.tamper = tamper

    def fails(self, error):
        """Have client-1's work fail."""
        plain = FedAvg.handlers

        def handlers(method):
            def train(client, payload):
                if client.id == 1 and client.round:
                    raise error
                return plain(method)["train"](client, payload)

            return {**plain(method), "train": train}

        self.monkeypatch.setattr(FedAvg, "handlers", handlers)

    def after(self, round, change):
        """Do something when so many rounds are over."""
        self.on_round[round] = change

    # the run, and what is said of it

    def play(self, **federation):
        """Play three rounds; return what each place says."""
        own = {
            "rounds": 3,
            "clients": 3,
            "patience": 0.3,
            "quorum": 0.3,
            "require": 1,
            "deadline": 1.0,
        }
        table = {
            **self.table,
            "federation": {**own, **federation},
            "training": {**self.table["training"], "local_steps": 1},
            "evaluation": {"per_client": False, "samples": 0},
        }
        experiment = Experiment.from_table(table)
        run = self.queue.submit(Asked(name="x", cwd="/", text=""))
        self.queue.advance()
        with (
            RunEvents(run_event_file(self.home, run.run_request.id)) as news,
            lock(self.home.playing),
        ):
            engine = self.federation.engine(experiment, self.mail)
            engine.attend = lambda attendance: news.emit("attendance", members=attendance)
            observer = Both(self, news)
            error = None
            try:
                result = run_experiment(experiment, observer=observer, remote=engine)
            except RoundFailed as failed:
                error, result = failed, None
            self.queue.advance()
            status = self.status()
        terminal = self.console.export_text() + (str(error) if error else "")
        if result is None:
            return {"terminal": terminal, "status": status}
        lines = (result.folder / "rounds.jsonl").read_text().splitlines()
        members = {
            own["client"]: own["name"]
            for own in json.loads((result.folder / "run.json").read_text())["members"]
        }
        reasons = []
        for record in map(json.loads, lines):
            out = [(own["name"], own["reason"]) for own in record["absent"] + record["rejected"]]
            out += [
                (members[int(c)], f"quarantine until round {end}")
                for c, end in record["paused"].items()
            ]
            reasons += [f"{name}: {reason}" for name, reason in out]
        page = write_report([result.folder]).read_text()
        return {
            "terminal": terminal,
            "status": status,
            "rounds.jsonl": "\n".join(reasons),
            "page": page[page.index("<h1") :],
        }

    def status(self):
        """The status as a terminal shows it."""
        serving = ServerStatus(host="h", port=9, flower=1, insecure=False, pid=7, since=time.time())
        gateway = SimpleNamespace(presence=dict, open_connections=lambda: (3, 0))
        health = SimpleNamespace(problems=list, warnings=list)
        console = Console(record=True, width=400, file=io.StringIO())
        console.print(shown(server_status(self.home, serving, gateway, self.queue, health)))
        text = console.export_text()
        return text[text.index("run x") :]


class Both:
    """Tells the terminal and the news."""

    def __init__(self, site, news):
        self.site, self.told = site, (Terminal(site.console), news)

    def __getattr__(self, name):
        def tell(*words):
            for own in self.told:
                getattr(own, name)(*words)
            if name == "round_done" and words[0].round in self.site.on_round:
                self.site.on_round.pop(words[0].round)()

        return tell


@pytest.fixture
def site(loopback, table, tmp_path, monkeypatch):
    return Site(loopback, table, tmp_path, monkeypatch)


def gone(site):
    site.mail.offline.add(NODE)


def silent(site):
    site.mail.order = lambda due: [m for m in due if m.metadata.dst_node_id != NODE]


def broken_log(site):
    (site.federation.home(1).path / "audit.jsonl").write_text("{}\n")
    site.mail.workers[NODE] = site.federation.worker(1)


def full_disk(site):
    def fail(*words, **named):
        if words[1].client == 1:
            raise OSError(28, "No space left on device")
        return plain(*words, **named)

    plain = worker.Worker._exchanged
    site.monkeypatch.setattr(worker.Worker, "_exchanged", lambda own, *a: fail(own, *a))


def full_disk_at_the_start(site):
    def fail(own, header, payload):
        if header.client == 1:
            raise OSError(28, "No space left on device")
        return plain(own, header, payload)

    plain = worker.Worker._ready
    site.monkeypatch.setattr(worker.Worker, "_ready", fail)


def forged(site, joining=False):
    site.answers_otherwise(lambda e, h: Envelope(e.header, e.payload), joining)


BAD_ROWS = '{"prompt": "Q?", "chosen": "Yes."}\n' * 9
LOG = "; worker.log on its machine says why"
DOWN = "not connected: its machine, its network or `fedloom client join` is down"
STARTS = {
    "its machine is off": (gone, "not connected since this run began"),
    "it does not answer": (silent, "connected, and has not reported yet whether it can take part"),
    "it was revoked meanwhile": (
        lambda s: s.federation.members().revoke("client-1"), "no longer allowed",
    ),
    "its file is empty": (lambda s: s.rows(""), f"its rows cannot be used as the experiment asks{LOG}"),
    "its rows are not there": (
        lambda s: (s.rows("x"), (s.folder / "rows.jsonl").unlink()),
        f"its rows cannot be used as the experiment asks{LOG}",
    ),
    "its rows are no JSON": (
        lambda s: s.rows("nonsense\n" * 9), f"its rows cannot be used as the experiment asks{LOG}",
    ),
    "its rows lack a column": (
        lambda s: s.rows(BAD_ROWS), f"its rows cannot be used as the experiment asks{LOG}",
    ),
    "its rows are of another kind": (
        lambda s: s.rows("", kind="instruction"),
        "data.kind: the experiment's setting differs from this client's",
    ),
    "it offers no rows": (lambda s: s.own(text=""), "data: this client offers no rows"),
    "its file has a mistake": (lambda s: s.own(text="[data\n"), f"its work failed{LOG}"),
    "its weights are others": (
        lambda s: s.joins_otherwise(model="f" * 64), "its model or tokenizer differs: SHA-256 ff",
    ),
    "its model is not allowed": (
        lambda s: s.own(policy={"models": []}), "policy.models: the experiment asks for what this",
    ),
    "its model is not there": (
        lambda s: s.own(model={"path": str(s.folder / "nowhere")}), f"its model cannot be loaded{LOG}",
    ),
    "its release is another": (
        lambda s: s.joins_otherwise(protocol=1, version="0.0.9"),
        "it has fedloom 0.0.9 (protocol 1), the server 0.1.0 (protocol 3): upgrade the older one",
    ),
    "its method is not allowed": (
        lambda s: s.own(policy={"methods": ["scaffold"]}), "policy.methods: the experiment asks for what",
    ),
    "it allows lower ranks": (
        lambda s: s.own(policy={"max_rank": 1}), "policy.max_rank: the experiment asks for more",
    ),
    "a person must approve": (
        lambda s: s.own(policy={"approve": True}), "waits for a person's approval (policy.approve)",
    ),
    "its disk is full": (full_disk_at_the_start, f"its work failed{LOG}"),
    "its log was changed": (broken_log, f"its own audit log is damaged{LOG}"),
    "its word is forged": (lambda s: forged(s, joining=True), "not signed with the key of client 1"),
}  # fmt: skip
ROUNDS = {
    "its machine goes off": (
        lambda s: s.after(1, lambda: s.mail.offline.add(NODE)), DOWN,
    ),
    "it does not answer in time": (lambda s: s.after(1, lambda: silent(s)), "no answer within 1 seconds"),
    "its disk becomes full": (full_disk, f"its work failed{LOG}"),
    "its work fails": (lambda s: s.fails(TrainingError("it fell over")), f"its work failed{LOG}"),
    "its loss is not finite": (
        lambda s: s.fails(NonFiniteLoss(1, 1, [1], float("nan"))), f"its loss became NaN or infinite{LOG}",
    ),
    "its memory does not suffice": (
        lambda s: s.fails(MemoryError()), "not even one example at a time fits into its memory",
    ),
    "it may play no more rounds today": (
        lambda s: s.own(policy={"max_rounds_a_day": 1}), "policy.max_rounds_a_day: the experiment asks",
    ),
    "its answer is forged": (lambda s: forged(s), "not signed with the key of client 1"),
    "it is revoked": (
        lambda s: s.after(1, lambda: s.federation.members().revoke("client-1")), "no longer allowed",
    ),
    "it is withdrawn": (
        lambda s: s.after(1, lambda: s.federation.members().withdraw("client-1")),
        "withdrawn: it no longer takes part in any run",
    ),
}  # fmt: skip


def require_told(told, words):
    for place, text in told.items():
        text = " ".join(text.replace("&#39;", "'").split())
        assert words in text, (place, text[-3000:])
        assert "client-1" in text, (place, text[-3000:])


@pytest.mark.parametrize("situation", [*STARTS, *ROUNDS])
def test_a_round_without_a_member_says_without_whom_and_why(site, situation):
    change, words = {**STARTS, **ROUNDS}[situation]
    change(site)
    told = site.play()
    assert "2/3" in told["terminal"]
    require_told(told, words)


@pytest.mark.parametrize("situation", STARTS)
def test_a_run_that_asks_for_all_does_not_begin_and_says_for_whom_it_waited(
    site, situation, monkeypatch
):
    assert flower.NOTICE <= 30
    monkeypatch.setattr(flower, "NOTICE", 0.1)
    change, words = STARTS[situation]
    change(site)
    told = site.play(require="all", patience=1.0)
    require_told(told, words)
    assert "2 of 3 clients were ready" in told["terminal"]
    assert "waiting for client-1 (client 1): " in told["terminal"]
    assert "waiting for client-1 (client 1): " in told["status"]


def test_a_member_in_quarantine_is_named_with_the_round_of_its_end(site):
    forged(site)
    site.table["admission"] = {"offences": 1, "pause": 9}
    told = site.play()
    for place in ("terminal", "status", "rounds.jsonl"):
        assert "client-1" in told[place] and "quarantine until round 10" in told[place], told[place]
    assert "1 (client-1)</td>" in told["page"]


def test_a_member_that_is_back_is_said_to_be(site):
    gone(site)
    site.after(1, site.mail.offline.clear)
    told = site.play(rounds=6)
    assert "round 1 begins without client-1 (client 1): not connected" in told["terminal"]
    assert "client-1 (client 1) is back in round" in told["terminal"]
    assert "missing" not in told["status"]


def test_there_are_thirty_situations():
    assert len({*STARTS, *ROUNDS}) >= 30
    assert not set(itertools.chain(STARTS)) & set(ROUNDS)


def test_operators_are_told_what_to_do_about_each():
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    table = page[page.index("## A member is missing") : page.index("## Backups")]
    known = re.findall(
        r"`([^`]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
    )
    starts = [re.split(r"\.\.\.|\bLINE\b|\bA \(|\bN\b", reason)[0].strip() for reason in known]
    for _, words in (*STARTS.values(), *ROUNDS.values()):
        assert any(
            (start and start in words) or words in reason
            for start, reason in zip(starts, known, strict=True)
        ), words
