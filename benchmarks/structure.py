"""How the package hangs together, in one table: ``python benchmarks/structure.py [FOLDER ...]``.

A room is a folder of ``src/fedloom``, or a file beside them, or ``benchmarks/``. An arrow is a pair of
rooms of which one imports the other, be it inside a function or for types alone; it leads up where
``pyproject.toml`` puts the importing room on the same line as the other, or below it. A floor is a step
of the longest way down through rooms. With several folders (checkouts of the repository) there is a
column for each.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

LONG = 60
"""Lines of a function above which it is counted as long."""


def modules(root: Path) -> dict[str, Path]:
    """Return the files of the package and of ``benchmarks/`` by the names that imports use."""
    found = {}
    for path in sorted((root / "src/fedloom").rglob("*.py")):
        parts = path.relative_to(root / "src").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {f"benchmarks.{p.stem}": p for p in sorted((root / "benchmarks").glob("*.py"))}


def imported(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Return the files of the package that a file imports; the package itself is not one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            own = (f"{node.module}.{alias.name}" for alias in node.names)
            names |= {full if full in known else node.module for full in own}
    return (names & known.keys()) - {"fedloom"}


def room_of(module: str) -> str:
    """Return the room of a file."""
    first, _, rest = module.partition(".")
    return first if first == "benchmarks" else rest.partition(".")[0] or "__init__"


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of which each one leads along arrows to each other, and back to itself."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = arrows.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    below = {start: reached(start) for start in arrows}
    groups = {
        frozenset(own for own in found if start in below.get(own, ())) | {start}
        for start, found in below.items()
        if start in found
    }
    return [set(group) for group in groups]


def longest(arrows: dict[str, set[str]]) -> int:
    """Return the length of the longest way along arrows that comes nowhere twice."""
    length: dict[str, int] = {}

    def walk(start: str, way: tuple[str, ...]) -> int:
        if start in way:
            return 0
        if start not in length:
            below = arrows.get(start, ())
            length[start] = 1 + max((walk(own, (*way, start)) for own in below), default=0)
        return length[start]

    return max(walk(start, ()) for start in arrows)


def methods_named(root: Path, files: dict[str, Path], trees: dict[str, ast.Module]) -> set[str]:
    """Return the files outside ``methods/`` that import a method's file or hold a method's name."""
    own = list((root / "src/fedloom/methods").rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in own]
    names = {name for text in texts for name in re.findall(r'name: Literal\["(\w+)"\]', text)}
    stems = {f"fedloom.methods.{path.stem}" for path in own if path.parent.name == "methods"}
    found = set()
    for module, tree in trees.items():
        if room_of(module) in ("methods", "benchmarks"):
            continue
        constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        if constants & names or imported(tree, files) & (stems - {"fedloom.methods.base"}):
            found.add(module)
    return found


def all_imports(files: dict[str, Path], trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return which files each file imports, be it inside a function or for types alone."""
    return {module: imported(tree, files) - {module} for module, tree in trees.items()}


def parsed(files: dict[str, Path]) -> dict[str, ast.Module]:
    """Return the syntax trees of files."""
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in files.items()}


def table(root: Path) -> dict[str, int]:
    """Return the figures of a checkout."""
    files = modules(root)
    trees = parsed(files)
    imports = all_imports(files, trees)
    rooms: dict[str, set[str]] = {room_of(module): set() for module in files}
    for module, others in imports.items():
        rooms[room_of(module)] |= {room_of(own) for own in others} - {room_of(module)}
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(own["layers"] for own in contracts if own["type"] == "layers")
    floor = {
        room_of(name.strip()): -number
        for number, line in enumerate(layers)
        for name in line.split("|")
    } | {"benchmarks": 1}
    up = [
        (room, other)
        for room, others in rooms.items()
        for other in others
        if room != "__init__" and floor.get(other, 0) >= floor.get(room, 0)
    ]
    own = {m: p for m, p in files.items() if room_of(m) != "benchmarks"}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [n for m in own for n in ast.walk(trees[m]) if isinstance(n, kinds)]
    return {
        "rooms": len(rooms),
        "floors": longest(rooms),
        "arrows": sum(map(len, rooms.values())),
        "arrows up": len(up),
        "Python files in the root": sum(p.parent.name == "fedloom" for p in own.values()),
        "files in the longest chain of imports": longest(imports),
        "circles of files": len(circles(imports)),
        f"functions over {LONG} lines": sum(
            (n.end_lineno or n.lineno) - n.lineno >= LONG for n in functions
        ),
        "files outside methods/ that name a method": len(methods_named(root, files, trees)),
        "lines of src/": sum(len(p.read_text(encoding="utf-8").splitlines()) for p in own.values()),
    }


def main() -> None:
    """Print the table."""
    roots = [Path(own) for own in sys.argv[1:]] or [Path(__file__).parents[1]]
    columns = [table(root) for root in roots]
    for name in columns[0]:
        print(f"{name:44}" + "".join(f"{column[name]:9,}" for column in columns))


if __name__ == "__main__":
    main()
