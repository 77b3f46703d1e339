"""Folders to repositories of the Hub: a stand-in for what HfApi calls, with its answers and errors."""

from types import SimpleNamespace

import pytest

from fedloom.commands.export import _readers
from fedloom.errors import ConnectionFailed, OutputError
from fedloom.runs.export import _for_others
from fedloom.runs.model_cards import data_facts
from fedloom.runs.publishing import HubRepository


class Hub:
    """Answers as HfApi; repositories are ``name: (private, files)``."""

    def __init__(self, repositories=(), error=None):
        """Have repositories already, and an error for one call by its name."""
        self.repositories, self.calls, self.error = dict(repositories), [], error or {}

    def _called(self, name):
        self.calls.append(name)
        if name in self.error:
            raise self.error[name]

    def whoami(self):
        """Say whose token it is."""
        self._called("whoami")
        return {"name": "me"}

    def repo_exists(self, repo_id):
        """Say whether there is one."""
        self._called("repo_exists")
        return repo_id in self.repositories

    def repo_info(self, repo_id):
        """Say what one is."""
        self._called("repo_info")
        return SimpleNamespace(private=self.repositories[repo_id][0])

    def create_repo(self, repo_id, *, private, exist_ok):
        """Make one."""
        self._called("create_repo")
        assert exist_ok
        self.repositories.setdefault(repo_id, (private, []))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        """Take its files."""
        self._called("upload_folder")
        assert commit_message
        self.repositories[repo_id][1].append(folder_path)


@pytest.mark.parametrize("public", [False, True])
def test_a_new_repository_is_private_unless_it_is_asked_to_be_public(tmp_path, public):
    hub = Hub()
    repository = HubRepository("me/model", public=public, api=hub)
    assert hub.calls == [
        "whoami",
        "repo_exists",
    ]  # nothing is made before there is something to upload
    assert repository.upload(tmp_path) == "https://huggingface.co/me/model"
    assert hub.repositories == {"me/model": (not public, [str(tmp_path)])}


def test_a_repository_that_anybody_reads_is_refused_before_anything_is_written(tmp_path):
    hub = Hub({"me/model": (False, [])})
    with pytest.raises(OutputError, match="anybody can read it"):
        HubRepository("me/model", public=False, api=hub)
    HubRepository("me/model", public=True, api=hub).upload(tmp_path)
    own = Hub({"me/model": (True, [])})
    HubRepository("me/model", public=False, api=own).upload(tmp_path)
    assert own.repositories["me/model"] == (True, [str(tmp_path)])


@pytest.mark.parametrize(
    ("there", "public", "told"),
    [
        ({}, False, "private"),
        ({}, True, "public"),
        ({"me/model": (True, [])}, True, "private, as it was before; its settings on the Hub"),
    ],
)
def test_what_a_repository_is_is_said_and_not_what_was_asked(tmp_path, there, public, told):
    repository = HubRepository("me/model", public=public, api=Hub(there))
    repository.upload(tmp_path)
    said = _readers(public=repository.is_public, asked=public)
    assert said.startswith(told) and repository.is_public == (told == "public")


def test_no_name_of_the_hubs_data_is_published(experiment):
    """It may be a private set's; nor is it where a run from before has it in its facts."""
    own = experiment(data={"source": "our-clinic/patients-2024", "kind": "preference"})
    assert data_facts(own)["sources"] == []
    assert data_facts(experiment())["sources"] == [experiment().data.source]
    base = {"name": "gpt2", "path": "/models/gpt2", "hub": False}
    facts = _for_others({"base": base, "data": {"sources": ["our-clinic/patients-2024"]}})
    assert facts == {"base": {**base, "path": "./gpt2"}, "data": {"sources": []}}


def test_one_that_became_public_meanwhile_gets_nothing(tmp_path):
    hub = Hub()
    repository = HubRepository("me/model", public=False, api=hub)
    hub.repositories["me/model"] = (False, [])
    with pytest.raises(OutputError, match="--public"):
        repository.upload(tmp_path)
    assert "upload_folder" not in hub.calls


@pytest.mark.parametrize("name", ["model", "a/b/c", "a/b c", "/b", "a/", "../x", ""])
def test_names_that_are_none_are_refused(name):
    hub = Hub()
    with pytest.raises(OutputError, match="OWNER/NAME"):
        HubRepository(name, public=False, api=hub)
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_error(tmp_path):
    with pytest.raises(ConnectionFailed, match=r"hf auth login.*: no token"):
        HubRepository("me/m", public=False, api=Hub(error={"whoami": ValueError("no token")}))
    hub = Hub(error={"upload_folder": OSError("too large\nmore")})
    with pytest.raises(ConnectionFailed, match=r"tries again.*: too large$"):
        HubRepository("me/m", public=False, api=hub).upload(tmp_path)


def test_offline_is_one_error_before_anything_is_loaded(call, experiment, tmp_path):
    """The tests' own environment is offline."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "experiment.toml").write_text(experiment().to_toml())
    code, out = call("export", run, "--hub", "me/model")
    assert code == 4 and "HF_HUB_OFFLINE" in out and not (run / "exported").exists()
    code, out = call("export", run, "--public")
    assert code == 2 and "--public is of --hub" in out
    code, out = call("export", run, "--outtype", "q8_0")
    assert code == 2 and "is of --format gguf" in out
    code, out = call("export", run, "--format", "adapter", "--reward")
    assert code != 0 and "leave one out" in out
