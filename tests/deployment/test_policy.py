"""A client's worker under its policy: what is refused, what waits for a person, what a day holds."""

import io
import json
import re
import time
from datetime import UTC, datetime, timedelta

import pytest

from fedloom.data.loading import load_examples
from fedloom.deployment import client_check
from fedloom.deployment.client_check import check, waiting_run, waiting_table
from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.consent import MOST_WAITING, Approvals, Day
from fedloom.deployment.error_report import (
    LINES,
    ReportedError,
    Sentence,
    failing_as,
    text_for_server,
)
from fedloom.deployment.policy import PolicySettings
from fedloom.errors import (
    AuditError,
    DataError,
    MessageError,
    NonFiniteLoss,
    PolicyError,
    Refusal,
    RoundFailed,
    SettingsError,
)
from fedloom.evaluation.generate import load_encoder
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.settings.toml import write_toml
from fedloom.wire.envelope import ReplyHeader
from fedloom.wire.schema import Schema
from hostile import HostileServer
from loopback import client_file

MORE = "the experiment asks for more than this client allows"


@pytest.fixture
def small(table):
    """A small experiment as a table, of one step a round."""
    return {
        **table,
        "training": {**table["training"], "local_steps": 1},
        "evaluation": {**table["evaluation"], "per_client": False, "samples": 0},
    }


@pytest.fixture
def server(loopback, table, tmp_path):
    """A server that asks a client of a federation of three, whose file is built-in rows and a policy."""

    def make(client=0, **policy):
        federation = loopback(3)
        path = client_file(tmp_path / "my.toml", models=[table["model"]["path"]], policy=policy)
        return HostileServer(federation.worker(client, path))

    return make


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# What is told


def test_few_sentences_are_ever_said(caplog):
    secrets = "row 7 of /data/miller.jsonl: Mrs Miller, HIV"
    errors = [
        DataError(secrets), MessageError(secrets), ValueError(secrets), KeyError(secrets),
        FileNotFoundError(2, secrets), SettingsError([secrets]), AuditError(secrets), MemoryError(),
        NonFiniteLoss(0, 3, [7, 8], float("nan")), RoundFailed(secrets),
        PolicyError(Refusal("policy.max_rank", secrets), Refusal("policy.models", secrets)),
        PolicyError(Refusal(secrets, secrets)), ReportedError(Sentence.WAITS),
    ]  # fmt: skip
    allowed = {sentence.value for sentence in Sentence}
    allowed |= {f"{line}: {said}" for line, said in LINES.items()}
    for error in errors:
        caplog.clear()
        said = text_for_server(error)
        assert set(said.split("; policy.")[0:1]) <= allowed or said in allowed
        assert "Miller" not in said and "row 7" not in said and "/data" not in said
        assert str(error) in caplog.text or not str(error)
    assert text_for_server(PolicyError(*errors[10].refusals[:1])) == f"policy.max_rank: {MORE}"


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), DataError("x"), KeyError("x")]
)
def test_which_error_it_was_is_not_said(error):
    def said(sentence):
        try:
            with failing_as(sentence):
                raise error
        except ReportedError as found:
            return text_for_server(found)

    assert said(Sentence.READING) == Sentence.READING.value
    rows = isinstance(error, DataError)  # none is left once they are tokenised
    assert said(Sentence.LOADING) == (Sentence.READING if rows else Sentence.LOADING).value


def test_what_the_policy_refuses_inside_is_not_hidden_by_the_sentence():
    with pytest.raises(PolicyError), failing_as(Sentence.READING):
        raise PolicyError(Refusal("data", "none"))


# What is refused


def test_the_server_is_told_the_line_and_the_log_the_rest(server, small, caplog):
    found = server()
    _, _, reply = found.join({**small, "adapter": {"rank": 300}})
    assert reply.error == f"policy.max_rank: {MORE}" and reply.joined is None
    assert "adapter.rank = 300 is above 256" in caplog.text


def test_a_model_that_is_there_and_one_that_is_not_are_refused_in_the_same_bytes(server, small):
    found, replies = server(models=[]), set()
    for path in (small["model"]["path"], "/nowhere", "/etc/passwd", "someone/something"):
        run, envelope, reply = found.join({**small, "model": {"path": str(path)}})
        text = envelope.header.decode().replace(run, "RUN")
        replies.add(text.replace(f'"number":{reply.number}', '"number":0'))
    assert len(replies) == 1 and "policy.models" in replies.pop()


def test_what_is_refused_costs_the_run_under_way_nothing(server, small):
    found = server()
    run, _, _ = found.join(small)
    assert found.join({**small, "adapter": {"rank": 300}})[2].error
    assert found.exchange(run).error is None


def test_a_run_goes_on_without_a_client_that_refuses(loopback, small, table, tmp_path):
    federation = loopback(2)
    model = [table["model"]["path"]]
    strict = client_file(tmp_path / "strict.toml", models=model, policy={"max_rank": 1})
    small |= {"federation": {"clients": 2, "rounds": 1, "patience": 0.3, "require": 1}}
    experiment = Experiment.from_table(small)
    engine = federation.engine(experiment, federation.mail(own={1: strict}))
    folder = run_experiment(experiment, observer=Silent(), remote=engine).folder
    refused = [e for e in json_lines(folder / "audit.jsonl") if e["event"] == "refused_join"]
    assert refused and all(event["reason"] == f"policy.max_rank: {MORE}" for event in refused)


def test_work_that_takes_too_long_is_stopped_and_nothing_of_it_is_kept(server, small, monkeypatch):
    small |= {"method": {"name": "scaffold"}, "training": {"local_steps": 50}}
    found = server(max_seconds=0.05, max_steps=100)
    run, _, reply = found.join(small)
    assert reply.error is None
    engine, passes = found.worker.run.parts.local, []
    model = engine.resources[0].model.model
    forward = model.forward

    def slow(*arguments, **options):
        passes.append(1)
        time.sleep(0.02)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow)
    names = [
        f"{part}/{name}" for part in ("adapter", "control") for name in engine.resources[0].initial
    ]
    assert names
    header = ask_scaffold(found, run)
    assert header.error == f"policy.max_seconds: {MORE}"
    assert len(passes) < 10 and not engine.store.flat().get(0)
    assert not list((found.worker.client_folder.run(run) / "kept").glob("*"))


def ask_scaffold(found, run):
    """Ask a client of scaffold to train."""
    from fedloom.methods.bases.parameter_averaging import LEARNING_RATE, TRAIN_REPLY_NUMBERS
    from fedloom.tensors import join_parts
    from fedloom.training.results import reported
    from fedloom.wire.messages import Payload, encode

    adapter = found.worker.run.parts.local.resources[0].initial
    both = join_parts(adapter=adapter, control={n: 0 * t for n, t in adapter.items()})
    schema = Schema.of(both, (LEARNING_RATE,))
    answer = Schema.of(both, TRAIN_REPLY_NUMBERS, reported(found.worker.run.parts.objective))
    return found.send(
        encode(Payload(both, {"learning_rate": 1e-3}), schema),
        kind="exchange", run=run, action="train", round=1, client=0,
        request=schema.to_table(), reply=answer.to_table(),
    )[1]  # fmt: skip


def test_batches_beyond_the_bound_are_not_computed(server, small):
    found = server(max_steps=5)
    for work in ({"local_steps": 6}, {"local_epochs": 3}, {"local_examples": 10**6}):
        training = {"learning_rate": 1e-3, "batch_size": 8, **work}
        assert found.join({**small, "training": training})[2].error == f"policy.max_steps: {MORE}"
    training = {
        "learning_rate": 1e-3,
        "batch_size": 8,
        "local_tokens": 10**4,
    }  # 3 to 10,000 batches
    run, _, reply = found.join({**small, "training": training})
    assert reply.error is None
    header = found.exchange(run)
    assert header.error == f"policy.max_steps: {MORE}"
    assert [work.steps for work in header.work if work.phase == "train"] == [0]


@pytest.mark.parametrize(
    ("which", "shape", "error"),
    [
        ("reply", [10**11], f"policy.max_bytes: {MORE}"),
        ("request", [10**11], f"policy.max_bytes: {MORE}"),
        ("reply", [10**15], Sentence.UNFIT.value),  # no schema may have that
        ("request", [10**9, 10**9, 10**9], Sentence.UNFIT.value),
        ("reply", [-(10**6), 10**6], Sentence.UNFIT.value),
    ],
)
def test_schemas_beyond_the_bound_are_refused_before_anything_is_made(
    server, small, which, shape, error
):
    found = server()
    run, _, _ = found.join(small)
    table = {"tensors": [["x", shape, "float32", True]], "numbers": [], "metrics": []}
    assert found.exchange(run, **{which: table}).error == error


def test_a_request_whose_own_tensors_are_coded_is_none(server, small):
    """A few bytes of a codec may stand for gigabytes; honest servers send changes as bytes within a request."""
    found = server()
    run, _, _ = found.join(small)
    coded = [["x", [1 << 18, 1 << 18], "float32", False, "low_rank:1|sign:block=256|zstd"]]
    table = {"tensors": coded, "numbers": [], "metrics": []}
    assert found.exchange(run, request=table).error == Sentence.UNFIT.value


def test_rounds_and_runs_of_a_day_are_counted_on_disk(server, small):
    found = server(max_rounds_a_day=3, max_runs_a_day=2)
    run, _, _ = found.join(small)
    assert [found.exchange(run, round=n).error for n in (1, 2, 3)] == [None] * 3
    over = f"policy.max_rounds_a_day: {MORE}"
    assert found.exchange(run, round=4).error == over
    again = HostileServer(type(found.worker)(found.worker.client_folder))  # as after a restart
    again.numbers = found.numbers
    again.join(small, run=run)
    assert again.exchange(run, round=5).error == over
    assert again.join(small, run="a" * 32)[2].error is None
    assert again.join(small, run="b" * 32)[2].error == f"policy.max_runs_a_day: {MORE}"


def test_the_same_work_twice_in_a_round_counts_twice(server, small):
    found = server(max_rounds_a_day=2)
    run, _, _ = found.join(small)
    errors = [found.exchange(run, round=1).error for _ in range(3)]
    assert errors == [None, None, f"policy.max_rounds_a_day: {MORE}"]


def test_a_day_ends(server, tmp_path):
    day, policy = Day(tmp_path / "today.toml"), PolicySettings(max_rounds_a_day=1, max_runs_a_day=1)
    day.begin_run("a", "x", policy)
    day.begin_run("a", "x", policy)  # the worker idled in between
    with pytest.raises(PolicyError, match="max_runs_a_day"):
        day.begin_run("b", "x", policy)
    day.begin_work(("a", 1, 1), "train", policy, going_on=False)
    day.begin_work(("a", 1, 1), "evaluate", policy, going_on=False)
    day.begin_work(("a", 1, 1), "evaluate", policy, going_on=True)
    with pytest.raises(PolicyError, match="max_rounds_a_day"):
        day.begin_work(("a", 1, 1), "train", policy, going_on=False)
    text = (tmp_path / "today.toml").read_text()
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    yesterday = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    (tmp_path / "today.toml").write_text(text.replace(today, yesterday))
    day.begin_run("b", "x", policy)
    day.begin_work(("b", 1, 1), "train", policy, going_on=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["split", "fedamole", "fdlora", "flora"])
def test_a_round_of_many_exchanges_is_one(loopback, small, method, tmp_path):
    """A policy that allows as many rounds as the run has lets it through to its end."""
    if method == "split":
        small |= {"objective": {"name": "classification"}}
        small |= {"data": {"source": "builtin:labelled", "builtin_rows": 60}}
    if method == "fedamole":
        small |= {"adapter": {"kind": "experts", "rank": 2, "experts": 4}}
    own = {"clients": 3, "rounds": 2, "patience": 1.0}
    small |= {"method": {"name": method}, "federation": own}
    small["training"] = {**small["training"], "local_steps": 3}
    experiment = Experiment.from_table(small)
    federation = loopback(3)
    rounds = {"max_rounds_a_day": 3}  # 0, the evaluation before any training, 1 and 2
    path = client_file(
        tmp_path / "own.toml", experiment.data.source, federation.models, policy=rounds
    )
    mail = federation.mail(own=dict.fromkeys(range(3), path))
    folder = run_experiment(
        experiment, observer=Silent(), remote=federation.engine(experiment, mail)
    ).folder
    records = json_lines(folder / "rounds.jsonl")
    assert len(records) == 3 and not any(record["rejected"] for record in records)


def test_a_message_for_another_client_is_told_in_a_sentence(server, small):
    found = server()
    run, _, _ = found.join(small)
    _, header = found.send(kind="exchange", run=run, action="train", round=1, client=2)
    assert header.error == Sentence.FOREIGN.value
    _, header = found.send(kind="exchange", run="f" * 32, action="train", round=1, client=0)
    assert header.error == Sentence.ANEW.value


# Rows


def own_rows(path, rows_file, table, **data):
    rows = [
        {"question": f"Who is {i}?", "good": f"It is {i}.", "bad": "No.", "ssn": f"S-{i}"}
        for i in range(30)
    ]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    source = {"source": rows_file(rows), "kind": "preference", "columns": columns}
    own = {"data": {**source, **data}, "model": {"path": table["model"]["path"]}}
    path.write_text(write_toml(own))
    return path


def test_columns_that_are_not_named_reach_neither_tokens_nor_memory(
    loopback, small, table, rows_file, tmp_path
):
    path = own_rows(tmp_path / "own.toml", rows_file, table)
    found = HostileServer(loopback(1).worker(0, path))
    hostile = {"template": "{ssn}", "columns": {"prompt": "ssn"}, "only": {"ssn": ["S-1"]}}
    small["data"] = {"source": "x.jsonl", "kind": "preference", **hostile}
    assert found.join(small)[2].error is None
    parts = found.worker.run.parts
    texts = parts.encoder.tokenizer.decode(parts.local.shares[0].tokens.tokens.tolist())
    assert "Who is" in texts and "S-" not in texts
    assert not any(row.columns for row in parts.division.train[0])


def test_classes_that_the_coordinator_does_not_have_are_its_own_affair(
    loopback, small, table, rows_file, tmp_path
):
    rows = [{"text": f"word {i}", "label": f"kind {i % 3}"} for i in range(30)]
    own = {"data": {"source": rows_file(rows), "kind": "labelled"}}
    (tmp_path / "own.toml").write_text(
        write_toml({**own, "model": {"path": table["model"]["path"]}})
    )
    found = HostileServer(loopback(1).worker(0, tmp_path / "own.toml"))
    small |= {"objective": {"name": "classification"}, "data": {"source": "builtin:labelled"}}
    small["federation"] = {"clients": 1}
    assert found.join(small, ["kind 0", "kind 1"])[2].error == Sentence.READING.value
    assert found.join(small, ["kind 0", "kind 1", "kind 2"])[2].error is None


# Approval


def test_a_run_waits_until_a_person_has_let_it_in(server, small, monkeypatch, call):
    found = server(approve=True)
    home = found.worker.client_folder
    text = write_toml(small)
    run, _, reply = found.join(text, run="3f" * 16)
    assert reply.error == "waits for a person's approval (policy.approve)"
    assert found.worker.run is None
    listed = call("client", "approve", "--home", home.path)[1]
    assert "3f3f3f3f" in listed and "dpo with fedavg" in listed
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, out = call("client", "approve", "3f3f", "--home", home.path)
    assert code == 0 and "goes on waiting" in out and not Approvals(home).has(run, text)
    assert "What leaves this machine" in out and "adapters" in out and "Protection" in out
    assert found.join(text, run=run)[2].error == Sentence.WAITS.value
    code, out = call("client", "approve", "3f3f", "--yes", "--home", home.path)
    assert code == 0 and "run 3f3f3f3f is approved" in out
    assert found.join(text, run=run)[2].error is None
    assert call("client", "approve", "--home", home.path)[1].strip() == "no run waits for approval"


def test_another_experiment_under_the_same_run_is_not_let_in(server, small):
    found = server(approve=True)
    run, _, _ = found.join(small)
    approvals = Approvals(found.worker.client_folder)
    approvals.approve(approvals.find(run[-4:] if run.startswith(run[-4:]) else run[:8]))
    other = {**small, "training": {**small["training"], "local_steps": 9}}
    assert found.join(other, run=run)[2].error == Sentence.WAITS.value
    assert found.join(small, run=run)[2].error is None


def test_what_is_refused_does_not_wait(server, small):
    found = server(approve=True)
    assert found.join({**small, "adapter": {"rank": 300}})[2].error == f"policy.max_rank: {MORE}"
    assert Approvals(found.worker.client_folder).waiting() == []


def test_a_run_between_machines_begins_when_the_person_has_agreed(
    loopback, small, table, tmp_path, monkeypatch
):
    monkeypatch.setattr("fedloom.engines.flower.run_clients.AGAIN", 0.05)
    federation = loopback(1)
    path = client_file(
        tmp_path / "o.toml", models=[table["model"]["path"]], policy={"approve": True}
    )
    small["federation"] = {"clients": 1, "rounds": 1, "patience": 20.0}
    experiment = Experiment.from_table(small)
    mail, approvals, asked = federation.mail(own={0: path}), Approvals(federation.home(0)), []

    def agree(node, envelope):
        header = envelope.read(ReplyHeader)
        if header.error == Sentence.WAITS.value:
            asked.append(header.number)
            if len(asked) == 3:
                approvals.approve(approvals.waiting()[0])
        return envelope

    mail.tamper = agree
    folder = run_experiment(
        experiment, observer=Silent(), remote=federation.engine(experiment, mail)
    ).folder
    assert len(asked) == 3 and len(json_lines(folder / "rounds.jsonl")) == 2


def test_runs_that_wait_do_not_fill_the_disk(server, small):
    found = server(approve=True)
    for number in range(MOST_WAITING + 5):
        found.join(small, run=f"{number:032x}")
    waiting = Approvals(found.worker.client_folder).waiting()
    assert len(waiting) == MOST_WAITING and waiting[0].run == f"{MOST_WAITING + 4:032x}"
    with pytest.raises(SettingsError, match=r"several runs that wait begin with '0'"):
        Approvals(found.worker.client_folder).find("0")
    with pytest.raises(SettingsError, match=r"no run that waits begins with 'x'"):
        Approvals(found.worker.client_folder).find("x")


def test_a_servers_words_move_no_cursor(server, small):
    found = server(approve=True, models=["\x1b[2J\x1b[1;31mevil[/bold]"])
    small["model"] = {"path": "\x1b[2J\x1b[1;31mevil[/bold]"}
    run, _, reply = found.join(small)
    assert reply.error == Sentence.WAITS.value
    home = found.worker.client_folder
    shown = rendered(waiting_table(home)) + rendered(
        waiting_run(home, Approvals(home).find(run)).shown
    )
    assert "\x1b" not in shown and "evil[/bold]" in shown.replace("\n", "")


def rendered(content, width=120):
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(content, highlight=False)
    return captured.get()


# Checking


def test_checking_says_what_a_file_means(small, table, rows_file, tmp_path):
    path = own_rows(tmp_path / "own.toml", rows_file, table, max_bad_share=0.5)
    experiment = tmp_path / "x.toml"
    small["data"] = {"source": "x.jsonl", "kind": "preference", "template": "{ssn}"}
    experiment.write_text(write_toml(small))
    look = check(path, experiment, 0)
    text = re.sub(r"\s+", " ", rendered(look.shown, 80))
    assert look.sound
    for said in (
        "all of them are this client's", "30 can be used", "of which here: 30 read = 30 trained on",
        "prompt from column 'question'", "Who is", "No.", "yes adapters", "no logits",
        "no targets", "max_rank 256", "This client could take part",
        "This file decides, not the experiment: data.columns, data.max_bad_share, data.source",
    ):  # fmt: skip
        assert said in text, said
    assert "S-1" not in text


def test_checking_says_what_noise_a_client_adds_itself(small, table, rows_file, tmp_path):
    path, experiment = tmp_path / "own.toml", tmp_path / "x.toml"
    asked = {"require": "client", "distributed_noise": True, "trust_first_use": True}
    rows = rows_file([{"prompt": "Who?", "chosen": "I am.", "rejected": "No."}] * 4)
    own = {"source": str(rows), "kind": "preference"}
    file = {"data": own, "model": {"path": table["model"]["path"]}, "policy": {"privacy": asked}}
    path.write_text(write_toml(file))
    shared = {"unit": "client", "noise": "distributed", "delta": 1e-3, "target_epsilon": 3.0}
    small["data"] = {"source": "x.jsonl", "kind": "preference"}
    small["federation"] = {"clients": 3, "rounds": 1}
    small["evaluation"] = {"per_client": False}
    small["privacy"] = {**shared, "secure_aggregation": True}
    experiment.write_text(write_toml(small))
    look = check(path, experiment, 0)
    text = re.sub(r"\s+", " ", rendered(look.shown, 200))
    assert look.sound
    assert "must be hidden by noise, of which this client adds a share itself" in text
    found = Experiment.from_table(small)
    protection = dict(client_check._protection(found, OwnFile.read(path)))
    assert "noise" not in protection
    assert protection["privacy"] == (
        "this client clips its update and adds its share of the noise that hides each client in a sum, even "
        "if 1 of the others tell theirs: epsilon 3 at delta 0.001 for the whole run, drawn from a key of "
        "this machine"
    )
    leaves = re.sub(r"\s+", " ", rendered(client_check._leaves(found), 200))
    assert "The adapters, with noise, in masked integers" in leaves and "losses" not in leaves


def test_checking_says_by_which_layout_rows_are_read(tmp_path, call, rows_file):
    rows = [{"prompt": f"p{i}", "response": "r", "rating": i % 5 + 1} for i in range(20)]
    path = tmp_path / "own.toml"
    own = f'[data]\nsource = "{rows_file(rows)}"\nkind = "feedback"\n'
    path.write_text(own)
    code, out = call("client", "check", path)
    text = re.sub(r"\s+", " ", out)
    assert code == 1 and 'values = { desirable = ["> 3"], undesirable = ["< 3"] }' in text
    path.write_text(own + 'values = { desirable = ["> 3"], undesirable = ["< 3"] }\n')
    code, out = call("client", "check", path)
    text = re.sub(r"\s+", " ", out)
    assert code == 0
    for said in (
        "rows.jsonl: layout prompt/response/rating",
        "desirable where the label is > 3",
        "16 can be used, 4 dropped (label is not among data.values)",
    ):
        assert said in text, said


def test_checking_gives_every_reason_at_once(small, table, rows_file, tmp_path, call):
    path = own_rows(tmp_path / "own.toml", rows_file, table)
    experiment = tmp_path / "x.toml"
    small |= {"adapter": {"rank": 300}, "training": {"local_steps": 10**9}}
    small |= {"data": {"source": "x.jsonl", "kind": "feedback"}, "objective": {"name": "kto"}}
    experiment.write_text(write_toml(small))
    code, out = call("client", "check", path, experiment)
    text = re.sub(r"\s+", " ", out)
    assert code == 1 and "It would be refused, for 3 reasons" in text
    for said in (
        "data.kind 'feedback' is requested",
        "adapter.rank = 300 is above 256",
        "policy.max_steps",
    ):
        assert said in text, said


def test_checking_says_what_is_wrong_with_rows(tmp_path, call):
    path = tmp_path / "own.toml"
    path.write_text('[data]\nsource = "/nowhere/rows.jsonl"\nkind = "preference"\n')
    code, out = call("client", "check", path)
    assert code == 1 and "/nowhere/rows.jsonl" in out.replace("\n", "")
    path.write_text("")
    code, out = call("client", "check", path)
    assert code == 1 and "no rows are offered" in out
    path.write_text(
        '[data]\nsource = "builtin:tastes"\nshare = "experiment"\n[policy]\nmethods = ["fedavgg"]\n'
    )
    code, out = call("client", "check", path)
    assert code == 1 and "there is no 'fedavgg'" in out


def test_a_sample_of_every_kind_is_shown(small, table, tmp_path):
    kinds = {
        "instructions": "sft",
        "labelled": "classification",
        "feedback": "kto",
        "preferences": "bco",
    }
    for source, objective in kinds.items():
        path = tmp_path / "own.toml"
        own = {"data": {"source": f"builtin:{source}", "share": "experiment"}}
        path.write_text(write_toml({**own, "model": {"path": table["model"]["path"]}}))
        asked = {**small, "objective": {"name": objective}}
        asked["data"] = {"source": f"builtin:{source}", "builtin_rows": 60}
        (tmp_path / "x.toml").write_text(write_toml(asked))
        look = check(path, tmp_path / "x.toml", 2)
        assert look.sound and "tokens" in rendered(look.shown)
    assert not check(path, tmp_path / "x.toml", 9).sound


def test_checking_reads_rows_once_and_holds_none_out_for_all(
    small, table, rows_file, tmp_path, monkeypatch
):
    """As the worker does: one row, or one patient alone, is enough to train on."""
    reads = []

    def counted(*words, **named):
        reads.append(named)
        return load_examples(*words, **named)

    monkeypatch.setattr("fedloom.runs.partitioning.load_examples", counted)
    monkeypatch.setattr("fedloom.deployment.client_check.load_examples", counted)
    path, experiment = tmp_path / "own.toml", tmp_path / "x.toml"
    small["data"] = {"source": "x.jsonl", "kind": "preference"}
    experiment.write_text(write_toml(small))
    pair = {"prompt": "Who?", "chosen": "I am.", "rejected": "No.", "patient": "A"}
    for count in (1, 3):
        rows = rows_file([{**pair, "prompt": f"Who {i}?"} for i in range(count)])
        own = {"source": str(rows), "kind": "preference", "group": "patient"}
        path.write_text(write_toml({"data": own, "model": {"path": table["model"]["path"]}}))
        look = check(path, experiment, 0)
        text = re.sub(r"\s+", " ", rendered(look.shown))
        assert look.sound and f"{count} read = {count} trained on" in text
    assert reads == [{"hold_out": False}] * 2


def test_classes_of_a_clients_rows_are_found_where_nobody_says_them(
    small, table, rows_file, tmp_path
):
    rows = rows_file([{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(4)])
    path, experiment = tmp_path / "own.toml", tmp_path / "x.toml"
    own = {"source": str(rows), "kind": "labelled"}
    path.write_text(write_toml({"data": own, "model": {"path": table["model"]["path"]}}))
    small["data"] = {"source": "x.jsonl", "kind": "labelled"}
    small["objective"] = {"name": "classification"}
    experiment.write_text(write_toml(small))
    look = check(path, experiment, 0)
    assert look.sound and re.search(r"label +a\b", rendered(look.shown))


CHAT = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I am."},
    {"role": "user", "content": "SINCE WHEN?"},
    {"role": "assistant", "content": "Since May."},
]


def test_of_a_sample_what_is_trained_on_is_shown(small, table, rows_file, tmp_path):
    path, experiment = tmp_path / "own.toml", tmp_path / "x.toml"
    own = {"source": str(rows_file([{"messages": CHAT}])), "kind": "instruction"}
    path.write_text(write_toml({"data": own, "model": {"path": table["model"]["path"]}}))
    small["objective"] = {"name": "sft"}
    shown = {}
    for train_on in ("all_answers", "last_answer", "completion"):
        small["data"] = {"source": "x.jsonl", "kind": "instruction", "train_on": train_on}
        experiment.write_text(write_toml(small))
        text = rendered(check(path, experiment, 0).shown, 200)
        shown[train_on] = (
            re.search(r"completion, .*? {2,}(.*)", text)[1].replace("</s>", "").strip()
        )
    assert shown["all_answers"] == "I am. [...] Since May."
    assert shown["last_answer"] == "Since May."
    assert "SINCE WHEN?" in shown["completion"]


def test_a_sample_is_read_by_the_models_revision_and_context(
    small, table, rows_file, tmp_path, monkeypatch
):
    asked = []

    def load(path, revision, data, compares):
        asked.append(revision)
        return load_encoder(path, None, data, compares=compares)

    monkeypatch.setattr("fedloom.deployment.client_check.load_encoder", load)
    monkeypatch.setattr("fedloom.deployment.client_check.context_of", lambda path, revision: 12)
    path = tmp_path / "own.toml"
    rows = rows_file([{"prompt": "What? " * 30, "completion": " So."}])
    own = {"data": {"source": str(rows), "kind": "instruction"}}
    own["model"] = {"path": table["model"]["path"], "revision": "v2"}
    path.write_text(write_toml(own))
    text = rendered(check(path, None, 0).shown)
    counts = [int(n) for n in re.findall(r"(?:prompt|completion), (\d+) tokens", text)]
    assert asked == ["v2"] and sum(counts) == 12


def test_actions_that_the_method_does_not_have_are_neither_counted_nor_noted(server, small):
    found = server()
    run, _, _ = found.join(small)
    log = found.worker.client_folder.path / "audit.jsonl"
    before = log.read_bytes() if log.exists() else b""
    for action in ("x", "y" * 64, ""):
        assert found.exchange(run, action=action).error == Sentence.UNFIT.value
    assert (log.read_bytes() if log.exists() else b"") == before
    with pytest.raises(ValueError, match="at most 64 characters"):
        found.exchange(run, action="x" * 65)


def test_rounds_do_not_run_backwards(server, small):
    """Or nothing that a client keeps would ever be old enough to be let go of."""
    found = server()
    run, _, _ = found.join(small)
    assert found.exchange(run, round=3).error is None
    assert found.exchange(run, round=2).error == Sentence.UNFIT.value
    assert found.exchange(run, round=4).error is None


def test_a_key_of_a_thousand_parts_is_not_parsed(server):
    found, start = server(), time.monotonic()
    _, _, reply = found.join("a" + ".a" * 20_000 + " = 1")
    assert "experiment" in reply.error and time.monotonic() - start < 2


def test_what_failed_is_not_tried_again_at_once(server, small, monkeypatch):
    found, tries = server(), []

    def fail(*words, **named):
        tries.append(words)
        raise OSError("no room")

    monkeypatch.setattr("fedloom.deployment.worker.assemble", fail)
    run, _, first = found.join(small)
    _, _, again = found.join(small, run=run)
    assert first.error == again.error == Sentence.LOADING.value and len(tries) == 1
