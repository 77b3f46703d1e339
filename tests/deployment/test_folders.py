"""A client's own file and folder: mistakes are named, and nothing of it is for others."""

import errno
import socket
import time
from pathlib import Path

import pytest

from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.folders import ClientFolder, Registration, ServerFolder
from fedloom.deployment.policy import PolicySettings
from fedloom.deployment.processes import (
    SupervisedProcess,
    address,
    free_port,
    make_room,
    program,
    reachable,
    require_free,
    wait_until_open,
)
from fedloom.errors import ConnectionFailed, OutputError, SettingsError
from fedloom.storage.files import make_private


def own(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return OwnFile.read(path)


def test_a_file_with_everything(tmp_path):
    found = own(
        tmp_path,
        '[data]\nsource = "rows.jsonl"\nkind = "preference"\ncolumns = { prompt = "question" }\n'
        '[public]\nsource = "all.jsonl"\n[model]\npath = "m"\n[policy]\nmax_rank = 8\n'
        '[training]\ndevice = "cpu"\nthreads = 2\n[worker]\nidle = 60.0\n',
    )
    assert found.data.source == "rows.jsonl" and found.data.columns == {"prompt": "question"}
    assert (found.public.source, found.policy.max_rank) == ("all.jsonl", 8)
    assert (found.model.path, found.training.threads, found.worker.idle) == ("m", 2, 60.0)
    assert own(tmp_path, "").data is None and own(tmp_path, "").policy == PolicySettings()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "data.source: missing"),
        ('source = "rows.jsonl"', "data.kind is missing"),
        ('source = "clients"', "is for experiments"),
        ('source = "builtin:labelled"', 'belongs to no client: data.share = "experiment"'),
        ('source = "builtin:labelled"\nshare = "experiment"\nkind = "preference"', "data.kind ="),
        ('source = "a.jsonl"\nkind = "labelled"\ntest_source = "b.jsonl"', "data.test_source"),
        ('source = "a.jsonl"\nkind = "labelled"\ndeal = true', "data.deal: unknown key"),
    ],
)
def test_rows_that_cannot_be_offered(tmp_path, text, wrong):
    with pytest.raises(SettingsError, match=wrong):
        own(tmp_path, f"[data]\n{text}\n")


def test_all_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(SettingsError) as wrong:
        own(tmp_path, '[dat]\nx = 1\n[data]\nsource = "a"\ncolumn = {}\n[worker]\nidle = -1.0\n')
    text = str(wrong.value)
    assert "3 mistakes" in text and "[dat]" in text and "columns" in text and "idle" in text


def test_a_home_says_how_it_was_joined(tmp_path):
    home = ClientFolder(tmp_path)
    with pytest.raises(SettingsError, match="file not found"):
        home.registration()
    joining = Registration(gateway="localhost:1", number=3, name="n", key="k")
    home.write_registration(joining)
    assert home.registration() == joining and home.own_file() == OwnFile()
    assert (tmp_path / "client.toml").stat().st_mode & 0o777 == 0o600


def test_no_server_is_said_with_what_to_do(tmp_path):
    with pytest.raises(SettingsError, match="`fedloom server start --home"):
        ServerFolder(tmp_path).serving()


def test_a_child_that_dies_is_started_again_and_ends_with_us(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.processes.PAUSE", 0.0)
    child = SupervisedProcess(
        ["python", "-c", "import time; time.sleep(60)"], tmp_path / "logs" / "a.out", {}
    )
    assert not child.keep_alive() and not child.keep_alive()
    first = child.process
    first.kill()
    first.wait()
    assert child.keep_alive() and child.process.pid != first.pid
    words = Path(f"/proc/{child.process.pid}/cmdline")
    while not words.read_bytes():  # it has just been started, and is not yet what it will be
        time.sleep(0.001)
    again = SupervisedProcess(child.command, child.log, {})
    again.end_orphan()  # as after a kill of who started it
    assert child.process.wait(5) == -9
    child.stop()


def test_a_log_that_has_grown_large_is_begun_again_under_who_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.processes.LARGE", 10)
    command = ["python", "-c", "while True: print(input(), flush=True)"]
    child, old = SupervisedProcess(command, tmp_path / "a.out", {}), tmp_path / "a.out.1"
    child.log.write_text("l" * 11)
    child.keep_alive()
    assert child.log.read_text() == "" and old.read_text() == "l" * 11
    process = child.process
    child.stop()
    with child.log.open("ab") as log:
        for line in (b"one\n", b"twelve bytes\n", b"three\n"):
            log.write(line)
            log.flush()
            make_room(child.log)
    assert process.returncode is not None
    assert child.log.read_bytes() == b"three\n" and old.read_bytes() == b"one\ntwelve bytes\n"


def test_a_full_disk_does_not_keep_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.deployment.processes.LARGE", 10)
    log = tmp_path / "a.out"
    log.write_text("l" * 11)
    log.with_name("a.out.1").mkdir()  # cannot be written
    make_room(log)
    assert log.read_text() == ""
    make_room(tmp_path / "there is none")


def test_a_child_that_does_not_start_is_told(tmp_path):
    child = SupervisedProcess(["python", "-c", "raise SystemExit(1)"], tmp_path / "a.out", {})
    child.keep_alive()
    child.process.wait()
    with pytest.raises(ConnectionFailed, match=r"python did not start; see .*a\.out"):
        wait_until_open("127.0.0.1", free_port(), child)


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionFailed, match=f"cannot listen at 127.0.0.1:{port}"):
            require_free("127.0.0.1", port)


def test_a_port_that_needs_a_right_is_told_with_what_to_do(monkeypatch):
    def refuse(probe, where):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    told = r"cannot listen at \[::\]:443: Permission denied; for a port below 1024 set Ambient"
    with pytest.raises(ConnectionFailed, match=told):
        require_free("::", 443)


@pytest.mark.parametrize(
    ("host", "found"),
    [("0.0.0.0", "localhost"), ("::", "localhost"), ("10.0.0.5", "10.0.0.5"), ("::1", "[::1]")],
)
def test_a_server_reaches_itself_where_it_listens(host, found):
    assert address(reachable(host), 9) == f"{found}:9"


def test_flower_that_is_not_installed_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"pip install 'fedloom\[flower\]'"):
        program("flower-superlink")


def test_paths_are_those_beside_the_file_whatever_the_working_directory_is(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    for name in ("rows.jsonl", "more.jsonl", "public.jsonl"):
        (tmp_path / "own" / name).write_text("")
    (tmp_path / "own" / "model").mkdir()
    path = tmp_path / "own" / "my.toml"
    path.write_text(
        '[data]\nkind = "preference"\n'
        '[data.domains.a]\nsource = "rows.jsonl"\n[data.domains.b]\nsource = ["more.jsonl", "org/set"]\n'
        '[public]\nsource = "public.jsonl"\n[model]\npath = "model"\n'
    )
    monkeypatch.chdir(tmp_path)
    own, folder = OwnFile.read(path), tmp_path / "own"
    assert own.data.domains["a"].source == str(folder / "rows.jsonl")
    assert own.data.domains["b"].source == [str(folder / "more.jsonl"), "org/set"]  # of the Hub
    assert own.public.source == str(folder / "public.jsonl")
    assert own.model.path == str(folder / "model")
    path.write_text(
        '[data]\nsource = "rows.jsonl"\nkind = "preference"\n[model]\npath = "org/model"\n'
    )
    monkeypatch.chdir(folder)
    own = OwnFile.read(Path("my.toml"))
    assert own.data.source == str(folder / "rows.jsonl") and own.model.path == "org/model"
    path.write_text('[data]\nsource = "builtin:preferences"\nshare = "experiment"\n')
    assert OwnFile.read(path).data.source == "builtin:preferences"


def test_folders_are_their_owners_alone(tmp_path):
    folder = tmp_path / "home"
    assert make_private(folder) is False and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert make_private(folder) is True and folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="private"):
        make_private(tmp_path / "file" / "x")


def test_a_clients_folder_is_told_from_all_others_and_keeps_that(tmp_path):
    homes = [ClientFolder(tmp_path / name) for name in ("a", "b")]
    ids = [home.id for home in homes]
    assert ids[0] != ids[1] and [home.id for home in homes] == ids
    (tmp_path / "a" / "id").write_text("no id")
    assert homes[0].id not in ids
