"""Identifiers of the package are the field's terms: each word below was a private one, and has a replacement.

Names of files, of settings and of fields in messages and records are part of a format; those that keep an
old word are listed with the reason.
"""

import ast
import re
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "fedloom"

TERMS = {
    "anatomy": "architecture layout",
    "arm": "configuration",
    "arms": "configurations",
    "briefing": "run description",
    "desk": "trainer of the server part",
    "divide": "partition",
    "door": "gateway",
    "equip": "setup",
    "equipment": "resources of a client",
    "family": "supervisor",
    "greeting": "handshake",
    "headlines": "primary metrics",
    "hits": "routed tokens",
    "home": "data folder",
    "homes": "data folders",
    "kit": "bundle",
    "kits": "bundles",
    "knock": "register",
    "knowledge": "soft labels",
    "leg": "segment",
    "legs": "segments",
    "mail": "transport, grid",
    "merges": "additions",
    "newcomer": "unseen client",
    "newcomers": "unseen clients",
    "news": "run events",
    "offence": "violation",
    "offences": "violations",
    "offended": "violations",
    "roster": "clients of a run, client registry",
    "slip": "fault",
    "spool": "disk buffer",
    "stranger": "unauthenticated peer",
    "strangers": "unauthenticated peers",
    "stretch": "segment of a run",
    "sweep": "remove",
    "travelling": "sent",
    "undone": "discarded",
    "unheard": "no-op recorder",
    "watched": "probed",
    "welcome": "register, send to unseen clients",
}

FORMATS = {
    ("address_family", "http_server.py"): "an attribute that the standard library reads",
    ("address_family", "metrics.py"): "an attribute that the standard library reads",
    ("family", "network_exposure.py"): "of addresses, as in the module socket",
    ("family", "gateway.py"): "of addresses, as in the module socket",
    ("family", "metrics.py"): "of metrics, as in prometheus_client",
    ("home", "handshake.py"): "a field of a claim on the wire",
    ("home", "run_requests.py"): "a field of a run request on disk",
    ("newcomer_steps", "participants.py"): "a setting",
    ("newcomers", "participants.py"): "a setting",
    ("newcomers", "experiment_view.py"): "a setting",
    ("offences", "admission.py"): "a setting",
    ("offences", "records.py"): "a field of a round's record in rounds.jsonl",
    ("undone", "envelope.py"): "a field of a request on the wire",
}

LATER = {
    "reports": "its pages read results.json, whose key is arms",
}
"""Folders whose own words are still those of the files that they read."""


def defined(tree):
    """Yield every name that a module defines or binds, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno


@cache
def old_words(name):
    """The old words in a name, each once."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return sorted({word.lower() for word in words} & TERMS.keys())


def found(folder, pattern="**/*.py"):
    for path in sorted(folder.glob(pattern)):
        if path.relative_to(folder).parts[0] in LATER:
            continue
        text = path.read_text()
        if not any(map(old_words, re.findall(r"\w+", text))):
            continue  # no name in it can have one
        for name, line in defined(ast.parse(text)):
            for word in old_words(name):
                yield name, path.name, line, word


def test_identifiers_have_the_terms_of_the_field():
    wrong = [
        f"{file}, line {line}: {name}; the field says {TERMS[word]!r}"
        for name, file, line, word in found(SOURCE)
        if (name, file) not in FORMATS
    ]
    assert wrong == []


def test_every_exception_is_still_needed():
    assert {(name, file) for name, file, _, _ in found(SOURCE)} == FORMATS.keys()


def test_an_old_word_is_found_in_any_part_of_a_name(tmp_path):
    (tmp_path / "a.py").write_text(
        "import x as the_roster\n"
        "class KitOfClient:\n"
        "    def open_door(self, home_of):\n"
        "        self.newsReader = [leg for leg in home_of]\n"
        "orderly = legend = 1\n"
    )
    assert {word for *_, word in found(tmp_path)} == {
        "roster",
        "kit",
        "door",
        "home",
        "news",
        "leg",
    }
