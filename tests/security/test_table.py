"""The table of docs/security.md: each line names a test that is there, and each file here has a line."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
LINES = re.findall(r"^\|.*\| `(tests/[^`]+)` \|$", PAGE, re.M)


def names(path):
    """Tests of a file, and its classes, as pytest calls them."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        own = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef):
            found |= {own} | {
                f"{own}::{inner.name}" for inner in node.body if hasattr(inner, "name")
            }
        elif own.startswith("test_"):
            found.add(own)
    return found


def test_each_line_names_a_test():
    assert len(LINES) > 20
    for line in LINES:
        path, _, name = line.partition("::")
        assert (ROOT / path).is_file(), line
        assert not name or name in names(path), line


def test_each_file_of_attacks_has_a_line():
    ours = {
        f"test_{p.name}" for p in (ROOT / "src/fedloom/security").glob("*.py")
    }  # of single files
    here = {
        f"tests/security/{p.name}"
        for p in Path(__file__).parent.glob("test_*.py")
        if p.name not in ours
    }
    assert here - {f"tests/security/{Path(__file__).name}"} == {
        line.partition("::")[0] for line in LINES if line.startswith("tests/security/")
    }


def test_settings_and_their_defaults_are_on_the_page():
    from fedloom.deployment.gateway import GatewaySettings

    shown = dict(re.findall(r"^(\w+) = ([\d.]+)\b", PAGE, re.M))
    assert {name: float(value) for name, value in shown.items()} == GatewaySettings().model_dump()
