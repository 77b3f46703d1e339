"""How a run is told to who asked for it: what an observer sees there is what happened."""

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

from fedloom.accounting.ledger import Cost
from fedloom.deployment.orders import ASK, News, Order, read_news, show
from fedloom.errors import FedloomError, RoundFailed
from fedloom.offences import Offence
from fedloom.runner import Plan
from fedloom.server import Evaluation, RoundRecord

PLAN = Plan("who", "what", 3, "accuracy", True)
RECORD = RoundRecord(
    2, (0, 3), {3: "it failed"}, (Offence(3, "forged", "why", 2, "r", 4),), {5: 9}, {0: (99.0, 7)}, (4,),
    1e-3, {"loss": 0.5}, {0: {"loss": 0.5}},
    Evaluation({"accuracy": 0.5}, {0: {"accuracy": 0.25}}),
    (Cost(2, 0, "train", bytes_up=7),), 0.5, {"held": {"0": [1]}},
)  # fmt: skip


class Seen:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_what_is_told_is_what_happened(tmp_path):
    news, seen = News(tmp_path / "news.jsonl"), Seen()
    news.stage("loading")
    news.begin(PLAN)
    news.client_done(2, 0, 1, 2)
    news.round_done(RECORD)
    news.warning("careful")
    news.end()
    news.tell("finished", summary="all well")
    news.close()
    assert show(read_news(tmp_path / "news.jsonl", lambda: True), seen, "f") == "all well"
    assert seen.calls == [
        ("stage", (), {"text": "loading"}),
        ("begin", (PLAN,), {}),
        ("client_done", (), {"round": 2, "client": 0, "done": 1, "of": 2}),
        ("round_done", (RECORD,), {}),
        ("warning", (), {"text": "careful"}),
        ("end", (), {}),
    ]


def test_a_failure_is_told_with_its_exit_code(tmp_path):
    with contextlib.closing(News(tmp_path / "news.jsonl")) as news:
        news.tell("failed", text="no such model", exit_code=3)
    with pytest.raises(FedloomError, match="no such model") as failed:
        show(read_news(tmp_path / "news.jsonl", lambda: True), Seen(), "f")
    assert failed.value.exit_code == 3


def test_a_run_that_is_gone_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.orders.ASK", 0.0)
    with pytest.raises(RoundFailed, match="go on with `fedloom run --resume runs/x "):
        show(read_news(tmp_path / "absent.jsonl", lambda: False), Seen(), "runs/x")


def test_a_run_that_ends_while_it_is_asked_about_is_not_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.orders.ASK", 0.0)

    def ends_meanwhile():
        news.round_done(RECORD)
        news.tell("finished", summary="all well")
        news.close()
        return False

    news, seen = News(tmp_path / "news.jsonl"), Seen()
    assert show(read_news(tmp_path / "news.jsonl", ends_meanwhile), seen, "runs/x") == "all well"
    assert seen.calls == [("round_done", (RECORD,), {})]


def test_a_run_is_asked_about_only_when_it_is_quiet(tmp_path, monkeypatch):
    news, slept, asked = News(tmp_path / "news.jsonl"), [], []

    def sleep(_):
        slept.append(len(slept))
        if len(slept) <= 10:
            news.stage("loading")

    clock = SimpleNamespace(monotonic=lambda: float(len(slept)), sleep=sleep)
    monkeypatch.setattr("fedloom.deployment.orders.time", clock)
    found = list(read_news(tmp_path / "news.jsonl", lambda: asked.append(len(slept))))
    news.close()
    assert len(found) == 10 and asked == [10 + ASK + 1]


@pytest.mark.parametrize("signal", [SystemExit(0), KeyboardInterrupt()])
def test_a_run_that_flower_stops_says_how_to_go_on(tmp_path, monkeypatch, signal):
    from fedloom.deployment import serverapp

    def stopped(*_):
        raise signal

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serverapp, "_play", stopped)
    Order(home=str(tmp_path), folder="runs/x", cwd=str(tmp_path)).write(tmp_path / "order.toml")
    with pytest.raises(type(signal)):
        serverapp.main(None, SimpleNamespace(run_config={"order": tmp_path / "order.toml"}))
    with pytest.raises(FedloomError, match=r"stopped; .* `fedloom run --resume runs/x ") as told:
        show(read_news(tmp_path / "order.jsonl", lambda: False), Seen(), "runs/x")
    assert told.value.exit_code == 1


def test_a_run_that_does_not_begin_is_told_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.orders.SLOW", 0.0)
    monkeypatch.setattr("fedloom.deployment.orders.ASK", 0.0)
    path, asked = tmp_path / "requests" / "news.jsonl", iter([True, True, True, False])
    (told,) = read_news(path, lambda: next(asked))
    assert told["event"] == "warning" and str(tmp_path / "logs" / "serverapp.out") in told["text"]


def test_half_a_line_is_waited_for(tmp_path):
    path, found = tmp_path / "news.jsonl", []
    path.write_text('{"event": "stage", "te')

    def write():
        time.sleep(0.3)
        with path.open("a") as file:
            file.write('xt": "schön"}\n{"event": "finished", "summary": ""}\n')

    threading.Thread(target=write).start()
    found = list(read_news(path, lambda: True))
    assert [told["event"] for told in found] == ["stage", "finished"] and found[0][
        "text"
    ] == "schön"


def test_an_order_is_read_as_it_was_written(tmp_path):
    order = Order(home="h", folder="f", cwd="c", from_round=3)
    order.write(tmp_path / "order.toml")
    assert Order.read(tmp_path / "order.toml") == order
    (tmp_path / "order.toml").write_text('home = "h"\n')
    with pytest.raises(FedloomError, match=r"order\.toml"):
        Order.read(tmp_path / "order.toml")
