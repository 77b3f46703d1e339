"""The live page's server: for this machine alone, reading alone, and no file by its name."""

import base64
import contextlib
import hashlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

import fedloom.reports
from fedloom.errors import OutputError
from fedloom.reports import live_server
from fedloom.reports.live_server import LivePage, live_page
from live_records import append, begin

TEMPLATES = Path(fedloom.reports.__file__).with_name("templates")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = begin(tmp_path_factory.mktemp("live") / "<b>run", clients=60)
    append(folder, 0, {0: 0.5})
    with LivePage(folder.path) as opened:
        yield opened


def port_of(page):
    return int(page.address.split(":")[2].partition("/")[0])


def ask(page, path, method="GET", **headers):
    """Ask over a real connection; headers as given, with underscores."""
    port = port_of(page)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    own = {"Host": f"127.0.0.1:{port}", **headers}
    for name, value in own.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_the_page_and_its_two_questions(page):
    answer, body = ask(page, f"/{page.secret}/")
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert "<h1>&lt;b&gt;run</h1>" in body  # a folder's name is text
    answer, body = ask(page, f"/{page.secret}/state?generation=&from=0")
    assert answer.getheader("Content-Type") == "application/json"
    assert json.loads(body)["rows"][0]["value"] == 0.5
    assert json.loads(ask(page, f"/{page.secret}/curves?clients=0,1")[1])["1"]["loss"] == []


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "127.0.0.1@evil", "", None],
)
def test_a_name_that_is_let_point_here_reaches_nothing(page, host):
    answer, body = ask(page, f"/{page.secret}/state", Host=host)
    assert answer.status == 421 and "rows" not in body


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST:22"])
def test_names_of_this_machine_are_answered_at_any_port(page, host):
    """Behind an SSH tunnel the port is another."""
    assert ask(page, f"/{page.secret}/state", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/state", "/wrong/", "//", "/wrong/state", "/%s", "/%s/run.json", "/%s/../%s/state"),
        *("/%s/../../../etc/passwd", "/%s/%%2e%%2e/experiment.toml", "/%s/state/", "/%%C3%%A9/"),
    ],
)
def test_nothing_else_is_there_and_no_file_is_read(page, path):
    path = path.replace("%s", page.secret).replace("%%", "%")
    answer, body = ask(page, path)
    assert answer.status == 404 and body.startswith("there is nothing here")


@pytest.mark.parametrize(
    "query",
    [
        *("state?from=-1", "state?from=x", "state?from=%C2%B2", "state?from=" + "9" * 30),
        *("curves", "curves?clients=a", "curves?clients=" + ",".join(["1"] * 41)),
        "state?" + "&".join(["a=1"] * 20),
    ],
)
def test_a_question_that_the_page_does_not_ask_is_refused(page, query):
    answer, _ = ask(page, f"/{page.secret}/{query}")
    assert answer.status == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "<b>"])
def test_only_get_is_answered(page, method):
    answer, body = ask(page, f"/{page.secret}/", method)
    assert answer.status == 501 and "<b>" not in body


def test_what_is_no_request_ends_alone(page):
    port = port_of(page)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as own:
        own.sendall(b"\x16\x03\x01\r\n\r\n")
        own.shutdown(socket.SHUT_WR)
        while own.recv(4096):
            pass
    assert ask(page, f"/{page.secret}/state")[0].status == 200


def test_of_many_connections_all_but_a_few_are_closed_at_once(tmp_path):
    """The page lives in the process that trains: what is open there must not run out."""
    with LivePage(begin(tmp_path / "run").path) as opened, contextlib.ExitStack() as held:
        address = ("127.0.0.1", port_of(opened))
        for _ in range(live_server.CONNECTIONS):
            held.enter_context(socket.create_connection(address, timeout=10))
        for _ in range(20):
            beyond = held.enter_context(socket.create_connection(address, timeout=10))
            assert beyond.recv(1) == b""
        held.close()
        end = time.monotonic() + 10
        while not (answered := answers(opened)):
            assert time.monotonic() < end
        assert answered == 200


def answers(page):
    """The status of the page, or None where the connection is closed instead."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(page, f"/{page.secret}/")[0].status
    return None


def test_a_connection_that_sends_without_end_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(live_server, "LONGEST", 0.1)
    with LivePage(begin(tmp_path / "run").path) as opened:
        own = socket.create_connection(("127.0.0.1", port_of(opened)), timeout=0.05)
        with own, pytest.raises(ConnectionError):
            trickle(own, 200)


def trickle(connection, count):
    """Send so many bytes one at a time, or raise ConnectionError where the other side closes before."""
    for _ in range(count):
        connection.sendall(b"G")
        with contextlib.suppress(TimeoutError):
            if connection.recv(1) == b"":
                raise ConnectionResetError


def test_a_browser_may_run_the_pages_own_script_and_nothing_else(page):
    answer, body = ask(page, f"/{page.secret}/")
    policy = answer.getheader("Content-Security-Policy")
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert " style=" not in body and " onclick=" not in body
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    headers |= {"Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
    assert all(answer.getheader(name) == value for name, value in headers.items())


def test_no_script_makes_markup_of_text_or_asks_elsewhere():
    for name in ("charts.js", "live.js"):
        text = (TEMPLATES / name).read_text()
        markup = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text
        )
        assert markup is None, name
        addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name  # a namespace, asked of nobody
    assert b"http" not in re.sub(rb"http://www.w3.org/2000/svg", b"", live_page("run")[0])


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_the_marks_of_an_axis_have_an_end_where_numbers_do_not_grow_by_one():
    text = (TEMPLATES / "charts.js").read_text()
    ticks = re.search(r"const ticks = .*?\n  };\n", text, re.DOTALL)[0]
    asked = "ticks(2 ** 53, 2 ** 53 + 4, false, 5).length, ticks(0, 1, false, 5)"
    words = ["node", "-e", f"{ticks}console.log(JSON.stringify([{asked}]))"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    many, usual = json.loads(done.stdout)
    assert many <= 100 and usual == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_each_page_has_a_secret_of_its_own_and_closes_its_port(tmp_path):
    folder = begin(tmp_path / "run").path
    with LivePage(folder) as one, LivePage(folder) as other:
        assert one.secret != other.secret and len(one.secret) > 20
        assert ask(other, f"/{one.secret}/state")[0].status == 404
        port = port_of(one)
        with pytest.raises(OutputError, match=f"127.0.0.1:{port}: .* choose another --port"):
            LivePage(folder, port)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)
