"""The units of systemd and the container image: each line is read, and all of it is tried.

Units are tried under systemd, in a machine of namespaces (``boxes.py``); and once more where there is no
systemd, with what matters of it put in its place, as are containers: another user, a root folder that
cannot be written, no rights.
"""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from boxes import SOURCE, Box, Confined, why_no_box
from fedloom import errors
from fedloom.commands.main import app
from loopback import client_file

KINDS = ("server", "client")
UNITS, CONTAINERS = SOURCE / "deploy" / "systemd", SOURCE / "deploy" / "containers"
PROGRAM = "/opt/fedloom/bin/fedloom"
SAID = {"server": "clients can join", "client": "joined"}


class Unit:
    """A unit of systemd: what it says, and what its comments tell an operator to do."""

    def __init__(self, kind):
        self.path = UNITS / f"fedloom-{kind}.service"
        text = self.path.read_text()
        self.steps = [line[4:] for line in text.splitlines() if line.startswith("#   ")]
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str
        parser.read_string(text.replace("\\\n", " "))
        self.unit, self.service = parser["Unit"], parser["Service"]
        program, *self.words = shlex.split(self.service["ExecStart"])
        assert program == PROGRAM
        self.environment = dict(x.split("=", 1) for x in self.service["Environment"].split())
        self.state = f"/var/lib/{self.service['StateDirectory']}"
        self.folder = self.service["WorkingDirectory"]


class Service:
    """The service of a compose file."""

    def __init__(self, kind):
        text = (CONTAINERS / f"{kind}.yaml").read_text()
        table = yaml.safe_load(text)
        self.comments = [x.lstrip("# ") for x in text.splitlines() if x.lstrip().startswith("#")]
        self.named = set(table["volumes"])
        self.service = table["services"][kind]
        self.words = self.service["command"]
        self.volumes = [volume.split(":") for volume in self.service["volumes"]]
        self.lines = dockerfile()

    def read_only(self):
        return [to for _, to, *how in self.volumes if how == ["ro"]]

    def writable(self):
        return [to for _, to, *how in self.volumes if not how]


def dockerfile():
    """The image's lines: the first word of each, and the rest."""
    text = (CONTAINERS / "Dockerfile").read_text().replace("\\\n", " ")
    return [x.split(maxsplit=1) for x in text.splitlines() if x and not x.startswith("#")]


def image(word):
    """The last line of the image that begins with a word."""
    return [rest for first, rest in dockerfile() if first == word][-1]


def options(words):
    """What the command line makes of words; unknown options and values that are none fail."""
    command, words = get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    params = command.make_context("fedloom", words).params
    paths = {"home", "ca", "key", "data"}
    found = {
        {"server_folder": "home", "client_folder": "home"}.get(n, n): v for n, v in params.items()
    }
    return {name: Path(v) if name in paths and v else v for name, v in found.items()}


def fedloom_steps(lines):
    """The commands of fedloom among an operator's steps."""
    found = [re.search(r"(?:\bfedloom|\brun --rm (?:server|client)) ((?:certs|keys|members|run) .*)", x) for x in lines]  # fmt: skip
    return [shlex.split(match[1]) for match in found if match]


def final_codes():
    """Exit codes that no restart mends."""
    classes = [errors.FedloomError]
    for own in classes:
        classes.extend(own.__subclasses__())
    codes = {own.exit_code for own in classes if not own.restart_helps}
    assert codes.isdisjoint(own.exit_code for own in classes if own.restart_helps)
    return codes


class TestUnits:
    @pytest.mark.parametrize("kind", KINDS)
    def test_systemd_finds_no_fault(self, kind, tmp_path):
        if shutil.which("systemd-analyze") is None:
            pytest.skip("no systemd-analyze")
        text = Unit(kind).path.read_text().replace(PROGRAM, sys.executable)  # which must be there
        (tmp_path / f"fedloom-{kind}.service").write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", f"{tmp_path}/fedloom-{kind}.service"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr

    @pytest.mark.parametrize("kind", KINDS)
    def test_its_command_is_one_of_ours(self, kind):
        unit = Unit(kind)
        own = options(unit.words)
        assert unit.words[:2] == (["server", "start"] if kind == "server" else ["client", "join"])
        assert not own["insecure"] and own["home"].is_relative_to(unit.state)
        for words in fedloom_steps(unit.steps):
            options(words)

    def test_what_the_client_reads_lies_where_its_steps_put_it(self):
        unit = Unit("client")
        own = options(unit.words)
        read = {str(Path(unit.folder) / own[name]) for name in ("ca", "key", "data")}
        (install,) = [
            shlex.split(x) for x in unit.steps if x.startswith("install ") and "-d" not in x
        ]
        (made,) = [words[2] for words in fedloom_steps(unit.steps)]
        put = {str(Path(install[-1]) / name) for name in install if "." in name and "/" not in name}
        assert read == put | {made}

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_that_may_be_written_is_one_folder_of_a_user_without_rights(self, kind):
        unit = Unit(kind)
        assert unit.service["User"] == "fedloom" and unit.service["CapabilityBoundingSet"] == ""
        assert unit.state == unit.folder == unit.environment["HOME"]
        assert unit.service["StateDirectoryMode"] == "0700" and unit.service["UMask"] == "0077"
        assert unit.service["ProtectSystem"] == "strict" and "ReadWritePaths" not in unit.service

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_no_restart_mends_is_not_restarted(self, kind):
        service = Unit(kind).service
        codes = {int(code) for code in service["RestartPreventExitStatus"].split()}
        assert codes == final_codes() and service["Restart"] == "on-failure"

    def test_both_are_alike(self):
        server, client = (dict(Unit(kind).service) for kind in KINDS)
        differ = {name for name in server | client if server.get(name) != client.get(name)}
        assert differ == {"ExecStart", "ProtectHome"}


class TestImage:
    def copied(self):
        found = [rest.split() for first, rest in dockerfile() if first == "COPY"]
        return [source for *sources, _ in found for source in sources]

    def test_what_is_copied_is_there_and_is_sent_to_the_builder(self):
        lines = (SOURCE / ".dockerignore").read_text().splitlines()
        assert {x[1:] for x in lines if x.startswith("!")} == set(self.copied())
        assert "*" in lines and all((SOURCE / name).exists() for name in self.copied())

    def test_the_package_is_built_from_what_is_copied(self, tmp_path):
        pytest.importorskip("hatchling")
        for name in self.copied():
            if (SOURCE / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(SOURCE / name, tmp_path / name, ignore=ignored)
            else:
                shutil.copy(SOURCE / name, tmp_path / name)
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
             "--wheel-dir", "built", "."],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        (wheel,) = (tmp_path / "built").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        own = {
            str(path.relative_to(tmp_path / "src"))
            for path in (tmp_path / "src").rglob("*")
            if path.is_file()
        }
        assert own == {name for name in names if name.startswith("fedloom/")}
        assert any(name.endswith("licenses/LICENSE") for name in names)

    def test_what_the_build_needs_is_copied(self):
        project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
        needed = {
            project["project"]["readme"],
            *project["project"]["license-files"],
            "pyproject.toml",
        }
        (package,) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        pip = shlex.split(image("RUN"))
        constraints = pip[pip.index("--constraint") + 1]
        assert needed | {constraints, package.partition("/")[0]} == set(self.copied())
        assert pip[:2] == ["pip", "install"] and pip[-1] == ".[${EXTRAS}]"
        extras = {image("ARG").removeprefix("EXTRAS="), "ray"}  # that of ray.yaml
        assert "--build-arg EXTRAS=ray -t fedloom-ray ." in (CONTAINERS / "ray.yaml").read_text()
        assert extras <= project["project"]["optional-dependencies"].keys()
        assert json.loads(image("ENTRYPOINT")) == list(project["project"]["scripts"])
        least = project["project"]["requires-python"].removeprefix(">=")
        assert image("FROM") == f"python:{least}-slim"

    def test_one_number_is_the_user_everywhere(self):
        (line,) = [rest for first, rest in dockerfile() if rest.startswith("useradd")]
        made, runs = (part.split() for part in line.split("&&"))
        number = made[made.index("--uid") + 1]
        assert image("USER") == number and int(number) != 0
        assert runs == ["install", "-d", "-o", number, f"/home/{made[-1]}/runs"]
        assert image("WORKDIR") == f"/home/{made[-1]}" and "--create-home" in made
        said = [line for line in Service("client").comments if "chown" in line]
        assert all(f"chown -R {number} " in line for line in said) and said

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_command_is_one_of_ours_and_its_paths_are_mounted(self, kind):
        own = Service(kind)
        found = options(own.words)
        folder = Path(image("WORKDIR"))
        assert own.writable() == [str(folder)] and own.read_only() == ["/own"]
        assert {volume[0] for volume in own.volumes} == {"./own", *own.named}
        assert not found["insecure"] and not found["home"].is_absolute()  # so it lies in the volume
        for name in {"ca", "key", "data"} & found.keys():
            assert found[name].parent == Path("/own")
        if kind == "server":
            assert own.service["ports"] == [f"{found['port']}:{found['port']}"]
        steps = fedloom_steps(own.comments)
        assert {words[0] for words in steps} == (
            {"certs", "members", "run"} if kind == "server" else {"keys"}
        )
        for words in steps:
            assert options(words).get("home", found["home"]) == found["home"]

    def test_both_services_are_alike(self):
        server, client = (Service(kind).service for kind in KINDS)
        differ = {name for name in server | client if server.get(name) != client.get(name)}
        assert differ == {"command", "ports", "volumes"}


@pytest.fixture(scope="module")
def booted(tmp_path_factory):
    """A machine with systemd."""
    yield from box(tmp_path_factory.mktemp("booted"), systemd=True)


@pytest.fixture
def bare(tmp_path):
    """A machine without."""
    yield from box(tmp_path, systemd=False)


def box(folder, systemd):
    if why := why_no_box(systemd):
        pytest.skip(why)
    try:
        own = Box(folder, systemd)
    except (OSError, AssertionError) as error:
        pytest.skip(f"no box: {error}")
    try:
        if own.call(f"{PROGRAM} keys new /tmp/probe", user="nobody", check=False).returncode:
            pytest.skip("another user cannot read this Python, or these packages")
        yield own
    finally:
        own.close()


def write_offer(path):
    """Write a client's file."""
    client_file(path, models=["/srv/model"])


def write_experiment(own, experiment, model_folder, path):
    """Put an experiment of one client, and its model, into a box."""
    shutil.copytree(model_folder, own.at("/srv") / "model")
    own.call("chmod -R a+rX /srv/model")
    settings = experiment(
        model={"path": "/srv/model"}, federation={"clients": 1, "rounds": 1, "patience": 60},
        training={"local_steps": 1},
    )  # fmt: skip
    text = re.sub(r"(?m)^folder = .*$", 'folder = "runs/tried"', settings.to_toml())
    own.at(path).write_text(text)


def allow(own, public, home, user="fedloom"):
    own.call(f"{PROGRAM} members allow hospital {public} --home {home}", user=user)


@pytest.mark.slow
class TestUnderSystemd:
    """In the order in which an operator meets it."""

    def journal(self, kind):
        return f"journalctl --no-pager -o cat -u fedloom-{kind}"

    def shown(self, own, kind, *names):
        said = own.call(f"systemctl show fedloom-{kind}").stdout
        found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        return [found[name] for name in names]

    def test_an_operators_steps_make_a_federation(self, booted):
        done = set()
        for kind in KINDS:
            if kind == "client":
                write_offer(booted.at("/root/my.toml"))
                booted.call("cp /var/lib/fedloom/server/ca.pem /root")
            for step in Unit(kind).steps:
                if step not in done:
                    here = "/root" if step.startswith("install -o") else "/opt/source"
                    booted.call(step, folder=here)
                    done.add(step)
                if "keys new" in step:
                    allow(booted, "/var/lib/fedloom/client.pub", "/var/lib/fedloom/server")
            booted.until(self.journal(kind), SAID[kind])
        assert "Traceback" not in booted.call(self.journal("server")).stdout

    def test_a_run_is_played(self, booted, experiment, model_folder):
        write_experiment(booted, experiment, model_folder, "/var/lib/fedloom/tried.toml")
        booted.call("chown fedloom /var/lib/fedloom/tried.toml")
        command = f"HOME=/var/lib/fedloom {PROGRAM} run tried.toml --engine flower --home server"
        booted.call(command, user="fedloom", folder="/var/lib/fedloom", timeout=300)
        assert booted.at("/var/lib/fedloom/runs/tried/adapter").is_dir()

    def test_others_see_nothing_of_it(self, booted):
        done = booted.call("ls /var/lib/fedloom", user="nobody", check=False)
        assert done.returncode and "Permission denied" in done.stderr

    def test_a_process_that_was_killed_is_started_again(self, booted):
        for kind in KINDS:
            before = booted.call(self.journal(kind)).stdout.count(SAID[kind])
            booted.call(f"systemctl kill --kill-whom=main -s KILL fedloom-{kind}")
            booted.until(self.journal(kind), SAID[kind], count=before + 1)

    def test_who_leaves_has_left(self, booted):
        booted.call(f"{PROGRAM} client leave --home /var/lib/fedloom/client", user="fedloom")
        booted.until("systemctl show -P ActiveState fedloom-client", "inactive")
        assert self.shown(booted, "client", "Result", "ExecMainStatus") == ["success", "0"]

    def test_a_member_that_is_let_in_no_more_is_not_started_again(self, booted):
        home = "--home /var/lib/fedloom/server"
        booted.call(f"{PROGRAM} members revoke hospital {home}", user="fedloom")
        booted.call("systemctl start fedloom-client")
        booted.until("systemctl show -P ActiveState fedloom-client", "failed")
        assert self.shown(booted, "client", "ExecMainStatus", "NRestarts") == ["5", "0"]

    def test_what_may_be_mended_is_tried_until_it_is(self, booted):
        booted.call("systemctl stop fedloom-server")
        booted.at("/run/taken.py").write_text(
            "import socket, time\ns = socket.create_server(('', 9092))\ntime.sleep(600)\n"
        )
        booted.call("systemd-run --unit taken /opt/fedloom/bin/python /run/taken.py")
        booted.call("systemctl start fedloom-server")
        before = booted.call(self.journal("server")).stdout.count(SAID["server"])
        booted.until(self.journal("server"), "choose another port", count=2)
        booted.call("systemctl stop taken")
        booted.until(self.journal("server"), SAID["server"], count=before + 1)

    def test_it_stops_at_once_and_nothing_is_left(self, booted):
        booted.call("systemctl stop fedloom-server", timeout=20)
        assert self.shown(booted, "server", "Result", "ExecMainStatus") == ["success", "0"]
        assert booted.processes_of("fedloom") == []


def start_unit(own, kind):
    """Start the command of a unit as systemd would, in what matters to it."""
    unit = Unit(kind)
    return Confined(
        own, kind, [PROGRAM, *unit.words], uid=own.uid, folder=unit.folder,
        home=unit.environment["HOME"], writable=unit.state, alone=False,
    )  # fmt: skip


def start_container(own, kind, words=None, name=None):
    """Start the command of a compose file as a container would."""
    service = Service(kind)
    (home,), (binding,) = service.writable(), service.read_only()
    entry = [PROGRAM] if json.loads(image("ENTRYPOINT")) == ["fedloom"] else []
    return Confined(
        own, name or kind, [*entry, *(words or service.words)], uid=image("USER"),
        folder=image("WORKDIR"), home=image("WORKDIR"), writable=home,
        binds=[(f"/srv/{kind}-own", binding)], alone=True,
    )  # fmt: skip


@pytest.mark.slow
def test_units_work_where_only_their_folder_can_be_written(bare):
    unit = Unit("client")
    bare.call(unit.steps[0])
    bare.call(unit.steps[1])
    bare.uid = bare.call("id -u fedloom").stdout.strip()
    steps = fedloom_steps([*Unit("server").steps, *unit.steps])
    for words in steps:
        bare.call(shlex.join([PROGRAM, *words]), user="fedloom")
    allow(bare, f"{unit.state}/client.pub", f"{unit.state}/server")
    write_offer(bare.at("/root/my.toml"))
    (install,) = [step for step in unit.steps if step.startswith("install -o")]
    bare.call(f"cp {unit.state}/server/ca.pem /root")
    bare.call(install, folder="/root")
    started = []
    for kind in KINDS:
        started.append(start_unit(bare, kind))
        started[-1].wait_for(SAID[kind])
    for own in reversed(started):
        code, said = own.terminate()
        assert code == 0 and "Traceback" not in said
    # A worker that was just started sees by itself, once it has imported what it needs, that we are gone.
    end = time.monotonic() + 20
    while left := bare.processes_of("fedloom"):
        assert time.monotonic() < end, left
        time.sleep(0.2)


@pytest.mark.slow
def test_containers_work_with_a_root_that_cannot_be_written(bare, experiment, model_folder):
    user, home = image("USER"), image("WORKDIR")
    (made,) = [rest for first, rest in dockerfile() if rest.startswith("useradd")]
    bare.call(made)
    for kind in KINDS:
        bare.call(f"mkdir /srv/{kind}-own")
    (certs,) = [words for words in fedloom_steps(Service("server").comments) if words[0] == "certs"]
    assert start_container(bare, "server", certs, "certs").end()[0] == 0
    bare.call(f"cp {home}/federation/ca.pem /srv/client-own")
    bare.call(f"{PROGRAM} keys new /srv/client-own/client.key")
    bare.call("cp /srv/client-own/client.pub /srv/server-own/hospital-a.pub")
    write_offer(bare.at("/srv/client-own/my.toml"))
    write_experiment(bare, experiment, model_folder, "/srv/server-own/experiment.toml")
    server = start_container(bare, "server")
    server.wait_for(SAID["server"])
    (letting,) = [
        words for words in fedloom_steps(Service("server").comments) if words[0] == "members"
    ]
    assert start_container(bare, "server", letting, "members").end()[0] == 0

    code, said = start_container(bare, "client").end()
    said, more = said.strip().splitlines()
    assert code == 5 and "/own/client.key" in said and more.startswith("more: fedloom explain ")
    assert f"belongs to root (user 0), and this runs as fedloom (user {user})" in said

    bare.call(f"chown -R {user} /srv/client-own; chmod 600 /srv/client-own/client.key")
    client = start_container(bare, "client")
    client.wait_for(SAID["client"])
    (run,) = [words for words in fedloom_steps(Service("server").comments) if words[0] == "run"]
    code, said = start_container(bare, "server", run, "run").end(120)
    assert code == 0, said
    assert (bare.at(home) / "runs" / "tried" / "adapter").is_dir()
    for own in (client, server):
        code, said = own.terminate(10)  # what Docker waits for unless told otherwise
        assert code == 0 and "Traceback" not in said
    assert bare.processes_of(user) == []
