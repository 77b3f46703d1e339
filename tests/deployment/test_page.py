"""docs/federation.md: its commands give a federation, its words are those of the program."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from fedloom.commands import main
from fedloom.deployment.client_file import OWN_SECTIONS
from fedloom.deployment.policy import PolicySettings
from fedloom.experiment.experiment import SECTIONS
from machines import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "federation.md").read_text()


@cache
def top_command():
    """The command line, which takes a tenth of a second to make."""
    return typer.main.get_command(main.app)


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


def test_commands_on_the_page_are_commands():
    command = top_command()
    said = re.findall(r"fedloom ((?:[a-z]+ )?[a-z]+)", "\n".join(blocks("sh")))
    for words in {name for name in said if not name.startswith(("server log", "is"))}:
        own = command.commands.get(words.split()[0])
        assert own is not None, words
        inner = getattr(own, "commands", None)
        assert inner is None or words.split()[1] in inner, words


def test_files_on_the_page_are_there():
    for path in re.findall(r"\]\(\.\./([^)#]+)\)", PAGE):
        assert (ROOT / path).exists()


def test_settings_on_the_page_are_settings():
    client, *experiments = map(tomllib.loads, blocks("toml"))
    for section, table in client.items():
        assert table.keys() <= OWN_SECTIONS[section].model_fields.keys()
    for coordinator in experiments:
        for section, table in coordinator.items():
            assert table.keys() <= SECTIONS[section].model_fields.keys()
    for name in re.findall(r"`federation\.(\w+)", PAGE):
        assert name in SECTIONS["federation"].model_fields


def test_every_line_of_a_policy_is_on_the_page_with_its_default():
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
    said = {}
    for first, second, *_ in rows:
        names = re.findall(r"`(\w+)`", first)
        values = re.split(r", (?!\d{3})", second.strip())
        said |= dict(itertools.zip_longest(names, values[: len(names)]))
    for name, field in PolicySettings.model_fields.items():
        assert name in said, name
        if name.startswith("max_"):
            value = "4 GiB" if field.default == 4 << 30 else f"{field.default:,.0f}"
            assert said[name] == value, name


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_commands_that_a_page_names_are_there(page):
    top = top_command()
    for words in re.findall(r"`fedloom ([a-z][^`]*)`", (ROOT / "docs" / page).read_text()):
        command, *rest = words.replace("…", " ").split()
        found = top.commands[command]
        if isinstance(found, click.Group):
            if not rest:  # `fedloom members`: all of them
                continue
            found = found.commands[rest[0]]
        options = {"--help", *(name for own in found.params for name in own.opts)}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", words)) <= options, words


@pytest.mark.slow
def test_who_follows_the_page_gets_a_federation(tmp_path):
    (script,) = [block for block in blocks("sh") if "make .venv" in block]
    lines = script.splitlines()
    assert lines[0] == "make .venv/.developing" and lines[1].startswith("mkdir try && cd try")
    words = f'mkdir try && cd try && export PATH="{Path(sys.executable).parent}:$PATH"'
    script = "\n".join(["set -euo pipefail", words, *lines[2:], "wait"])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "round 3/3" in done.stdout and "site-1  connected" in done.stdout
    assert (tmp_path / "try/runs/experiment/adapter/adapter_model.safetensors").is_file()
