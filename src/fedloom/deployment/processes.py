"""Supervision of Flower's processes: start, restart after a crash, and stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.errors import ConnectionFailed, SettingsError
from fedloom.runs.parent_process import of_this_process
from fedloom.storage.files import lock, lock_owner

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Flower tells nobody of us, fetches nothing, and looks for work often; updates that are done with are
given back to the system at once (glibc would keep pieces of them), and lie in large pages while they are
there (a copy of 54.5 MB: 18 to 4.5 ms, the rest were page faults)."""

PAUSE = 1.0
"""Seconds before a process that died is restarted; doubled each time, up to a minute."""

PRIVILEGED = (
    "for a port below 1024 set AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit, or run "
    "`sysctl net.ipv4.ip_unprivileged_port_start=443` as root, or have the firewall forward it to a port "
    "above"
)
"""Advice where a port may not be used."""

LARGE = 16 << 20
"""Bytes of a log above which it is rotated; one old log is kept."""


@dataclass
class SupervisedProcess:
    """A process that runs as long as this one.

    Attributes:
        command: Its arguments, program first.
        log: Where its output goes.
        environment: Environment variables beside those of this process.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    _deaths: int = 0
    _again: float = 0.0

    @property
    def name(self) -> str:
        """The program, or the module that Python runs."""
        return self.command[2] if self.command[1:2] == ["-m"] else self.command[0]

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def keep_alive(self) -> bool:
        """Start it if it does not run; return whether it had ended."""
        make_room(self.log)
        if self.is_running:
            if time.monotonic() > self._again + 60:
                self._deaths = 0
            return False
        if time.monotonic() < self._again:
            return False
        died = self.process is not None
        self._deaths += died
        self._again = time.monotonic() + min(60.0, PAUSE * 2 ** min(self._deaths, 6))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [program(self.command[0]), *self.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**child_environment(), **self.environment, **of_this_process()},
                start_new_session=True,
            )
        self._pid.write_text(str(self.process.pid))
        return died

    @property
    def _pid(self) -> Path:
        return self.log.with_suffix(".pid")

    def end_orphan(self) -> None:
        """End an orphan that an earlier, killed supervisor has left running."""
        import psutil

        with contextlib.suppress(OSError, ValueError, psutil.Error):
            left = int(self._pid.read_text())
            words = psutil.Process(left).cmdline()
            name = Path(self.command[0]).name
            named = any(Path(word).name == name for word in words)
            if named and set(self.command[1:3]) <= set(words):
                os.killpg(left, signal.SIGKILL)
                time.sleep(0.5)

    def stop(self) -> None:
        """End it and its child processes."""
        if self.process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
                break
        self._pid.unlink(missing_ok=True)


@dataclass
class Supervisor:
    """Several processes that start and end together."""

    processes: list[SupervisedProcess] = field(default_factory=list)

    def end_orphans(self) -> None:
        """End orphans of an earlier, killed supervisor."""
        for supervised in self.processes:
            supervised.end_orphan()

    def stop(self) -> None:
        """End all, the last started first."""
        for supervised in reversed(self.processes):
            supervised.stop()


def make_room(log: Path) -> None:
    """Rotate a log once it is large; writers continue to append, and one old log is kept."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LARGE:
            with contextlib.suppress(
                OSError
            ):  # the disk may be full, which is a reason to free space
                shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def child_environment() -> dict[str, str]:
    """Return the environment of Flower's processes: ours, quiet.

    They start others by their bare names, so the programs of this very Python are found first, whether
    or not its virtual environment is activated.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, "PATH": path}


def program(name: str) -> str:
    """Return the path of a program of this very environment.

    Raises:
        SettingsError: Flower is not installed.
    """
    found = shutil.which(name, path=child_environment()["PATH"])
    if found is None:
        raise SettingsError(
            [
                f"{name} is missing: Flower is an extra, install it with pip install 'fedloom[flower]'"
            ],
            "the command",
        )
    return found


@contextlib.contextmanager
def only(what: str, path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of the only server, run or client of a folder.

    Args:
        what: Which of them.
        path: Its lock file, in the folder.
        patience: Seconds to wait for another process, which may be ending, to release it.

    Raises:
        ConnectionFailed: Another process holds it.
    """
    end = time.monotonic() + patience
    while (held := lock(path)) is None:
        if time.monotonic() >= end:
            raise ConnectionFailed(
                f"there is a {what} in {path.parent} already; stop it, or choose another --home"
            )
        time.sleep(0.1)
    with held:
        yield


def end(what: str, path: Path) -> int:
    """Send SIGTERM to the process that holds a lock; return its id.

    Args:
        what: Server, client or worker, for messages.
        path: Its lock file, in the folder.

    Raises:
        ConnectionFailed: There is none, or it is another user's.
    """
    process = lock_owner(path)
    if process is None:
        raise ConnectionFailed(f"no {what} runs in {path.parent}")
    try:
        os.kill(process, signal.SIGTERM)
    except OSError as error:
        raise ConnectionFailed(f"cannot stop process {process}: {error.strerror}") from None
    return process


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Check that a port is free.

    Raises:
        ConnectionFailed: It is in use, or may not be used.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise cannot_listen(host, port, error) from None


def cannot_listen(host: str, port: int, error: OSError) -> ConnectionFailed:
    """Return the error of a port that is in use, or may not be used."""
    what = PRIVILEGED if isinstance(error, PermissionError) else "choose another port"
    return ConnectionFailed(f"cannot listen at {address(host, port)}: {error.strerror}; {what}")


def address(host: str, port: int) -> str:
    """Return HOST:PORT, with an address of IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(host: str) -> str:
    """Return where this machine itself reaches what listens at ``host``."""
    return "localhost" if host in ("0.0.0.0", "::") else host


def wait_until_open(
    host: str, port: int, supervised: SupervisedProcess, seconds: float = 60.0
) -> None:
    """Wait until a process listens.

    Raises:
        ConnectionFailed: It ended, or does not listen in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        if supervised.process is not None and supervised.process.poll() is not None:
            break
        time.sleep(0.1)
    raise ConnectionFailed(f"{supervised.name} did not start; see {supervised.log}")
