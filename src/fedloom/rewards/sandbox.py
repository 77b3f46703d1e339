"""Python that a model wrote, run in a process of its own with limits.

The process has an empty environment and an empty folder, and limits on time, memory, files and processes.
Where Linux allows user namespaces it has no network; everywhere, Python's audit hook refuses sockets,
other processes, ctypes, and files outside of Python's own library.

**Not protected**: an audit hook is no wall against code that is written to break it, the kernel's own
faults are not guarded against, and an answer that searches the interpreter's memory for the number by
which success is told can claim it. Whoever lets models write code for a machine gives that machine no
secrets; a container or a virtual machine around fedloom is the wall.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile

SECONDS = 5
"""Longest that an answer's tests may take, of processor time and of any."""

MEMORY = 512 << 20
"""Bytes of address space."""

LONGEST = 1 << 16
"""Characters of code, or of tests, that are run at most."""

CHILD = r"""
import json, os, sys
asked = json.loads(sys.stdin.buffer.read())
told = os.dup(1)
quiet = os.open(os.devnull, os.O_RDWR)
for own in (0, 1, 2):
    os.dup2(quiet, own)
try:
    import ctypes
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER, CLONE_NEWNET
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
except Exception:
    pass
try:
    import resource
    for what, most in (("CPU", asked["seconds"]), ("AS", asked["memory"]), ("FSIZE", 0), ("NPROC", 0),
                       ("CORE", 0), ("NOFILE", 32)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
except (ImportError, ValueError, OSError):
    pass
import builtins, math, random, re, itertools, functools, collections, string  # noqa: what answers use
for gone in ("ctypes", "_ctypes", "resource"):
    sys.modules.pop(gone, None)
library = tuple(os.path.realpath(path) for path in sys.path if path)
closed = ("socket.", "subprocess.", "ctypes.", "shutil.", "os.", "pty.", "signal.", "ftplib.", "http.",
          "urllib.", "tempfile.", "mmap.", "fcntl.", "syslog.", "gc.", "winreg.", "_winapi.", "msvcrt.")
read_only = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")


def guard(event, args, closed=closed, read_only=read_only, library=library):
    if event.startswith(closed) and event not in read_only:
        raise PermissionError(event + " is closed to answers")
    if event == "import" and args[0] in ("ctypes", "_ctypes", "resource", "_posixsubprocess"):
        raise PermissionError("import " + args[0] + " is closed to answers")
    if event == "open":
        path, mode = args[0], args[1]
        writes = isinstance(mode, str) and any(c in mode for c in "wax+")
        if isinstance(path, int) or writes or not os.path.realpath(os.fsdecode(path)).startswith(library):
            raise PermissionError("files are closed to answers")


def tell(secret, told, write):
    return lambda: write(told, secret)


success = tell(asked["secret"].encode(), told, os.write)
code = asked["code"], asked["tests"]
del asked
sys.addaudithook(guard)
names = {"__name__": "answer"}
exec(compile(code[0], "answer", "exec"), names)
exec(compile(code[1], "tests", "exec"), names)
success()
os._exit(0)
"""
"""What runs in the process: limits, then the answer, its tests, and the number that tells success."""


def passes_tests(code: str, tests: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether code, run as Python, passes tests that are run after it in the same names.

    Args:
        code: What a model wrote; a fenced block of Markdown is taken out of its fence.
        tests: Python that raises where the code is wrong, such as ``assert add(2, 2) == 4``.
        seconds: Of processor time, and of any time, above 0.
        memory: Bytes of address space.
    """
    code = unfenced(code)
    if max(len(code), len(tests)) > LONGEST:
        return False
    secret = secrets.token_hex(16)
    asked = {"code": code, "tests": tests, "secret": secret, "seconds": seconds, "memory": memory}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(asked).encode(), timeout=seconds + 5)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(process)
    return output == secret.encode()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process of its own session, and what it may have started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, 9)
        process.kill()
    process.communicate()


def unfenced(text: str) -> str:
    """Return the last block between fences of Markdown, or the text where there is none."""
    parts = text.split("```")
    if len(parts) < 3:
        return text
    block = parts[-2] if len(parts) % 2 else parts[-1]
    opening, newline, rest = block.partition("\n")
    return rest if newline and opening.strip() in ("", "python", "py", "python3") else block
