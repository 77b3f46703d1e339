"""A machine in namespaces of this one: its own users, files, processes and network, gone with the test.

It has the files of this machine, over which it writes without changing them, and the package in /opt/fedloom
as an operator would have installed it. It is booted with systemd, or with nothing.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

SOURCE = Path(__file__).parent.parent
CGROUPS = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]
SYSTEMD = Path("/lib/systemd/systemd")
PLAIN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LANG": "C.UTF-8"}
"""What systemd and container engines give every process."""

SETUP = r"""
set -eu
mount -t tmpfs tmpfs "$BOX"
mkdir "$BOX/up" "$BOX/work" "$BOX/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$BOX/up,workdir=$BOX/work" "$BOX/root"
cd "$BOX/root"
mount -t proc proc proc
mount --bind -o ro proc/sys proc/sys   # what this machine is set to stays as it is
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    touch dev/$device; mount --bind /dev/$device dev/$device
done
ln -s /proc/self/fd dev/fd
mkdir dev/shm; mount -t tmpfs -o mode=1777 tmpfs dev/shm
mkdir -p opt/python opt/site opt/source
mount --bind -o ro "$BASE" opt/python
mount --bind -o ro "$SITE" opt/site
mount --bind -o ro "$SOURCE" opt/source
ip link set lo up
echo "127.0.0.1 localhost fed.example.org" > etc/hosts
: > etc/fstab
pivot_root . mnt
cd /
umount -l /mnt
rm -rf /opt/fedloom /var/lib/fedloom
"$PYTHON" -m venv --without-pip /opt/fedloom
rm -rf /opt/fedloom/lib/python3*/site-packages
ln -s /opt/site "$(echo /opt/fedloom/lib/python3*)/site-packages"
for name in fedloom flower-superlink; do
    cat > /opt/fedloom/bin/$name << END
#!/bin/sh
export PYTHONPATH=/opt/source/src LD_LIBRARY_PATH=/opt/python/lib
exec /opt/fedloom/bin/python -m $name "\$@"
END
    chmod 755 /opt/fedloom/bin/$name
done
"""

BARE = "touch /run/ready; while :; do sleep 3600; done  # a shell, which waits for processes that lost theirs"

BOOT = r"""
mount -t cgroup2 cgroup2 /sys/fs/cgroup
rm -rf /etc/systemd/system /lib/systemd/system/*.wants
mkdir /etc/systemd/system
cat > /etc/systemd/system/box.target << 'END'
[Unit]
Requires=basic.target systemd-journald.service
After=basic.target
END
touch /run/ready
exec env -i container=box "PATH=$PATH" "$SYSTEMD" --system --unit=box.target --log-target=null
"""


class Box:
    """A machine; what is started in it ends with it."""

    def __init__(self, folder, systemd=False):
        self.folder, self.cgroup, self._output = folder, None, 0
        words = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--net", "--fork", "--kill-child"]
        if systemd:
            self.cgroup = _new_cgroup(f"fedloom-box-{os.getpid()}")
            words.append("--cgroup")
        enter = f"echo $$ > {self.cgroup}/cgroup.procs; " if systemd else ""
        root = folder / "box"
        root.mkdir()
        self.log = folder / "box.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", f'{enter}exec "$@"', "sh", *words,
                 "bash", "-c", SETUP + (BOOT if systemd else BARE)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={
                    "PATH": os.environ["PATH"], "BOX": str(root), "SOURCE": str(SOURCE),
                    "BASE": sys.base_prefix, "SITE": sysconfig.get_path("purelib"),
                    "PYTHON": f"/opt/python/bin/python{sysconfig.get_python_version()}",
                    "SYSTEMD": str(SYSTEMD),
                },
            )  # fmt: skip
        try:
            self._wait_for_start()
            if systemd:
                self.until("systemctl show -P ActiveState box.target", "active", seconds=30)
        except BaseException:
            self.close()
            raise

    def _wait_for_start(self):
        end = time.monotonic() + 30
        while True:
            if self.process.poll() is not None or time.monotonic() > end:
                raise OSError(f"no box can be made here: {self.log.read_text()[-400:].strip()}")
            with contextlib.suppress(IndexError, OSError):
                self.first = children(self.process.pid)[0]
                if self.at("/run/ready").exists():
                    return
            time.sleep(0.05)

    def at(self, path):
        """Return where this machine finds a path of the box."""
        return Path(f"/proc/{self.first}/root{path}")

    def words(self, command):
        return ["nsenter", "--target", str(self.first), "--all", *command]

    def call(self, command, user=None, folder="/opt/source", check=True, timeout=120):
        """Run a line of shell as root or as a user; return what it says and the exit code."""
        command = ["sh", "-c", f"cd {folder} && {command}"]
        if user is not None:
            command = ["runuser", "-u", user, "--", *command]
        done = subprocess.run(
            self.words(command), env=PLAIN, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done

    def until(self, command, text, seconds=60, count=1):
        """Wait until a command says a text, or says it so many times."""
        end, said = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            said = self.call(command, check=False).stdout
            if len(re.findall(rf"\b{text}\b", said)) >= count:
                return said
            time.sleep(0.2)
        raise AssertionError(f"{command} does not say {text!r}: {said[-3000:]}")

    def processes_of(self, user):
        """Return the command lines of a user's processes."""
        done = self.call(f"ps -u {user} -o args=", check=False)
        return done.stdout.splitlines()

    def close(self):
        self.process.kill()  # and with it all that runs in the box
        self.process.wait(20)
        if self.cgroup is not None:
            _remove_cgroup(self.cgroup)


class Confined:
    """A command of a box as a container, or a unit of systemd, is: one user, one folder to write, no rights."""

    def __init__(self, box, name, words, *, uid, folder, home, writable, binds=(), alone):
        """Start it; ``alone``: as the first of its own processes."""
        binding = [
            f"mkdir -p {to}; mount --bind {source} {to}; mount -o remount,bind,ro {to}"
            for source, to in binds
        ]
        script = "\n".join([
            "set -eu",
            "mount -t tmpfs -o mode=1777 tmpfs /tmp",
            f"mount --bind {writable} {writable}",
            *binding,
            "mount -o remount,bind,ro /",
            f"exec setpriv --reuid {uid} --regid {uid} --clear-groups --no-new-privs --bounding-set=-all"
            f" --inh-caps=-all env --chdir={folder} HOME={home} {shlex.join(words)}",
        ])  # fmt: skip
        spaces = ["--pid", "--fork", "--kill-child", "--mount-proc"] if alone else []
        self.log = box.folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                box.words(["unshare", "--mount", *spaces, "bash", "-c", script]), env=PLAIN,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.depth = 2 if alone else 1

    def wait_for(self, text, seconds=60):
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            if time.monotonic() > end or self.process.poll() is not None:
                raise AssertionError(f"{text!r} is not in {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def end(self, seconds=30):
        """Wait for its end; return the exit code and what it has said."""
        return self.process.wait(seconds), self.log.read_text()

    def terminate(self, seconds=30):
        """Send SIGTERM to it alone, and wait for its end."""
        process = self.process.pid  # nsenter's, or that of unshare below it
        for _ in range(self.depth):
            (process,) = children(process)
        os.kill(process, 15)
        return self.end(seconds)


def children(process):
    """Return the processes that one has started."""
    return [
        int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def why_no_box(systemd=False):
    """Return why this machine lets us make no box, or nothing."""
    needed = ["unshare", "nsenter", "setpriv", "runuser", "useradd", "pivot_root", "ip", "ps"]
    missing = [name for name in needed if shutil.which(name) is None]
    if sys.platform != "linux" or os.geteuid():
        return "only root makes such namespaces, on Linux"
    if missing:
        return f"missing: {', '.join(missing)}"
    if systemd and not SYSTEMD.exists():
        return "no systemd"
    if systemd and not any((own / "cgroup.procs").exists() for own in CGROUPS):
        return "no cgroups of version 2"
    return ""


def _new_cgroup(name):
    own = next(own for own in CGROUPS if (own / "cgroup.procs").exists()) / name
    own.mkdir()
    return own


def _remove_cgroup(own):
    end = time.monotonic() + 10
    while own.exists() and time.monotonic() < end:
        for folder, _, _ in os.walk(own, topdown=False):
            with contextlib.suppress(OSError):  # what was killed is about to leave it
                os.rmdir(folder)
        time.sleep(0.05)
