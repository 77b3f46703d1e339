"""Mutation test: how many small faults in the code that computes results do the tests find?

    .venv/bin/python benchmarks/mutants.py [--count 300] [--minutes 60] [--default-only] [PATH ...]

A mutant is one change of one place of a module: an operator, a comparison, a constant, a condition or a
returned value. The same number is drawn of each part of STRATA by the hash of the commit, and each is
tried, with ``-x``, by the tests of its module: of ``src/fedloom/a/b.py`` these are ``tests/a/test_b.py``,
the test files that import it, those in ``tests/a`` that have "b" as a name in quotes (a method's), and
where there is none of these all of ``tests/a``. It is killed where a test fails or the tests take ten
times as long and a minute more. Who survives those of the default suite is tried by the slow ones, and is
killed where one fails that passes without the change. With PATHs (modules), only theirs are drawn. Exit
status 1: fewer than WANTED of them are killed, those in ``equivalent_mutants.txt`` aside, which change
nothing that can be seen and say why.

Kept libraries (mutmut, cosmic-ray) start an interpreter for each mutant, which takes 8 to 20 s to import
torch and transformers; here a mutant is a fork of a process that has imported them.
"""

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TESTS = ROOT / "src" / "fedloom", ROOT / "tests"
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"

STRATA = {
    "aggregation": ("aggregation", "privacy"),
    "objectives": ("objectives",),
    "methods": ("methods",),
    "accounting": ("accounting",),
    "statistics": ("statistics", "statistics/intervals.py", "statistics/difference_tests.py"),
    "evaluation": ("evaluation/metrics.py", "evaluation/judge_statistics.py"),
}
"""Folders and files of ``src/fedloom`` by the name of what they do; those that are not there are left
out, and a part without any is a mistake."""

REFERENCE = "tests/test_docs.py::test_reference_pages_are_what_the_code_says"
"""The test of settings' defaults and bounds, which stand in the generated reference."""

FURTHER = {
    "methods": (
        REFERENCE,
        "tests/methods/test_declarations.py",
        "tests/methods/test_closed_forms.py",
        "tests/methods/contract/test_checks.py",
    ),
    "objectives": (REFERENCE,),
    "evaluation": ("tests/test_by_hand.py",),
    "aggregation/rules.py": (REFERENCE,),
    "privacy/settings.py": (REFERENCE,),
    "methods/contract/checks.py": (
        "tests/methods/test_aggregation_rules.py",
        "tests/methods/test_personalised.py",
        "tests/experiment/test_mistakes.py",
    ),
}
"""Tests of a part or of a module beside those that :func:`tests_of` finds."""

SLOW_FOLDERS = ("deployment", "security", "recipes", "architectures")
"""Folders of ``tests`` that try a module through processes or whole sweeps: not the tests of a module."""

WANTED = 0.9

SLOW = "slow and not full and not serial"
"""The tests that survivors of the default ones are tried by."""

SLOW_SECONDS = 900.0
"""After which a survivor has survived those."""

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
RETURNED = {"float": 0.0, "int": 0, "bool": True, "str": ""}
"""What a function of that type returns in place of its value; others return ``None``."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        part: Of STRATA.
        path: The module, relative to the repository.
        number: Which change of the module's, in the order of :func:`changes`.
        line: Where it is.
        before: The statement, as ``ast.unparse`` writes it.
        after: The same with the change.
    """

    part: str
    path: str
    number: int
    line: int
    before: str
    after: str

    @property
    def name(self) -> str:
        """What it is called in EQUIVALENT."""
        return f"{self.path}: {first_apart(self.before, self.after)}"


def first_apart(before: str, after: str) -> str:
    """Return the first line of two statements that differs, ``BEFORE -> AFTER``."""
    for old, new in zip(before.splitlines(), after.splitlines(), strict=False):
        if old != new:
            return f"{old.strip()} -> {new.strip()}"
    return f"{before} -> {after}"


def changes(tree: ast.Module) -> Iterator[tuple[ast.stmt, ast.AST, str, Any]]:
    """Yield every change of a module: the statement, the node, its field and the new value.

    Strings, annotations, decorators, imports and messages of exceptions are left as they are.
    """
    for statement, node, returned in _nodes(tree.body, None):
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPPED:
            yield statement, node, "op", SWAPPED[type(node.op)]()
        elif isinstance(node, ast.Compare):
            for place, op in enumerate(node.ops):
                yield (
                    statement,
                    node,
                    "ops",
                    [*node.ops[:place], SWAPPED[type(op)](), *node.ops[place + 1 :]],
                )
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield statement, node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            larger = node.value * 2 if abs(node.value) >= 1000 else node.value + 1
            yield statement, node, "value", larger
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield statement, node, "op", ast.UAdd()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield statement, node, "operand", ast.UnaryOp(ast.Not(), node.operand)
        elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(
            node.test, ast.Compare | ast.BoolOp | ast.UnaryOp
        ):
            yield statement, node, "test", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Return) and node.value is not None:
            plain = ast.Constant(RETURNED.get(returned or ""))
            if ast.dump(node.value) != ast.dump(plain):
                yield statement, node, "value", plain


def _nodes(
    body: list[ast.stmt], returned: str | None
) -> Iterator[tuple[ast.stmt, ast.AST, str | None]]:
    """Yield the nodes of statements that can be changed, with the innermost statement of each."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert):
            continue
        yield statement, statement, returned
        inner = returned
        if isinstance(statement, ast.FunctionDef):
            inner = ast.unparse(statement.returns) if statement.returns is not None else None
        for field, value in ast.iter_fields(statement):
            if field in ("annotation", "returns", "decorator_list", "type_params", "bases"):
                continue
            for own in value if isinstance(value, list) else [value]:
                if isinstance(own, ast.stmt):
                    yield from _nodes([own], inner)
                elif isinstance(own, ast.ExceptHandler | ast.match_case):
                    yield from _nodes(own.body, inner)
                elif isinstance(own, ast.AST):
                    yield from ((statement, node, inner) for node in _expression(own))


def _expression(node: ast.AST) -> Iterator[ast.AST]:
    """Yield an expression and what is in it, annotations and guards aside."""
    if isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return  # of zip: a guard, as assert is
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _expression(child)


def mutants(part: str, path: Path) -> list[Mutant]:
    """Return all mutants of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for number, (statement, node, field, value) in enumerate(changes(tree)):
        before = _shown(statement)
        old = getattr(node, field)
        setattr(node, field, value)
        ast.fix_missing_locations(tree)
        after = _shown(statement)
        setattr(node, field, old)
        where = getattr(node, "lineno", statement.lineno)
        found.append(Mutant(part, str(path.relative_to(ROOT)), number, where, before, after))
    return found


def _shown(statement: ast.stmt) -> str:
    """Return a statement, without the body of one that has a body."""
    shown = copy.copy(statement)
    for field in ("body", "orelse", "finalbody", "handlers"):
        if isinstance(getattr(shown, field, None), list):
            setattr(shown, field, [])
    if isinstance(shown, ast.If | ast.For | ast.While | ast.With | ast.FunctionDef | ast.ClassDef):
        shown.body = [ast.Pass()]
    return ast.unparse(shown)


def changed(source: str, number: int) -> ast.Module:
    """Return a module with one change."""
    tree = ast.parse(source)
    for place, (_, node, field, value) in enumerate(changes(tree)):
        if place == number:
            setattr(node, field, value)
            break
    return ast.fix_missing_locations(tree)


def modules(part: str) -> list[Path]:
    """Return the modules of a part."""
    found: list[Path] = []
    for name in STRATA[part]:
        place = SOURCE / name
        found += sorted(place.rglob("*.py")) if place.is_dir() else [place] * place.is_file()
    if not found:
        raise SystemExit(f"{part}: nothing of {', '.join(STRATA[part])} is in {SOURCE}; see STRATA")
    return found


def tests_of(part: str, path: Path) -> list[str]:
    """Return the test files of a module, those that say most of it first."""
    dotted = ".".join(("fedloom", *path.relative_to(SOURCE).with_suffix("").parts))
    folder = TESTS / path.relative_to(SOURCE).parent
    while not folder.is_dir():
        folder = folder.parent
    files = [file for file in sorted(TESTS.rglob("test_*.py")) if not _left_out(file)]
    own = [file for file in files if file.stem == f"test_{path.stem}"]
    own.sort(key=lambda file: file.parent != folder)
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    naming = [file for file in files if dotted in texts[file]]
    naming += [f for f in files if folder in f.parents and f'"{path.stem}"' in texts[f]]
    rest = [file for file in files if folder in file.parents] if not own + naming else []
    for key in (path.relative_to(SOURCE).as_posix(), part):
        rest += [ROOT / name for name in FURTHER.get(key, ())]
    return [str(file.relative_to(ROOT)) for file in dict.fromkeys(own[:1] + naming + rest)]


def _left_out(file: Path) -> bool:
    return file.relative_to(TESTS).parts[0] in SLOW_FOLDERS


class Loader(importlib.machinery.SourceFileLoader):
    """Loads one module with one change; nothing is read from or written to a cache of bytecode."""

    def __init__(self, name: str, path: str, number: int) -> None:
        super().__init__(name, path)
        self.number = number

    def path_stats(self, path: str) -> Any:
        """Say that nothing is known, so that no bytecode is used."""
        raise OSError

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        """Compile the changed module."""
        return compile(changed(bytes(data).decode(), self.number), path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module that is changed."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        parts = path.relative_to(SOURCE).with_suffix("").parts
        self.name = ".".join(("fedloom", *parts)).removesuffix(".__init__")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the changed module's specification, or ``None`` for others."""
        if name != self.name:
            return None
        loader = Loader(name, str(self.path), self.number)
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def tried(tests: list[str], mutant: Mutant | None, out: Path, extra: Sequence[str] = ()) -> None:
    """Run tests in this process, a fork; write to ``out`` what failed and how long files took."""
    import pytest

    failed: list[str] = []
    seconds: dict[str, float] = {}

    class Observer:
        def pytest_runtest_logreport(self, report: Any) -> None:
            file = report.nodeid.split("::")[0]
            seconds[file] = seconds.get(file, 0.0) + report.duration
            if report.failed:
                failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    if mutant is not None:
        sys.meta_path.insert(0, Finder(ROOT / mutant.path, mutant.number))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "src"))
    words = [
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *extra,
    ]  # explains nothing
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        code = pytest.main(
            [*words, f"--basetemp={out.with_suffix('')}", *tests], plugins=[Observer()]
        )
    if code != 0 and not failed:
        failed.append(f"pytest ended with {int(code)}")
    out.write_text(json.dumps({"failed": failed, "seconds": seconds}))
    os._exit(0)


def preload() -> None:
    """Import what is not ours and takes long."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for name in (
        "numpy", "scipy.stats", "scipy.special", "torch", "transformers", "peft", "datasets",
        "transformers.models.llama.modeling_llama", "pydantic", "matplotlib",
        "pyarrow", "tokenizers", "safetensors.torch", "rich.console", "krippendorff",
    ):  # fmt: skip
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


@dataclass(frozen=True)
class Job:
    """Tests to run.

    Attributes:
        mutant: With which change, if any.
        tests: Files.
        limit: Seconds after which it is stopped.
        extra: Words for pytest.
    """

    mutant: Mutant | None
    tests: list[str]
    limit: float
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """A fork that runs them."""

    job: Job
    process: Any
    out: Path
    until: float


def run_all(jobs: list[Job], processes: int) -> Generator[tuple[Mutant | None, Any], None, None]:
    """Yield ``(mutant, outcome)`` of each job as it ends; the outcome is ``None`` where time ran out."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(jobs)), []
    with tempfile.TemporaryDirectory() as folder:
        number = 0
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job = waiting.pop()
                    number += 1
                    out = Path(folder) / f"{number}.json"
                    words = (job.tests, job.mutant, out, job.extra)
                    process = context.Process(target=tried, args=words)
                    process.start()
                    running.append(Running(job, process, out, time.monotonic() + job.limit))
                time.sleep(0.05)
                for own in list(running):
                    if own.process.is_alive() and time.monotonic() < own.until:
                        continue
                    _end(own, running)
                    yield (
                        own.job.mutant,
                        json.loads(own.out.read_text()) if own.out.exists() else None,
                    )
        finally:
            for own in list(running):
                _end(own, running)


def _end(own: Running, running: list[Running]) -> None:
    own.process.kill()  # does nothing to one that has ended
    own.process.join()
    running.remove(own)


def drawn(count: int, paths: list[str]) -> list[Mutant]:
    """Return so many mutants, the same number of each part, in an order that mixes them."""
    words = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    only = {(ROOT / path).resolve() for path in paths}
    chosen: list[list[Mutant]] = []
    for part in STRATA:
        own = [path for path in modules(part) if not only or path in only]
        every = [mutant for path in own for mutant in mutants(part, path)]
        seed = hashlib.sha256(f"{commit.strip()} {part}".encode()).hexdigest()
        random.Random(seed).shuffle(every)
        chosen.append(every)
    parts = [own for own in chosen if own]
    mixed = []
    for place in range(max(map(len, parts), default=0)):
        mixed += [own[place] for own in parts if place < len(own)]
    return mixed[:count]


def equivalent() -> dict[str, str]:
    """Return the mutants that change nothing that can be seen, and why."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("  # ", 1) for line in lines if line and not line.startswith("#"))
    return {name.strip(): why for name, why in pairs}


def tried_slowly(
    survivors: list[Mutant], tests: dict[str, list[str]], processes: int
) -> Iterator[tuple[Mutant, bool]]:
    """Yield whether each mutant survives the slow tests of its module too."""
    slow = ("-x", "-m", SLOW)
    jobs = [Job(mutant, tests[mutant.path], SLOW_SECONDS, slow) for mutant in survivors]
    for mutant, outcome in run_all(jobs, processes):
        assert mutant is not None
        killed = False
        if outcome is not None and outcome["failed"]:
            ((_, plain),) = run_all([Job(None, outcome["failed"], SLOW_SECONDS, slow)], 1)
            killed = plain is not None and not plain["failed"]
        yield mutant, not killed


def main() -> None:
    """Print each survivor, and how many of each part were killed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="when to stop drawing")
    parser.add_argument(
        "--default-only", action="store_true", help="do not try survivors by the slow tests"
    )
    parser.add_argument(
        "paths", nargs="*", help="modules, relative to the repository (default: all)"
    )
    asked = parser.parse_args()
    preload()
    end = time.monotonic() + 60 * asked.minutes
    chosen, known = drawn(asked.count, asked.paths), equivalent()
    tests = {mutant.path: tests_of(mutant.part, ROOT / mutant.path) for mutant in chosen}
    files = sorted({file for own in tests.values() for file in own})
    ((_, whole),) = run_all([Job(None, files, 3600.0)], 1)
    if whole is None:
        raise SystemExit("the tests do not end within an hour without a change")
    left_out = [word for own in whole["failed"] for word in ("--deselect", own)]
    if left_out:
        print(f"left out, since they fail without a change: {whole['failed']}", flush=True)
    jobs = []
    for mutant in chosen:
        limit = 60 + 10 * sum(whole["seconds"].get(file, 0.0) for file in tests[mutant.path])
        jobs.append(Job(mutant, tests[mutant.path], limit, ("-x", *left_out)))
    counts = {part: [0, 0, 0] for part in STRATA}
    outcomes = run_all(jobs, asked.processes)
    survivors: list[Mutant] = []
    for mutant, outcome in outcomes:
        assert mutant is not None
        killed = outcome is None or bool(outcome["failed"])
        place = 0 if killed else 2 if mutant.name in known else 1
        if place == 1:
            survivors.append(mutant)
        else:
            counts[mutant.part][place] += 1
        if time.monotonic() > end:
            outcomes.close()
            break
    last: Iterator[tuple[Mutant, bool]] = ((own, True) for own in survivors)
    if not asked.default_only:
        last = tried_slowly(survivors, tests, asked.processes)
    for mutant, survives in last:
        counts[mutant.part][survives] += 1
        if survives:
            print(f"\nsurvived: {mutant.path}:{mutant.line}")
            print(f"  - {mutant.before}\n  + {mutant.after}", flush=True)
    print("\npart          killed  survived  equivalent")
    for part, row in counts.items():
        print(f"{part:12} {row[0]:7} {row[1]:9} {row[2]:11}")
    killed, survived, same = (sum(own) for own in zip(*counts.values(), strict=True))
    share = killed / max(1, killed + survived)
    print(f"{killed} of {killed + survived} killed ({share:.0%}), {same} equivalent ones aside")
    raise SystemExit(share < WANTED)


if __name__ == "__main__":
    main()
