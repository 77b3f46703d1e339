"""Who imports the heavy libraries. The layers of the package itself are import-linter's: `make check`."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

import fedloom
from fedloom.accounting.garbage import without_collection

PACKAGE = Path(fedloom.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A name that ends in a slash stands for all files below that folder.
IMPORTERS = {
    "transformers": (
        "models/load.py",
        "models/export.py",
        "models/verify.py",
        "models/quantize.py",
        "models/tiny.py",
        "models/exported_modeling.py",
        "models/tree_attention.py",
        "data/chat.py",
        "evaluation/generate.py",
        "training/optimizers.py",
    ),
    "peft": ("models/",),
    "trl": (),
    "flwr": (
        "engines/flower/inflation.py",
        "engines/flower/transport.py",
        "engines/flower/records.py",
        "deployment/app/",
        "deployment/flower_fleet.py",
        "deployment/flower_control.py",
        "deployment/flower_node.py",
        "deployment/flower_nodes.py",
        "deployment/flower_server.py",
        "deployment/flower_starter.py",
        "deployment/fork_server.py",
        "deployment/serverapp.py",
    ),
    "grpc": (),
    "h11": ("deployment/flower_fleet.py",),
    "httpcore": ("deployment/flower_node.py", "evaluation/judges/http_client.py"),
    "uvicorn": ("deployment/flower_server.py",),
}
# `fedloom --help`, a mistyped setting and a report must not wait seconds for torch.
LIGHT = (
    "commands/early_checks.py",
    "commands/starter_experiment.py",
    "runs/stopping.py",
    "storage/output_paths.py",
    "settings/",
    "display/",
    "errors.py",
    "commands/main.py",
    "commands/app.py",
    "federation/records.py",
    "runs/observers.py",
    "storage/run_folder.py",
    "accounting/costs.py",
    "reports/",
    "wire/envelope.py",
    "engines/flower/records.py",
)


def stands_in(path, places):
    name = path.relative_to(PACKAGE).as_posix()
    return any(name.startswith(p) if p.endswith("/") else name == p for p in places)


STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
"""What an import may stand in: no expression has one."""


def imported(tree, when_loaded=False):
    """The outermost packages that a file imports; ``when_loaded``: only those its own import costs."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
        elif when_loaded and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif when_loaded and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += [own for own in ast.iter_child_nodes(node) if isinstance(own, STATEMENTS)]
    return found


@cache
def tree_of(file):
    return ast.parse(file.read_text("utf-8"))


@pytest.fixture(scope="module", autouse=True)
def trees():
    """Are not kept for longer: Python would look for garbage among millions of objects, here and later."""
    with without_collection():
        yield
        tree_of.cache_clear()


@cache
def imported_by(file, when_loaded):
    return imported(tree_of(file), when_loaded)


def importers(package, files=FILES, when_loaded=False):
    return [f for f in files if package in imported_by(f, when_loaded)]


SOURCE = """
import a.b as c
from . import near
if TYPE_CHECKING:
    from d.e import f
else:
    import g
try:
    import h
except ImportError:
    pass
class C:
    import i
    def method(self):
        from j import k
"""


@pytest.mark.parametrize(("when_loaded", "expected"), [(False, "adghij"), (True, "aghi")])
def test_imports_are_found_wherever_they_stand(when_loaded, expected):
    assert imported(ast.parse(SOURCE), when_loaded) == set(expected)


@pytest.mark.parametrize("package", IMPORTERS)
def test_a_heavy_library_is_imported_in_its_own_place_only(package):
    strangers = [f for f in importers(package) if not stands_in(f, IMPORTERS[package])]
    assert strangers == []


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_the_places_of_a_heavy_library_do_import_it(package):
    assert any(stands_in(f, IMPORTERS[package]) for f in importers(package))


@pytest.mark.parametrize("place", LIGHT)
def test_a_light_part_loads_no_torch(place):
    light = [f for f in FILES if stands_in(f, (place,))]
    assert light, f"{place} is gone: name the part that took its place"
    assert importers("torch", light, when_loaded=True) == []


@cache
def structure():
    """``benchmarks/structure.py``, which is no part of the package."""
    path = PACKAGE.parents[1] / "benchmarks" / "structure.py"
    spec = importlib.util.spec_from_file_location("structure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_files_import_each_other_in_a_circle():
    """Neither inside a function nor for types alone, which import-linter does not look at by file."""
    files = structure().modules(PACKAGE.parents[1])
    assert len(files) > 300
    arrows = structure().all_imports(files, {name: tree_of(own) for name, own in files.items()})
    assert structure().circles(arrows) == []


def test_circles_are_found():
    arrows = {"a": {"b"}, "b": {"c", "e"}, "c": {"a"}, "d": {"a", "e"}, "e": set(), "f": {"f"}}
    found = structure().circles(arrows)
    assert sorted(sorted(group) for group in found) == [["a", "b", "c"], ["f"]]
    assert structure().longest({"a": {"b"}, "b": {"c"}, "d": {"b"}, "c": set()}) == 3


# Words of the language too: they name a method where they stand alone, quoted, or after "method".
WORDS = ("split", "distillation", "centralised", "ditto")


def test_no_file_outside_methods_names_a_method():
    from fedloom.methods import METHODS

    outside = [file for file in FILES if not stands_in(file, ("methods/",))]
    assert len(outside) > 200
    found = {
        file.relative_to(PACKAGE).as_posix(): names
        for file in outside
        if (names := methods_named(tree_of(file), METHODS))
    }
    assert found == {}


def methods_named(tree, methods):
    """Return what in a file names a method: texts (but docstrings), classes, and their modules."""
    words = "|".join(name for name in methods if name not in WORDS)
    ambiguous = "|".join(WORDS)
    pattern = re.compile(
        rf"\b({words})\b|^({ambiguous})$|['\"]({ambiguous})['\"]|\bmethods?[ .]({ambiguous})\b"
    )
    nodes = list(ast.walk(tree))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    found = []
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [node.value] if pattern.search(node.value) else []
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("fedloom.methods")
            own = {kind.__module__ for _, kind in methods.values()}
            found += [node.module] if node.module in own else []
            classes = {c.__name__ for pair in methods.values() for c in pair}
            if module != node.module:
                found += [alias.name for alias in node.names if alias.name in classes]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("fedloom.methods.")]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "x = 'fedavg'",
        "x = f'use fedmoe or {y}'",
        "if method.name == 'split': pass",
        "x = 'method.name = \"ditto\"'",
        "x = 'method split cannot'",
        "from fedloom.methods.split import SplitSettings",
        "from fedloom.methods import FedAvg",
        "def f():\n    import fedloom.methods.flora",
    ],
)
def test_a_method_that_is_named_is_found(source):
    from fedloom.methods import METHODS

    assert methods_named(ast.parse(source), METHODS)


@pytest.mark.parametrize(
    "source", ["'''fedavg'''\nx = 'a split of rows'", "from fedloom.data.splits import Split"]
)
def test_a_word_of_the_language_names_no_method(source):
    from fedloom.methods import METHODS

    assert methods_named(ast.parse(source), METHODS) == []


def test_no_method_imports_another():
    """What several share is in ``bases/``; what all have in the contract beside it."""
    from fedloom.methods import METHODS

    own = {kind.__module__ for _, kind in METHODS.values()}
    files = {m: PACKAGE / "methods" / f"{m.rpartition('.')[2]}.py" for m in own}
    shared = [f for f in FILES if stands_in(f, ("methods/",)) and f.name != "__init__.py"]
    assert set(files.values()) < set(shared)
    assert {f for f in shared if "bases" in f.parts}
    for file in shared:
        nodes = ast.walk(tree_of(file))
        modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not modules & own, file
