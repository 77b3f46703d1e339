"""Models that answer: on a real socket, in a conversation, two on one base."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

import fedloom
from fedloom.commands.conversation import converse
from fedloom.commands.terminal import make_console
from fedloom.errors import ModelError, OutputError
from fedloom.evaluation.generate import Ask, generate
from fedloom.evaluation.streaming import Answer
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import require_reachable
from fedloom.models.saved import load, loading
from fedloom.models.saved_together import OnBase
from fedloom.runs.export import export
from fedloom.runs.saved_models import load_saved
from fedloom.serving import http_server
from fedloom.serving.access import Access
from fedloom.serving.answers import Answers
from fedloom.serving.conversation import Conversation, Sampling
from fedloom.serving.http_server import ModelServer
from fedloom.serving.locate import base_alone, locate
from fedloom.serving.models import ReadyModels
from fedloom.serving.prompts import PromptFormat, fitting, format_of
from fedloom.serving.requests import RequestError

QUESTION = "Ada asks in the kitchen: where is the red cup?"
HELLO = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """The folder of a small run whose adapter changes what the model says."""
    folder = tmp_path_factory.mktemp("serving") / "wishes"
    table = {
        "model": {"path": str(model_folder)}, "adapter": {"rank": 2},
        "data": {"source": "builtin:instructions", "builtin_rows": 30},
        "objective": {"name": "sft"}, "federation": {"rounds": 1, "clients": 1},
        "training": {"learning_rate": 0.05, "batch_size": 4}, "evaluation": {"samples": 0},
        "output": {"folder": str(folder), "verify": False},
    }  # fmt: skip
    return fedloom.run(table).folder


@pytest.fixture(scope="module")
def models(run):
    found = locate(run)
    return ReadyModels([found, base_alone(found)])


@pytest.fixture(scope="module")
def server(models):
    made = ModelServer("127.0.0.1", 0, Answers(models, 1, 64, seed=0), Access())
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    made.stop()
    thread.join()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False) as client:
        yield client


def expected(run, text, length=6):
    experiment = Experiment.from_toml(run / "experiment.toml")
    encoder, model = load_saved(experiment, (), run / "adapter")
    with model.evaluating():
        ask = Ask(tuple(encoder.prompt(text)))
        return generate(model.model, encoder, [ask], length)[0]


@pytest.fixture(scope="module")
def answer(run):
    """What the run's own model says."""
    return expected(run, QUESTION)


def events(http, body):
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_what_is_served_is_what_was_trained(answer, models, http):
    """The answer of the run's own model, and the base's where that is asked; on one backbone."""
    found = http.post("/v1/chat/completions", json={**HELLO, "model": "wishes"}).json()
    base = http.post("/v1/chat/completions", json={**HELLO, "model": "base"}).json()
    said = [reply["choices"][0]["message"]["content"] for reply in (found, base)]
    assert said[0] == answer != said[1] and models.backbones == 1
    assert found["usage"]["completion_tokens"] == 6 and found["object"] == "chat.completion"
    assert found["choices"][0]["finish_reason"] == "length" and found["model"] == "wishes"
    listed = [own["id"] for own in http.get("/v1/models").json()["data"]]
    assert listed == ["wishes", "base"] and http.get("/v1/models/base").json()["id"] == "base"


def test_a_stream_is_the_whole_answer(http):
    body = {**HELLO, "model": "wishes", "temperature": 0.9, "seed": 5}
    whole = http.post("/v1/chat/completions", json=body).json()
    parts = events(http, {**body, "stream_options": {"include_usage": True}})
    said = "".join(part["choices"][0]["delta"].get("content", "") for part in parts[:-1])
    assert said == whole["choices"][0]["message"]["content"] and len(parts) > 4
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parts[-2]["choices"][0]["finish_reason"] == "length"
    other = http.post("/v1/chat/completions", json={**body, "seed": 6}).json()
    assert other["choices"] != whole["choices"]


def test_completions_go_on_with_texts_and_tokens(models, http):
    tokens = models.all[0].encoder.prompt(QUESTION)
    body = {"model": "wishes", "temperature": 0, "max_tokens": 4}
    texts = [
        http.post("/v1/completions", json={**body, "prompt": prompt}).json()["choices"][0]["text"]
        for prompt in (QUESTION, tokens)
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({**HELLO, "model": "other"}, 404, "model_not_found"),
        (HELLO, 400, "model_not_found"),
        ({**HELLO, "model": "base", "messages": [{"role": "user", "content": "a " * 900}]}, 400,
         "context_length_exceeded"),
        ({"model": "base"}, 400, None),
    ],
    ids=["unknown", "of two", "too long", "no messages"],
)  # fmt: skip
def test_what_is_refused_is_an_error_of_openai(http, body, status, code):
    reply = http.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error" and error["message"]


def test_requests_that_are_none(server, http):
    chat = "/v1/chat/completions"
    text = {"Content-Type": "text/plain"}
    assert http.post(chat, content=b"{}", headers=text).status_code == 415
    chunks = http.post(chat, content=iter([b"{}"]), headers={"Content-Type": "application/json"})
    assert chunks.status_code == 411
    assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    assert http.options(chat, headers={"Origin": "http://evil.example"}).status_code == 403
    assert http.get(chat).status_code == 405 and http.post("/v2", json={}).status_code == 404
    assert http.delete("/v1/models").json()["error"]["type"]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert b" 413 " in raw.recv(4096)
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_more_than_may_wait_are_refused_and_the_others_answered(models, http, server):
    """One answers, one waits, the third is refused; whoever goes away frees the turn."""
    body = {**HELLO, "model": "base", "max_tokens": 60}
    with server.answers._my_turn():
        waiting = []
        thread = threading.Thread(
            target=lambda: waiting.append(httpx.post(
                f"http://127.0.0.1:{server.server_port}/v1/chat/completions", json=body,
                trust_env=False, timeout=60,
            ))
        )  # fmt: skip
        thread.start()
        until = time.monotonic() + 30
        while server.answers._places._value and time.monotonic() < until:
            time.sleep(0.005)
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    thread.join()
    assert waiting[0].status_code == 200
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as gone:
        next(gone.iter_lines())
    assert http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).status_code == 200


def test_connections_are_bounded(models, monkeypatch):
    monkeypatch.setattr(http_server, "CONNECTIONS", 2)
    made = ModelServer("127.0.0.1", 0, Answers(models, 1, 64, seed=0), Access(key="k" * 16))
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    try:
        where = ("127.0.0.1", made.server_port)
        held = [socket.create_connection(where, timeout=10) for _ in range(3)]
        assert held[2].recv(10) == b""  # closed at once
        held[0].sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 401 " in held[0].recv(4096)
        for one in held:
            one.close()
    finally:
        made.shutdown()
        made.stop()
        thread.join()


def test_folders_that_are_no_models_are_refused(run, tmp_path, models, experiment):
    with pytest.raises(OutputError, match="no folder"):
        locate(tmp_path / "missing")
    with pytest.raises(OutputError, match="neither a run folder"):
        locate(tmp_path)
    with pytest.raises(OutputError, match=r"has no model of client 4's own"):
        locate(run, client=4)
    foreign = tmp_path / "foreign"
    shutil.copytree(run / "adapter", foreign)
    (foreign / "fedloom.json").unlink()
    config = foreign / "adapter_config.json"
    record = json.loads(config.read_text())
    assert locate(foreign).base == record["base_model_name_or_path"]
    config.write_text(json.dumps({**record, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="--base-model"):
        locate(foreign)
    assert locate(foreign, base="some/model").base == "some/model"
    config.write_text(json.dumps({**record, "peft_type": "POLY"}))
    with pytest.raises(ModelError, match="peft_type is 'POLY'"):
        locate(foreign)
    config.write_text(json.dumps(record))
    (foreign / "adapter_model.safetensors").rename(foreign / "adapter_model.bin")
    (foreign / "expert_model.safetensors").touch()  # of experts, which PEFT does not look for
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        locate(foreign)


def test_another_model_where_the_base_was_is_refused(run, tmp_path, monkeypatch):
    """Such as a folder of the same name where a published adapter was loaded."""
    published = export(run, target=tmp_path / "ours", format="adapter", published=True).folder
    monkeypatch.chdir(tmp_path)
    name = Path(locate(run).base).name
    assert locate(published).base == f"./{name}"
    with pytest.raises(ModelError, match="is not a folder"):
        require_reachable(f"./{name}")
    shutil.copytree(locate(run).base, tmp_path / name)
    assert locate(published).base == f"./{name}"  # the same model
    (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"another SHA-256.*--base-model"):
        locate(published)
    assert locate(published, base=name).base == name


@pytest.mark.parametrize(
    "change",
    [
        {"r": "x"},
        {"r": 3},
        {"target_modules": ["nowhere"]},
        {"init_lora_weights": "pissa", "r": 3},
        None,
    ],
    ids=["rank of a text", "other size", "no such layer", "on its own copy", "cut"],
)
def test_an_adapter_that_does_not_fit_is_one_error(run, tmp_path, change):
    bad = tmp_path / "bad"
    shutil.copytree(run / "adapter", bad)
    config, weights = bad / "adapter_config.json", bad / "adapter_model.safetensors"
    if change is None:
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    for folders in ([bad], [run, bad]):  # PEFT puts a second adapter on by another function
        with pytest.raises(ModelError, match=r"bad does not fit .*, or is damaged: .+--base-model"):
            ReadyModels([locate(own) for own in folders])
    if change is None:
        with pytest.raises(ModelError, match="does not fit"):
            load(bad)


def test_memory_that_does_not_suffice_is_no_fault_of_the_folder(tmp_path):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), loading(tmp_path, "base"):
            raise error


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({}, True),
        ({"init_lora_weights": "gaussian"}, True),
        ({"bias": "all"}, False),
        ({"bias": "lora_only"}, False),
        ({"init_lora_weights": "pissa_niter_4"}, False),
        ({"init_lora_weights": "olora"}, False),
    ],
    ids=str,
)
def test_what_changes_the_frozen_weights_has_a_base_of_its_own(run, tmp_path, change, shares):
    record = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**record, **change}))
    assert OnBase(tmp_path, "peft", "base", None, torch.float32).shares == shares


def test_pages_of_allowed_sites_send_what_openais_client_sends():
    access = Access(origins=["http://a.example"])
    names = "authorization,content-type,x-stainless-lang, x-stainless-retry-count"
    for asked, told in ((names, names), ("a\r\nB: c", None), ("é", None), (None, None)):
        shared = access.shared_with("http://a.example", asked)
        allowed = shared["Access-Control-Allow-Headers"]
        assert allowed == (told or "Authorization, Content-Type")
    assert access.shared_with("http://b.example", names) == {}


def test_an_address_of_version_4_is_itself_on_a_socket_of_version_6():
    access = Access()
    access.check({"Host": "192.168.1.5:8000"}, "::ffff:192.168.1.5")
    access.check({"Host": "[::ffff:127.0.0.1]:8000"}, "::1")
    with pytest.raises(RequestError, match="none of this server's"):
        access.check({"Host": "192.168.1.6:8000"}, "::ffff:192.168.1.5")


class Typed(io.StringIO):
    """Lines of standard input that somebody types, or of a pipe."""

    typed = True

    def isatty(self):
        """Say which."""
        return self.typed


def talk(models, monkeypatch, capsys, text, sampling=None, typed=True):
    conversation = Conversation(models, sampling or Sampling(max_new_tokens=6))
    monkeypatch.setattr(sys, "stdin", Typed(text))
    monkeypatch.setattr(Typed, "typed", typed)
    converse(conversation, make_console())
    return conversation, *capsys.readouterr()


def test_lines_are_questions(answer, models, monkeypatch, capsys, tmp_path):
    path = tmp_path / "talk.jsonl"
    text = f"{QUESTION}\n\n/nope\n/save {path}\n/save {path}\n/save\n//x\n/reset\n{QUESTION}\n/quit\nmore\n"
    talked, out, err = talk(models, monkeypatch, capsys, text)
    lines = out.splitlines()
    first = next(line for line in lines if line.startswith("wishes: "))
    assert first == f"wishes: {answer}".splitlines()[0]
    assert "there is no command /nope" in err and "is there already" in err and "name a file" in err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["wishes", "base"]
    asked = {"role": "user", "content": QUESTION}
    assert rows[0]["messages"] == [asked, {"role": "assistant", "content": answer}]
    assert talked.history[0] == rows[0]["messages"]  # the same again, after all was forgotten


def test_lines_of_a_pipe_are_no_commands(models, monkeypatch, capsys, tmp_path):
    """A file of questions writes no other file; that its lines are no commands is said once."""
    path = tmp_path / "talk.jsonl"
    text = f"/save {path}\n//x\n/quit\n{QUESTION}\n"
    talked, _, err = talk(models, monkeypatch, capsys, text, Sampling(1), typed=False)
    asked = [own["content"] for own in talked.history[0] if own["role"] == "user"]
    assert asked == [f"/save {path}", "//x", "/quit", QUESTION] and not path.exists()
    assert err.count("commands are for a terminal") == 1


class Stopping(io.StringIO):
    """Sends Ctrl-C's signal as the second piece of an answer is shown."""

    pieces = 0

    def write(self, text):
        self.pieces += bool(text.strip())
        if self.pieces == 3 and text.strip():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@contextmanager
def killed_in_the_end(process):
    """Kill a process that a failed test has left, for which Popen would wait for ever."""
    try:
        yield
    finally:
        process.kill()


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal has it; what runs in the background may have been started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_what_a_pipe_asks(models, monkeypatch, capsys):
    out = Stopping()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(KeyboardInterrupt):
        talk(models, monkeypatch, capsys, f"{QUESTION}\nAnd now?\n", typed=False)
    assert out.getvalue().count("wishes: ") == 1 and out.getvalue().endswith("\n")


def test_a_reader_that_goes_away_ends_the_command_quietly():
    words = (
        "import typer\nfrom fedloom.commands import main as m\nm.app = typer.Typer()\n"
        "@m.app.command()\ndef talk():\n    while True: print('x' * 100, flush=True)\nm.main()"
    )
    own = {**os.environ, "PYTHONPATH": str(Path(fedloom.__file__).parents[1])}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", words], stdout=pipe, stderr=pipe, env=own) as done:
        assert done.stdout.readline() == b"x" * 100 + b"\n"
        done.stdout.close()
        assert (done.stderr.read(), done.wait(30)) == (b"", 141)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_an_answer_and_not_the_conversation(models, monkeypatch, capsys):
    out = Stopping()
    monkeypatch.setattr(sys, "stdout", out)
    talked, *_ = talk(models, monkeypatch, capsys, f"{QUESTION}\nAnd now?\n", Sampling(20))
    assert talked.turns == 2 and talked.history[0][1]["content"]
    assert len(talked.history[0][1]["content"]) < len(talked.history[0][3]["content"])
    assert talked.history[1][1]["content"] == ""  # had not begun


def test_what_models_say_moves_no_cursor(models, monkeypatch, capsys):
    monkeypatch.setattr(
        models,
        "answer",
        lambda number, ask, longest, tell: tell("\x1b[2J\u202egood") or Answer("", 1, "stop"),
    )
    _, out, _ = talk(models, monkeypatch, capsys, "Hello\n")
    assert "\x1b" not in out and "\\x1b[2J\\u202egood" in out


def test_plain_prompts_are_written_as_in_training(models):
    told = format_of({"format": "plain", "example": "Q: {question}\nA:{answer}"})
    assert told == PromptFormat("plain", "Q: ", "\nA:")
    messages = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"},
    ]  # fmt: skip
    encoder = models.all[0].encoder
    text = "Be kind.\nQ: one\nA:\n1\nQ: two\nA:"
    assert told.tokens(encoder, messages) == encoder.prompt(text)
    assert format_of({"format": "plain", "example": "{a} {b}{answer}"}) == PromptFormat("plain")
    braces = format_of({"format": "plain", "example": '{{"q": "{a column}"}} {{x}}{answer}'})
    assert braces == PromptFormat("plain", '{"q": "', '"} {x}')
    assert format_of({"format": "chat"}).kind == "chat"
    whole = told.tokens(encoder, messages)
    assert fitting(told, encoder, messages, len(whole)) == (whole, 0)
    shorter = told.tokens(encoder, [messages[0], messages[3]])
    assert fitting(told, encoder, messages, len(whole) - 1) == (shorter, 2)
    assert fitting(told, encoder, messages, 3) == (shorter[-3:], 2)


@pytest.mark.slow
def test_options_that_cannot_be_meant_are_refused(call, run, tmp_path):
    for words, told in (
        (("chat", tmp_path / "none"), "there is no folder"),
        (("chat", run, "--beside", run), "beside itself"),
        (("chat", run, "--top-p", "0"), "above 0"),
        (("chat", run, "--temperature", "3"), "temperature"),
        (("serve", run, "--host", "0.0.0.0"), "lets other machines in"),
        (("serve", run, "--client", "3"), "no model of client 3"),
    ):
        code, out = call(*words)
        assert code != 0 and told in " ".join(out.split()) and "Traceback" not in out


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_error(call, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out = call("serve", run, "--port", taken.getsockname()[1])
    assert code == 4 and "cannot listen at 127.0.0.1" in out and "--port" in out


@pytest.mark.slow
@pytest.mark.full
def test_the_commands_in_processes_of_their_own(run, answer):
    """A pipe is answered line by line; a server stops by SIGTERM and says where it is."""
    own = {**os.environ, "PYTHONPATH": str(Path(fedloom.__file__).parents[1])}
    words = [sys.executable, "-m", "fedloom"]
    talked = subprocess.run(
        [*words, "chat", str(run), "--max-tokens", "6"], input=QUESTION + "\n", text=True, env=own,
        capture_output=True, check=True,
    )  # fmt: skip
    assert talked.stdout.strip() == answer
    served = subprocess.Popen(
        [*words, "serve", str(run), "--port", "0"], stdout=subprocess.PIPE, text=True, env=own
    )
    with served, killed_in_the_end(served):
        address = served.stdout.readline().split(" at ")[1].split()[0]
        reply = httpx.post(f"{address}/chat/completions", json=HELLO, trust_env=False, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == answer
        served.send_signal(signal.SIGTERM)
        assert served.stdout.read().endswith("stopped\n") and served.wait(30) == 0
