"""The blocks of code on a page of the documentation, and their play in a folder."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"

BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.M | re.S)


def blocks(page):
    """Return language and text of each block of a page, in their order, also of those within lists."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [(language, textwrap.dedent(code)) for _, language, code in BLOCK.findall(text)]


def file_name(code):
    """Return the name of the file that a block is, which its first line says: ``# NAME``."""
    found = re.match(r"# (\w+\.(?:toml|py))\n", code)
    assert found, code.splitlines()[0]
    return found[1]


def environment():
    """Return an environment in which ``fedloom`` and ``python`` are those of these tests."""
    source = Path(__file__).parents[1] / "src"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}


def shell(script, folder, **more):
    """Run a script as a person's shell would, up to the first command that fails; return its output."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        **more,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def play(page, folder, changes=()):
    """Write the files of a page and run its commands, in the order of the page; return what they say.

    Each of ``changes`` is a text of the page and what is written in its place.
    """
    said, found = [], blocks(page)
    for before, after in changes:
        assert any(before in code for _, code in found), before
        found = [(language, code.replace(before, after)) for language, code in found]
    for language, code in found:
        if language in ("toml", "python"):
            (folder / file_name(code)).write_text(code, encoding="utf-8")
        if language == "python":
            said.append(shell(f"python {file_name(code)}", folder))
        if language == "sh":
            said.append(shell(code, folder))
    return said
