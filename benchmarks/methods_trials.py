"""Every method under every condition that must not change what comes of it, as a table.

    .venv/bin/python benchmarks/methods_trials.py [--only EXPRESSION] [--missing]

Runs ``tests/methods/test_every_condition.py``, which says what the conditions are, in one process: all of
it, what an expression of ``pytest -k`` selects, or with ``--missing`` what has not passed yet. Each
outcome is a line of results/methods-trials.jsonl as soon as it is known, with date, commit and seconds of
the processor; results/methods-trials.md is the table of the last outcome of each.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests/methods/test_every_condition.py"
TEST = "test_a_method_is_the_same_under_a_condition["
LINES = ROOT / "benchmarks/results/methods-trials.jsonl"
PAGE = LINES.with_suffix(".md")
CONDITIONS = ("workers", "resumed", "machines", "together", "summed")
SHOWN = {"passed": "equal", "failed": "**differs**"}
HEAD = """\
# Methods under conditions that must not change them

`benchmarks/methods_trials.py`; `tests/methods/test_every_condition.py` has the conditions in full. Four
clients and four rounds by a schedule of absences, with tensors compressed where the method allows it.
workers: two of them, some of which end. resumed: stopped within a round. machines: messages as between
machines, all of which are started anew within a round. together: cohorts of four, without codecs; the
same bits with workers, and those of one by one but for rounding. summed: secure aggregation, alone, with
workers and in cohorts. A dash: the method says that it does not go with it, or is no exchange in rounds.
"""


def commit():
    """Return the commit that is tested, and whether files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


class Outcomes:
    """A plugin of pytest that notes each outcome, and leaves out what has passed."""

    def __init__(self, passed=frozenset()):
        """Take the cells that are left out."""
        self.passed, self.known, self.begun, self.commit = passed, set(), 0.0, commit()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        """Note all cells, before any are deselected, and keep those that have not passed."""
        cells = {item: cell_of(item.name) for item in items if item.name.startswith(TEST)}
        self.known |= set(cells.values())
        items[:] = [item for item, cell in cells.items() if cell not in self.passed]

    def pytest_runtest_setup(self):
        """Begin to measure."""
        self.begun = time.process_time()

    def pytest_runtest_logreport(self, report):
        """Note an outcome."""
        if report.when != "call" and not report.failed:
            return
        method, condition = cell_of(report.nodeid.rpartition("::")[2])
        line = {
            "method": method,
            "condition": condition,
            "outcome": report.outcome,
            "seconds": round(time.process_time() - self.begun, 1),
            "commit": self.commit,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        }
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")


def cell_of(name):
    """Return method and condition of a test's name."""
    return tuple(name.removeprefix(TEST).removesuffix("]").split(" "))


def known():
    """Return the last outcome of each cell."""
    lines = LINES.read_text().splitlines() if LINES.is_file() else []
    return {(own["method"], own["condition"]): own for own in map(json.loads, lines)}


def told(own):
    """Return an outcome as a cell of the table; seconds where they were measured."""
    if own is None:
        return "not run"
    seconds = f", {own['seconds']:.0f} s" if own["seconds"] else ""
    return SHOWN[own["outcome"]] + seconds


def page(cells, found):
    """Return the table of all cells."""
    lines = [HEAD, "| method | " + " | ".join(CONDITIONS) + " |", "| --- " * 6 + "|"]
    for method in sorted({method for method, _ in cells}):
        row = []
        for condition in CONDITIONS:
            own = found.get((method, condition))
            row.append(told(own) if (method, condition) in cells else "-")
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    done = [own for cell, own in found.items() if cell in cells]
    equal = sum(own["outcome"] == "passed" for own in done)
    minutes = sum(own["seconds"] or 0 for own in done) / 60
    commits = ", ".join(sorted({own["commit"] for own in done}))
    dates = sorted(own["date"] for own in done) or ["never"]
    different, left = len(done) - equal, len(cells) - len(done)
    lines += [
        "",
        f"{equal} of {len(cells)} equal, {different} different, {left} not run; {minutes:.0f} minutes "
        f"of one processor where measured; commits {commits}; {dates[0]} to {dates[-1]} UTC.",
    ]
    return "\n".join(lines) + "\n"


def main():
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="what to run, as of pytest -k")
    parser.add_argument("--missing", action="store_true", help="run what has not passed yet")
    asked = parser.parse_args()
    passed = {cell for cell, own in known().items() if own["outcome"] == "passed"}
    outcomes = Outcomes(passed if asked.missing else frozenset())
    code = pytest.main(
        [str(TESTS), "-m", "full", "-k", asked.only, "--tb=short", "-p", "no:xdist"], [outcomes]
    )
    PAGE.write_text(page(outcomes.known, known()))
    sys.exit(code)


if __name__ == "__main__":
    main()
