"""transformers imported without work whose results are not needed, or the same each time.

It takes a third of what importing transformers and PEFT costs, measured with transformers 5.23:

- Functions that it takes from scipy (losses of object detection) and torchao (files of quantised models)
  as it is imported itself: their packages are imported when such a function is called (0.9 s).
- Which class of a model is in which of its 2,500 files, which it reads each time, and twice: read once,
  and then from the cache folder, as long as the installed package is the same (1.1 s).

What transformers can do is the same. Where it is another version than those known, or is there already,
it is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.errors import OutputError
from fedloom.storage.cache import cache_folder
from fedloom.storage.files import write_atomically

KNOWN = ("5.23.",)
"""Versions of transformers whose reading of its own files is as here expected."""

READER, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"

DEFERRED = {
    "scipy.optimize": ("linear_sum_assignment",),
    "torchao.prototype.safetensors.safetensors_support": (
        "flatten_tensor_state_dict",
        "unflatten_tensor_state_dict",
    ),
}
"""Modules from which transformers imports functions at once, and these functions."""

Structure = dict[Any, Any]
"""Of a folder: ``{folder: Structure}`` and ``{frozenset of packages needed: {module: set of names}}``."""


@contextmanager
def lean() -> Iterator[None]:
    """Import transformers with less work, unless it is imported already."""
    if "transformers" in sys.modules:
        yield
        return
    placed = [Later(name) for name in DEFERRED if name not in sys.modules]
    finder = _Reader()
    sys.modules.update({module.__name__: module for module in placed})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in placed:
            module.leave()


class Later(types.ModuleType):
    """Stands for a module while others take functions from it; these import it once they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function in DEFERRED[name]:
            setattr(self, function, _calling(name, function))

    def __getattr__(self, name: str) -> Any:
        """Give anything else from the real module, which is imported now."""
        if name.startswith("__"):
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)

    def leave(self) -> None:
        """Make place for the real module."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


def _calling(module: str, function: str) -> Callable[..., Any]:
    """Return a function that calls the one of a module that is imported only then."""

    def call(*given: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*given, **options)

    call.__name__ = call.__qualname__ = function
    return call


class _Reader(importlib.abc.MetaPathFinder):
    """Has the module of transformers that reads its files know what was read before."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module as ever, and put the known content of the models' folder into it."""
        if name != READER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        models = Path(spec.origin).parent.parent / "models"
        known = None
        with contextlib.suppress(OSError, RuntimeError):  # nowhere to look, or no home
            known = cache_file(models.parent)
        if known is not None:
            run = spec.loader.exec_module

            def run_and_replace(module: types.ModuleType) -> None:
                run(module)
                with_known(module, models, known)

            spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec


def cache_file(package: Path) -> Path | None:
    """Return where the content of an installed package is kept, ``None`` for versions not known.

    The name follows the list of its files that the installer wrote, with the time when it did.
    """
    installed = [
        own
        for own in package.parent.glob(f"{package.name}-*.dist-info/RECORD")
        if own.parent.name.startswith(tuple(f"{package.name}-{version}" for version in KNOWN))
    ]
    if len(installed) != 1:
        return None  # or it is a developer's own, whose files change
    at = installed[0].stat()
    told = f"{installed[0]}\n{at.st_mtime_ns}\n{at.st_size}\n{READER}"
    return cache_folder() / "imports" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def with_known(module: types.ModuleType, models: Path, file: Path) -> None:
    """Have transformers' function that reads a folder look into a file where it is the models' folder.

    Args:
        module: ``transformers.utils.import_utils``; left as it is where it has no such function.
        models: The folder.
        file: Where what was read once is kept; written where it is not there or damaged.
    """
    read = getattr(module, FUNCTION, None)
    if read is None:
        return

    def known(path: str | Path) -> Structure:
        if Path(path) not in (models, models / "__init__.py"):
            return read(path)  # type: ignore[no-any-return]
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            return decoded(json.loads(file.read_bytes()))
        found: Structure = read(path)
        with contextlib.suppress(OutputError):  # it is read again then
            write_atomically(file, json.dumps(encoded(found)).encode())
        return found

    known.__wrapped__ = read  # type: ignore[attr-defined]
    setattr(module, FUNCTION, known)


def encoded(structure: Structure) -> list[Any]:
    """Return a folder's content for JSON: ``[{folder: ...}, [[packages, {module: names}], ...]]``."""
    folders = {key: encoded(own) for key, own in structure.items() if isinstance(key, str)}
    files = [
        [sorted(key), {name: sorted(own) for name, own in modules.items()}]
        for key, modules in structure.items()
        if not isinstance(key, str)
    ]
    return [folders, files]


def decoded(content: list[Any]) -> Structure:
    """Return a folder's content from what :func:`encoded` gave.

    Raises:
        ValueError, TypeError, AttributeError: It is none.
    """
    folders, files = content
    own: Structure = {
        frozenset(map(str, needed)): {name: set(map(str, names)) for name, names in modules.items()}
        for needed, modules in files
    }
    return own | {name: decoded(inner) for name, inner in folders.items()}
