"""Python that a model wrote, run in a process of its own with limits.

The process has an empty environment and an empty folder, and limits on time, memory, files and processes.
Where Linux allows user namespaces it has no network; everywhere, Python's audit hook refuses sockets,
other processes, ctypes, and files outside of Python's own library.

**This is no security boundary.** An audit hook is none against code that is written to break it, the
kernel's own faults are not guarded against, an answer that searches the interpreter's memory for the
number by which success is told can claim it, and one whose objects equal everything passes tests that
compare. Whoever chooses the model, between machines the coordinator, may do what this process's user may
as far as the guard can be escaped: run fedloom in a container or a virtual machine, and give that no
secrets.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile

SECONDS = 5
"""Processor time that an answer and its tests may take."""

STARTING = 5
"""Seconds of any time, beside those, that the interpreter's start and waiting may take."""

MEMORY = 512 << 20
"""Bytes of address space."""

LONGEST = 1 << 16
"""Characters of code, or of tests, that are run at most."""

CHILD = r"""
def main():
    import json, os, sys, types
    own = sys.modules["__main__"]
    asked = json.loads(sys.stdin.buffer.read())
    told = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(quiet, standard)
    try:
        import ctypes
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER, CLONE_NEWNET
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    except Exception:
        pass
    try:
        import resource
        for what, most in (("CPU", asked["seconds"]), ("AS", asked["memory"]), ("FSIZE", 0),
                           ("NPROC", 0), ("CORE", 0), ("NOFILE", 32)):
            resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
    except (ImportError, ValueError, OSError):
        pass
    import math, random, re, itertools, functools, collections, string  # noqa: what answers use
    for gone in ("ctypes", "_ctypes", "resource"):
        sys.modules.pop(gone, None)
    sys.dont_write_bytecode = True
    # an answer can replace builtins and functions of modules: the guard looks none up by name
    text, whole, type_of, instance, refused = str, int, type, isinstance, PermissionError
    run, write, leave = exec, os.write, os._exit
    library = tuple(path + os.sep for path in sys.path if os.path.isabs(path))
    archives = tuple(path for path in sys.path if os.path.isabs(path))
    up, writing = os.sep + os.pardir, os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_CREAT
    closed = ("socket.", "subprocess.", "ctypes.", "shutil.", "os.", "pty.", "signal.", "ftplib.",
              "http.", "urllib.", "tempfile.", "mmap.", "fcntl.", "syslog.", "gc.", "winreg.",
              "_winapi.", "msvcrt.", "sqlite3.", "sys.")
    let = ("os.putenv", "os.unsetenv", "sys._getframemodulename", "sys.excepthook", "sys.unraisablehook",
           "sys.set_asyncgen_hooks_firstiter", "sys.set_asyncgen_hooks_finalizer")
    listing = ("os.listdir", "os.scandir")
    modules = ("ctypes", "_ctypes", "resource", "_posixsubprocess", "sqlite3", "_sqlite3",
               "_xxsubinterpreters", "_interpreters", "_testcapi", "_testinternalcapi", "_posixshmem",
               "readline", "_gdbm", "_dbm")
    frames = "sys._getframe"
    unknown, place = ValueError, RuntimeError  # the standard library goes on after these

    def guard(event, args):
        if event == frames:
            raise unknown("frames are closed to answers")
        if event == "object.__getattr__" and args[1][:2] != "__":
            raise place("frames are closed to answers")
        if event == "object.__setattr__" and (args[1] == "__code__" or args[1][:2] != "__"):
            raise refused("code of functions is closed to answers")
        if event in listing:
            path = args[0]
            inside = type_of(path) is text and up not in path
            if not inside or not (path in archives or path.startswith(library)):
                raise refused("folders are closed to answers")
        elif event.startswith(closed) and event not in let:
            raise refused(event + " is closed to answers")
        if event == "import" and text.rpartition(args[0], ".")[2] in modules:
            raise refused("import " + args[0] + " is closed to answers")
        if event == "open":
            path, mode, flags = args
            inside = type_of(path) is text and up not in path
            inside = inside and (path in archives or path.startswith(library))
            if not inside or not instance(flags, whole) or flags & writing:
                raise refused("files are closed to answers")
            for letter in mode or "":
                if letter in "wax+":
                    raise refused("files are closed to answers")

    secret = asked["secret"].encode()
    names = {"__name__": "answer"}
    try:
        answer = compile(asked["code"], "answer", "exec")
        tests = compile(asked["tests"], "tests", "exec")
        del asked
        sys.modules["__main__"] = types.ModuleType("__main__")
        own.__dict__.pop("main")
        sys.addaudithook(guard)
        run(answer, names)
        run(tests, names)
        write(told, secret)
        leave(0)
    finally:
        leave(1)


main()
"""
"""What runs in the process: limits, then the answer, its tests, and the number that tells success."""


def passes_tests(code: str, tests: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether code, run as Python, passes tests that are run after it in the same names.

    Args:
        code: What a model wrote; a fenced block of Markdown is taken out of its fence.
        tests: Python that raises where the code is wrong, such as ``assert add(2, 2) == 4``.
        seconds: Of processor time, above 0; of any time :data:`STARTING` more.
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
            output, _ = process.communicate(json.dumps(asked).encode(), timeout=seconds + STARTING)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            _end(process)
    return process.returncode == 0 and output == secret.encode()


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
