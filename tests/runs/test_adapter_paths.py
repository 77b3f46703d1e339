"""What a path stands for, in every spelling, and in which form its run asked."""

import json

import pytest

from fedloom.data.templates import alpaca
from fedloom.errors import ModelError
from fedloom.runs.adapter_paths import adapter_folder, form_of, run_of


@pytest.fixture
def run(tmp_path):
    for own in ("runs/x/adapter", "runs/x/clients/0003", "elsewhere"):
        (tmp_path / own).mkdir(parents=True)
        (tmp_path / own / "adapter_config.json").write_text(json.dumps({}))
    (tmp_path / "runs/x/experiment.toml").write_text("")
    return tmp_path / "runs/x"


def test_a_run_its_adapter_and_its_clients_are_adapters_of_that_run(run, monkeypatch):
    assert adapter_folder(run) == adapter_folder(run / "adapter") == run / "adapter"
    assert adapter_folder(run / "clients/0003") == run / "clients/0003"
    places = (run, run / "adapter", run / "clients/0003", run / "adapter/../adapter")
    assert {run_of(place) for place in places} == {run}
    monkeypatch.chdir(run / "adapter")
    assert run_of(type(run)(".")) == run
    assert run_of(run.parent.parent / "elsewhere") is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/x/experiment.toml", "is an experiment, not an adapter"),
        ("runs/x/clients", "is not an adapter: it has no adapter_config.json"),
        ("gone", "is not an adapter: it has no adapter_config.json"),
    ],
)
def test_what_is_no_adapter_is_told(run, path, words):
    with pytest.raises(ModelError, match=words):
        adapter_folder(run.parent.parent / path)


def test_a_run_without_a_global_adapter_says_what_there_is(run):
    (run / "adapter/adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"models of their own, such as .*clients/0003"):
        adapter_folder(run)
    (run / "clients/0003/adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"has not ended; go on with fedloom run --resume"):
        adapter_folder(run)


@pytest.mark.parametrize(
    ("prompts", "name", "asked"),
    [
        ([alpaca("a"), alpaca("b")], "alpaca", alpaca("Why?")),
        (["a\n", "b\n"], "plain", "Why?\n"),
        (["a", "b\n"], "plain", "Why?"),
        (["a", "b"], "plain", "Why?"),
        ([({"role": "user", "content": "a"},)], "chat", ({"role": "user", "content": "Why?"},)),
    ],
)
def test_a_question_is_put_as_training_put_it(prompts, name, asked):
    form = form_of(prompts)
    assert (form.name, form.wrap("Why?")) == (name, asked)


def test_of_mixed_prompts_no_form_is_known():
    assert form_of(["a", ({"role": "user", "content": "a"},)]) is None
    assert form_of([]) is None and form_of(["", ""]) is None
