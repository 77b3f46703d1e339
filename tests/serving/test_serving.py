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
from pathlib import Path

import httpx
import pytest

import fedloom
from fedloom.commands.conversation import converse
from fedloom.commands.terminal import make_console
from fedloom.errors import ModelError, OutputError
from fedloom.evaluation.generate import Ask, generate
from fedloom.evaluation.streaming import Answer
from fedloom.experiment.experiment import Experiment
from fedloom.runs.saved_models import load_saved
from fedloom.serving import http_server
from fedloom.serving.access import Access
from fedloom.serving.answers import Answers
from fedloom.serving.conversation import Conversation, Sampling
from fedloom.serving.http_server import ModelServer
from fedloom.serving.locate import base_alone, locate
from fedloom.serving.models import ReadyModels
from fedloom.serving.prompts import PromptFormat, fitting, format_of

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
    with pytest.raises(ModelError, match="safetensors"):
        locate(foreign)


class Typed(io.StringIO):
    """Lines of standard input that is no terminal."""

    def isatty(self):
        """Say so."""
        return False


def talk(models, monkeypatch, capsys, text, sampling=None):
    conversation = Conversation(models, sampling or Sampling(max_new_tokens=6))
    monkeypatch.setattr(sys, "stdin", Typed(text))
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


def test_ctrl_c_stops_an_answer_and_not_the_conversation(models, monkeypatch, capsys):
    class Stopping(io.StringIO):
        """Sends Ctrl-C's signal as the second piece of an answer is shown."""

        pieces = 0

        def write(self, text):
            self.pieces += bool(text.strip())
            if self.pieces == 3:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

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
    with served:
        address = served.stdout.readline().split(" at ")[1].split()[0]
        reply = httpx.post(f"{address}/chat/completions", json=HELLO, trust_env=False, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == answer
        served.send_signal(signal.SIGTERM)
        assert served.stdout.read().endswith("stopped\n") and served.wait(30) == 0
