"""Shell completion: what is offered after some words, and what `--install-completion` writes."""

import pytest


@pytest.mark.parametrize(
    ("line", "place", "offered"),
    [
        ("fedloom memb", 1, ["members"]),
        ("fedloom audit ", 2, ["verify", "match", "privacy"]),
        ("fedloom run --res", 2, ["--resume"]),
        ("fedloom run --engine f", 3, []),
    ],
)
def test_commands_and_options_are_offered(call, monkeypatch, line, place, offered):
    monkeypatch.setenv("_FEDLOOM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(place))
    code, said = call()
    assert (code, said.split()) == (0, offered)


def test_it_is_installed_for_the_shell_it_is_called_in(call, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    code, said = call("--install-completion")
    assert code == 0 and "bash completion installed" in said
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_FEDLOOM_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
