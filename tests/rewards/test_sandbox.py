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
        "import json, os; os.open(json.__file__, os.O_WRONLY)",
        "import os; os.listdir('/')",
        "try:\n    open(__import__('os').path.dirname(__import__('os').__file__) + '-beside')\n"
        "except FileNotFoundError:\n    pass",
        "import sqlite3",
        "import sys; sys._getframe(1)",
        "import sys; sys.settrace(print)",
        "try:\n    1 / 0\nexcept ArithmeticError as e:\n    e.__traceback__.tb_frame",
        "(lambda: 0).__code__ = (lambda: 1).__code__",
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


@pytest.mark.parametrize(
    "act",
    [
        "import __main__; __main__.success()",
        "import __main__; __main__.main()",
        "import sys; sys._getframe(1).f_globals['success']()",
        "import builtins; builtins.exec = lambda *own: None",
        "import os; os._exit = lambda code: None",
    ],
)
def test_an_answer_cannot_say_that_it_passed(act):
    assert not passes_tests(f"def add(a, b):\n    return 0\n{act}", TESTS)


def test_builtins_that_an_answer_replaces_open_no_file(tmp_path):
    """The guard looks none up; the tests pass only where the file was closed."""
    (tmp_path / "secret").write_text("s")
    act = (
        "import builtins, os\n"
        "builtins.isinstance = lambda *own: False\nbuiltins.any = lambda own: False\n"
        "os.path.realpath = lambda path: os.__file__\n"
        "try:\n    import __main__\n    __main__.guard.__defaults__ = ((), (), ('/',))\n"
        "except AttributeError:\n    pass\n"
        f"def add(a, b):\n    try:\n        open({str(tmp_path / 'secret')!r})\n"
        "    except PermissionError:\n        return a + b\n"
    )
    assert passes_tests(act, TESTS)


def test_what_answers_use_of_the_library_works():
    act = (
        "import unittest\nfrom collections import namedtuple\nfrom dataclasses import dataclass\n"
        "Pair = namedtuple('Pair', 'a b', defaults=[3])\n"
        "@dataclass\nclass Sum:\n    a: int\n    b: int = 3\n"
        "def add(a, b):\n    return Pair(a).b + Sum(a).a\n"
    )
    tests = "with unittest.TestCase().assertRaises(TypeError):\n    add('x', 3)\n"
    assert passes_tests(act, TESTS + tests)
