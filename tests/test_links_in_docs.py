"""Links and paths in the repository's texts: each file and heading is there, addresses are well-formed."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path.relative_to(ROOT)
    for folder, pattern in (
        (".", "*.md"),
        ("docs", "*.md"),
        ("examples", "*.md"),
        ("deploy", "**/*.md"),
    )
    for path in (ROOT / folder).glob(pattern)
)

LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\"|<(https?:[^>\s]+)>")
ADDRESS = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}(/[^\s\"<>]*)?")


def prose(path):
    """Return a text without its blocks of code and code in lines."""
    text = re.sub(
        r"^ *```.*?^ *```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and MkDocs both make them."""
    text = re.sub(
        r"^ *```.*?^ *```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    found = re.findall(r"^#+ (.+)$", text, re.M)
    words = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", own)) for own in found]
    return {re.sub(r"[\s]", "-", own.strip().lower()) for own in words}


def links(path):
    return [next(filter(None, found)) for found in LINK.findall(prose(path))]


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_links_lead_somewhere(text):
    for link in links(text):
        if re.match(r"\w+:", link):
            assert ADDRESS.fullmatch(link), link
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / text.parent / name).resolve() if name else ROOT / text
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT)), link


def test_broken_links_would_be_found():
    assert LINK.findall('[a](b.md#c) <img alt="" src="d.png"> <https://e.org/f>') == [
        ("b.md#c", "", ""),
        ("", "d.png", ""),
        ("", "", "https://e.org/f"),
    ]
    assert not ADDRESS.fullmatch("https//fedloom") and not ADDRESS.fullmatch("http://a.org")
    assert "reporting-a-fault" in anchors("SECURITY.md")
    assert sum(len(links(text)) for text in TEXTS) > 150


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


SECTIONS = "src/fedloom/reports/sections"


def paths_in(text):
    """Return what stands in code and looks like a path of the repository."""
    words = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    looks = re.compile(r"[\w./-]+/|[\w./-]+\.(?:py|toml|md|txt|log|cff)|\.ci/run|[\w-]+/[\w./-]+")
    found = {word.rstrip(",") for word in words if looks.fullmatch(word.rstrip(","))}
    return {own for own in found if not own.startswith((".venv/", "dist/"))}


def test_paths_in_contributing_are_there():
    found = paths_in((ROOT / "CONTRIBUTING.md").read_text())
    assert len(found) > 30
    near = [
        ROOT,
        *(
            ROOT / own
            for own in ("src/fedloom", "tests", "benchmarks", "src/fedloom/methods", SECTIONS)
        ),
    ]
    assert [own for own in found if not any((folder / own).exists() for folder in near)] == []


def test_the_table_in_contributing_has_every_room():
    table = re.findall(r"^\| (`\S+`(?:, `\S+`)*) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    listed = {own.strip("/") for row in table for own in re.findall(r"`(\S+?)`", row)}
    rooms = {path.name for path in (ROOT / "src/fedloom").iterdir() if path.name[0] != "_"}
    assert listed == rooms - {"py.typed"}


def test_the_workflow_tries_every_python_that_the_package_claims():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claimed = [
        own.rpartition(" ")[2] for own in package["classifiers"] if re.search(r"Python :: 3\.", own)
    ]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == claimed
    assert package["requires-python"] == f">={claimed[0]}"
