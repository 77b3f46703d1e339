"""What an answer may do while it is tested, each tried in a real process."""

import os
import time

import pytest

from fedloom.rewards.sandbox import passes_tests, unfenced

TESTS = "assert add(2, 3) == 5\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def add(a, b):\n    return a + b", True),
        ("```python\nimport math\ndef add(a, b):\n    return math.floor(a + b)\n```", True),
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b", False),
        ("import os; os._exit(0)", False),
        ("raise SystemExit(0)", False),
        ("print('ok')\nadd = 5", False),
    ],
)
def test_only_code_that_passes_is_right(code, expected):
    assert passes_tests(code, TESTS) is expected


@pytest.mark.parametrize(
    "act",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "open({path!r}).read()",
        "open('x', 'w')",
        "import ctypes",
        "x = bytearray(2 << 30)",
        "import os; os.environ['PATH']",
    ],
)
def test_what_is_closed(act, tmp_path):
    import socket

    (tmp_path / "secret").write_text("s")
    with socket.create_server(("127.0.0.1", 0)) as server:
        act = act.format(port=server.getsockname()[1], path=str(tmp_path / "secret"))
        assert not passes_tests(f"{act}\ndef add(a, b):\n    return a + b", TESTS)


def test_an_answer_that_does_not_end_is_ended():
    began = time.monotonic()
    assert not passes_tests("while True:\n    pass", TESTS, seconds=1)
    assert time.monotonic() - began < 6 and not os.path.exists("x")


def test_the_last_fenced_block_is_taken():
    assert unfenced("so\n```python\na = 1\n```\nor\n```\nb = 2\n```\n") == "b = 2\n"
    assert unfenced("a = 1") == "a = 1"
