"""A plugin: a federation whose machines are objects of this process, reached by real messages of Flower.

The workers are real ones, and what they are sent is packed, signed and unpacked as between machines; only
sockets and processes are missing. ``tests/deployment/test_processes.py`` has those.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from fedloom.deployment.folders import ClientFolder, Registration
from fedloom.deployment.worker import Worker
from fedloom.engines.flower.engine import FlowerEngine
from fedloom.engines.flower.records import from_records, to_records
from fedloom.engines.flower.run_clients import RunClients
from fedloom.engines.flower.transport import FlowerTransport
from fedloom.experiment.experiment import Experiment
from fedloom.federation.records import Participant
from fedloom.federation.violations import ViolationObserver
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.security.certificates import make_authority
from fedloom.security.client_registry import Members
from fedloom.security.keys import make_key, read_key, sign
from fedloom.settings.toml import write_toml
from fedloom.wire.envelope import Envelope, ReplyHeader, seal

OPEN = dict.fromkeys(
    (
        "logits",
        "activations",
        "targets",
        "embeddings",
        "first_tokens",
        "expert_probes",
        "inner_products",
        "grades",
        "public_rows",
    ),
    True,
)
"""Every line of a client's policy that lets something out."""

MANY = {"max_rounds_a_day": 1_000_000, "max_runs_a_day": 1_000_000}


BUILTIN = "builtin:preferences"

ADAPTERS = {
    "fedamole": {"kind": "experts", "rank": 2, "experts": 4},
    "fedlease": {"kind": "experts", "rank": 2, "experts": 3, "router": "linear"},
    "ravan": {"rank": 4},
    "hilora": {"rank": 3},
}


def builtin(experiment):
    """The built-in rows that clients offer for an experiment."""
    source = experiment.data.source
    return source if str(source).startswith("builtin:") else BUILTIN


def client_file(path, source=BUILTIN, models=(), policy=None, **sections):
    """Write a client's file that offers its share of built-in rows and opens every line; return its path."""
    table = {
        "data": {"source": source, "share": "experiment"},
        "policy": {"models": list(map(str, models)), **OPEN, **MANY, **(policy or {})},
        **sections,
    }
    path.write_text(write_toml(table))
    return path


@dataclass
class LoopMail:
    """Stands for Flower: nodes, and messages that workers answer when replies are asked for.

    Attributes:
        workers: By node.
        offline: Nodes that cannot be reached.
        tamper: Changes the reply of a node, or returns an error's text.
        order: Arranges the replies that are there.
        pushed: What was sent: node, header and payload.
        pulled: What came back, as it was sent.
    """

    workers: dict
    offline: set = field(default_factory=set)
    tamper: object = lambda node, envelope: envelope
    order: object = list
    pushed: list = field(default_factory=list)
    pulled: list = field(default_factory=list)
    _waiting: dict = field(default_factory=dict)
    _ids: object = field(default_factory=itertools.count)

    def get_nodes(self):
        state = {True: "offline", False: "online"}
        return [
            SimpleNamespace(node_id=node, status=state[node in self.offline])
            for node in self.workers
        ]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            id = f"message-{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = id
            self._waiting[id] = message
            envelope = from_records(message.content)
            self.pushed.append((message.metadata.dst_node_id, envelope))
            ids.append(id)
        return ids

    def pull_messages(self, message_ids):
        due = [self._waiting[id] for id in message_ids if id in self._waiting]
        replies = []
        for message in self.order(due):
            node = message.metadata.dst_node_id
            if node in self.offline:
                continue
            del self._waiting[message.metadata.message_id]
            replies.append(self._reply(node, message))
        return [reply for reply in replies if reply is not None]

    def _reply(self, node, message):
        packed = self.workers[node].answer(from_records(message.content).pack(), streamed=False)
        self.pulled.append((node, Envelope.unpack(packed)))
        reply = self.tamper(node, Envelope.unpack(packed))
        if reply is None:
            return None
        if isinstance(reply, str):
            return Message(Error(code=1, reason=reply), reply_to=message)
        return Message(to_records(reply), reply_to=message)


@dataclass
class Loopback:
    """A federation: folders, keys and workers of its clients."""

    folder: Path
    clients: int
    models: tuple = ()

    def __post_init__(self):
        make_authority(self.folder / "server", ["localhost"])
        members = self.members()
        for number in range(self.clients):
            public = make_key(self.folder / f"{number}.key")
            members.allow(f"client-{number}", public.read_text())

    def members(self):
        return Members(self.folder / "server" / "members.toml")

    def home(self, number):
        return ClientFolder(self.folder / f"client-{number}")

    def worker(self, number, own=None, source=BUILTIN):
        """Return a client's worker as it is after a start of its machine."""
        home = self.home(number)
        home.path.mkdir(exist_ok=True)
        own = own or client_file(home.path / "my.toml", source, self.models)
        home.write_registration(
            Registration(
                gateway="localhost:9",
                number=number,
                name=f"client-{number}",
                key=str(self.folder / f"{number}.key"),
                authority=str(self.folder / "server" / "ca.pem"),
                own=str(own),
            )
        )
        return Worker(home)

    def mail(self, own=None, source=BUILTIN, **changes):
        files = own or {}
        workers = {100 + n: self.worker(n, files.get(n), source) for n in range(self.clients)}
        return LoopMail(workers, **changes)

    def engine(self, experiment, mail=None, proven=True, watch=None, streams=None):
        """Return the engine that reaches the clients by messages, and by streams if there is a place.

        ``proven``: whether a node's messages are known to be its client's, as with TLS.
        """
        server = self.folder / "server"
        key = read_key(server / "server.key")
        post = FlowerTransport(
            mail or self.mail(source=builtin(experiment)),
            lambda header: sign(key, header),
            (server / "server.pem").read_text(),
            streams,
            proven,
        )
        owners = {100 + number: number for number in range(self.clients)}
        roster = RunClients(
            self.members,
            [Participant(number, f"client-{number}") for number in range(self.clients)],
            experiment.clients.newcomers,
            owners=lambda: owners,
            proven=proven,
        )
        return FlowerEngine(post, experiment.federation, roster, watch or ViolationObserver())


@pytest.fixture
def loopback(tmp_path, monkeypatch, model_folder, mixture_folder):
    """Make a federation of so many clients."""
    monkeypatch.setattr("fedloom.engines.flower.engine.POLL", 0.001)
    monkeypatch.setattr("fedloom.engines.flower.engine.LOOK", 0.001)
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    folders = map("federation-{}".format, itertools.count())
    models = (model_folder, mixture_folder)
    return lambda clients: Loopback(tmp_path / next(folders), clients, models)


@pytest.fixture
def deployed(table, loopback, tmp_path):
    """Run a small experiment over machines; returns records, audit lines and the engine."""

    def run(clients=3, break_=lambda mail, federation: None, **sections):
        settings = {
            **table,
            "evaluation": {**table["evaluation"], "per_client": False, "samples": 0},
            "training": {**table["training"], "local_steps": 1},
        }
        for name, section in sections.items():
            settings[name] = {**settings.get(name, {}), **section}
        own = {"clients": clients, "patience": 1.0, "quorum": 0.3, "require": 1}
        settings["federation"] = {**table["federation"], **own, **sections.get("federation", {})}
        experiment = Experiment.from_table(settings)
        federation = loopback(clients)
        mail = federation.mail(source=builtin(experiment))
        break_(mail, federation)
        engine = federation.engine(experiment, mail)
        result = run_experiment(experiment, observer=Silent(), remote=engine)
        return Outcome(result.folder, engine, mail, federation)

    return run


@pytest.fixture
def suited(table, mixture_folder):
    """Make the experiment of a method."""

    def make(method):
        own = {**table, "adapter": {**table["adapter"], **ADAPTERS.get(method, {})}}
        if method == "fedmoe":
            own |= {"adapter": {"kind": "submixture"}, "model": {"path": str(mixture_folder)}}
        if method in ("distillation", "fed_et", "feddm", "split"):
            own |= {"objective": {"name": "classification"}}
            own |= {
                "data": {"source": "builtin:labelled"},
                "public": {"rows": 8},
            }
        if method == "fedgrpo":
            own |= {"data": {"source": "builtin:sums"}, "public": {"rows": 8}}
            own |= {"objective": {"name": "grpo", "group": 3, "max_new_tokens": 3}}
        if method == "split":
            own |= {"evaluation": {**table["evaluation"], "per_client": False}}
        own["data"] = {**own["data"], "builtin_rows": 30}
        own["training"] = {**table["training"], "local_steps": 2}
        few = {"selectors": 1} if method == "fedbiscuit" else {}  # few rounds
        return {**own, "method": {"name": method, **few}}

    return make


class Outcome:
    def __init__(self, folder, engine, mail, federation):
        self.folder, self.engine = Path(folder), engine
        self.mail, self.federation = mail, federation

    def lines(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def rounds(self):
        return [record for record in self.lines("rounds.jsonl") if record["round"]]

    def events(self, name):
        return [event for event in self.lines("audit.jsonl") if event["event"] == name]

    @property
    def states(self):
        return [event["state"] for event in self.events("round")]


def of(record, client):
    """Why a client was left out of a round."""
    rejected = {r["client"]: r["reason"] for r in record["rejected"]}
    return rejected.get(client)


def tampering(client, change, rounds=(1, 2)):
    """Have a client's replies to exchanges changed."""

    def break_(mail, federation):
        def tamper(node, envelope):
            header = envelope.read(ReplyHeader)
            if node != 100 + client or header.joined or header.round not in rounds:
                return envelope
            return change(envelope, header, federation)

        mail.tamper = tamper

    return break_


def resealed(federation, client, header, payload):
    key = read_key(federation.folder / f"{client}.key")
    anew = header.model_copy(update={"payload": ""})
    return seal(anew, payload, lambda text: sign(key, text))
