"""Run by ``test_hostile_server.py`` in a process of its own, whose every `open` is overheard.

Real workers of honest clients are asked by a hostile server for what is listed here. What became of it is
printed as JSON. FOLDER holds what the test has put there; see its fixture.
"""

import json
import logging
import resource
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1] if __name__ == "__main__" else "none")
MODEL, OTHER, EVIL = (FOLDER / name for name in ("model", "other", "evil"))
ROWS, SECRET = FOLDER / "rows.jsonl", FOLDER / "secret.jsonl"
GONE = FOLDER / "gone.jsonl"
PAIRS = {"source": "clients", "kind": "preference", "test_source": "held.jsonl"}

opened, connected = [], []


def overhear(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "glob.glob") and isinstance(arguments[0], str):
        opened.append(arguments[0])
    elif event in ("socket.connect", "subprocess.Popen", "os.exec", "os.system"):
        connected.append(event)


def experiment(**sections):
    """An experiment as an honest server would send it, but for what is given."""
    table = {
        "data": PAIRS,
        "training": {"local_steps": 1},
        "federation": {"clients": 2},
        "evaluation": {"per_client": False},
    }
    return {**table, **{name: {**table.get(name, {}), **own} for name, own in sections.items()}}


def public(**own):
    labelled = {**PAIRS, "kind": "labelled"}
    return experiment(
        method={"name": "distillation"},
        objective={"name": "classification"},
        data=labelled,
        public=own,
    )


MORE = "the experiment asks for more than this client allows"
CLOSED = "the experiment asks for what this client does not allow"

ACCEPTED = {
    # finding 9: what of the experiment chose rows and columns, and now has no effect
    "data.domains": experiment(data={"source": "builtin:preferences", "domains": {"a": {"source": str(SECRET)}},
                                     "test_source": None}),
    "data.source": experiment(data={"source": str(SECRET)}),
    "data.source, several": experiment(data={"source": [str(SECRET), str(ROWS)]}),
    "data.test_source": experiment(data={"test_source": str(SECRET)}),
    "public.source": experiment(public={"source": str(SECRET), "kind": "instruction"}),
    "template": experiment(data={"template": "{ssn}"}),
    "columns": experiment(data={"columns": {"prompt": "ssn", "chosen": "ssn", "rejected": "notes"}}),
    "only": experiment(data={"only": {"ssn": ["S-7"]}}),
    "max_rows": experiment(data={"max_rows": 1}),
    "split and subset": experiment(data={"split": "secret", "subset": "b", "data_dir": str(FOLDER)}),
    "partition.column": experiment(partition={"kind": "column", "column": "ssn"}),
    "continuations": experiment(data={"continuations": {"chosen": "a", "rejected": "b"}, "test_source": None,
                                      "source": str(SECRET)}),
    "builtin rows": experiment(data={"builtin_rows": 10**9}),
    # finding 10: the client's own [model] stands for whatever is named
    "model.path, there": experiment(model={"path": str(OTHER)}),
    "model.path, not there": experiment(model={"path": str(FOLDER / "nowhere")}),
    "model.revision": experiment(model={"path": "a/b", "revision": "refs/pr/1"}),
    "model with code": experiment(model={"path": str(EVIL)}),
    "output": experiment(output={"folder": str(FOLDER / "written"), "trackers": ["tensorboard"]}),
    "training.device": experiment(training={"device": "cuda:7", "threads": 10**6}),
}  # fmt: skip
"""Experiments that the client takes part in as if they had not said it."""

REFUSED = {
    # finding 11
    "local_steps": ("policy.max_steps", experiment(training={"local_steps": 10**9})),
    "local_epochs": ("policy.max_steps", experiment(training={"local_steps": None, "local_epochs": 10**9})),
    "local_examples": ("policy.max_steps", experiment(training={"local_steps": None, "local_examples": 10**12})),
    "total_epochs": ("policy.max_steps", experiment(training={"local_steps": None, "total_epochs": 1e12})),
    "pfedme.steps": ("policy.max_steps", experiment(method={"name": "pfedme", "steps": 10**9})),
    "passes": ("policy.max_steps", experiment(method={"name": "fedavg_ft", "passes": 10**9})),
    "newcomer_steps": ("policy.max_steps", experiment(clients={"newcomers": [0], "newcomer_steps": 10**9},
                                                      evaluation={"per_client": True})),
    "rank": ("policy.max_rank", experiment(adapter={"rank": 10**7})),
    "clients": ("policy.max_clients", experiment(federation={"clients": 10**8})),
    "batch_size": ("policy.max_batch", experiment(training={"batch_size": 10**9})),
    "max_length": ("policy.max_tokens", experiment(data={"max_length": 10**9})),
    "max_new_tokens": ("policy.max_tokens", experiment(evaluation={"max_new_tokens": 10**9})),
    "virtual_tokens": ("policy.max_width", experiment(adapter={"kind": "prompt", "virtual_tokens": 10**7})),
    "bottleneck": ("policy.max_width", experiment(method={"name": "fedpdpo", "bottleneck": 10**7})),
    "checkpoint_every": ("policy.max_checkpoint_every", experiment(output={"checkpoint_every": 10**9})),
    # what a method would show
    "centralised": ("policy.methods", experiment(method={"name": "centralised"}, data={
        "source": "builtin:preferences", "test_source": None})),
    "fedmoe": ("policy.expert_probes", experiment(method={"name": "fedmoe"}, adapter={"kind": "submixture"})),
    "regmean": ("policy.inner_products", experiment(method={"name": "regmean"})),
    "group's model": ("policy.models", experiment(
        method={"name": "local_only"}, clients={"groups": {"a": {"clients": [0], "model": str(OTHER)}}})),
    "kind": ("data.kind", experiment(data={"kind": "feedback"}, objective={"name": "kto"})),
    "no experiment": ("experiment", "x = ["),
    "deep": ("experiment", "x = " + "[" * 100_000),
    "long": ("experiment", "#" * (1 << 20)),
}  # fmt: skip
"""What the client refuses, by which line."""

PROBES = {
    "model.path": [
        experiment(model={"path": str(path)})
        for path in (OTHER, EVIL, FOLDER / "no", "/etc/passwd")
    ],
    "group's model": [
        experiment(
            method={"name": "local_only"},
            clients={"groups": {"a": {"clients": [0], "model": str(path)}}},
        )
        for path in (OTHER, FOLDER / "no")
    ],
    "data.source": [experiment(data={"source": str(path)}) for path in (SECRET, GONE, FOLDER)],
    "data.test_source": [experiment(data={"test_source": str(path)}) for path in (SECRET, GONE)],
    "public.source": [public(source=str(path), kind="labelled") for path in (SECRET, GONE)],
    "partition.column": [
        experiment(partition={"kind": "column", "column": name}) for name in ("ssn", "nothing")
    ],
    "template": [experiment(data={"template": text}) for text in ("{ssn}", "{nothing}")],
    "columns": [experiment(data={"columns": {"prompt": name}}) for name in ("ssn", "nothing")],
}
"""Experiments that differ in what there is and what there is not: every client must say the same to all."""


def worker(name, **sections):
    """A client's worker, joined to nobody."""
    from fedloom.deployment.folders import ClientFolder, Registration
    from fedloom.deployment.worker import Worker
    from fedloom.settings.toml import write_toml

    home = ClientFolder(FOLDER / name)
    home.path.mkdir()
    path = home.path / "my.toml"
    path.write_text(write_toml(sections))
    home.write_registration(
        Registration(
            gateway="localhost:9", number=0, name="n", key=str(FOLDER / "client.key"), own=str(path)
        )
    )
    return Worker(home)


OWN_ROWS = {
    "source": str(ROWS),
    "kind": "preference",
    "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
}


def main():
    from fedloom.training import steps as local
    from hostile import HostileServer

    logging.basicConfig(filename=FOLDER / "worker.log", level=logging.INFO)
    with_model = HostileServer(worker("one", data=OWN_ROWS, model={"path": str(MODEL)}))
    without = HostileServer(worker("two", data=OWN_ROWS))
    nothing = HostileServer(worker("three", model={"path": str(MODEL)}))
    steps, update = [], local.update

    def counted(*arguments, **named):
        steps.append(1)
        return update(*arguments, **named)

    local.update = counted
    # everything lazy is imported, and the honest rows are read, before anybody listens
    with_model.join(experiment())
    found = {"accepted": {}, "refused": {}, "probes": {}}
    sys.addaudithook(overhear)
    for name, table in ACCEPTED.items():
        opened.clear()
        run, _, reply = with_model.join(table)
        if reply.error is None:
            asked = with_model.exchange(run)
            parts = with_model.worker.run.parts
            texts = parts.encoder.tokenizer.decode(parts.local.shares[0].tokens.tokens.tolist())
            found["accepted"][name] = {
                "rows": reply.joined.rows, "error": asked.error, "opened": sorted(set(opened)),
                "texts": texts, "columns": [list(row.columns) for row in parts.division.train[0]],
                "max_length": parts.max_length,
            }  # fmt: skip
        else:
            found["accepted"][name] = {"error": reply.error, "opened": sorted(set(opened))}
    steps.clear()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (_, table) in REFUSED.items():
        opened.clear()
        start = time.monotonic()
        _, _, reply = with_model.join(table)
        found["refused"][name] = {
            "told": reply.error, "opened": sorted(set(opened)), "seconds": time.monotonic() - start,
        }  # fmt: skip
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # KiB
    found["refused"]["classes"] = {
        "told": with_model.join(experiment(), [str(i) for i in range(10**6)])[2].error,
        "opened": [], "seconds": 0.0,
    }  # fmt: skip
    found["steps"] = len(steps)
    for name, tables in PROBES.items():
        found["probes"][name] = {
            who: [whole(server, table) for table in tables]
            for who, server in (("one", with_model), ("two", without), ("three", nothing))
            if who != "two" or "model" in name  # what it may load, the tiny one, takes long to make
        }
    found["connected"] = connected
    found["written"] = (FOLDER / "written").exists()
    print(json.dumps(found))


def whole(server, table):
    """The reply to an experiment with all its bytes, but for the ids of run and message."""
    run, envelope, reply = server.join(table)
    envelope_text = envelope.header.decode().replace(run, "RUN")
    return envelope_text.replace(f'"number":{reply.number}', '"number":0')


if __name__ == "__main__":
    main()
