"""Early checks: a mistake is reported within a second, before torch is imported (eight seconds).

The parts of an experiment own their settings, so their files are imported to check them, and those
import torch, transformers and peft, which takes seconds. Here a child process imports the same files
while empty modules stand for those packages, and checks. It knows everything about settings, paths and
names and nothing about models. What it refuses is refused in the words of the check itself; where it
cannot tell, the command goes on and finds out. This is a shortcut, for as long as settings and what
computes share files.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from fedloom.errors import FedloomError

HEAVY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "peft",
    "pyarrow",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "torchao",
    "transformers",
)
"""Packages that compute or read, and that no check of settings needs."""

LIGHT = (
    "fedloom.accounting.traffic",
    "fedloom.data.loading",
    "fedloom.federation.devices",
    "fedloom.security.audit_log",
    "fedloom.training.settings",
)
"""Files that import none of them: a child has these from its parent, so they are imported once."""


def refuse_early(check: Callable[[], object]) -> bool:
    """Run a check that needs no model in a child, unless what computes is imported already.

    Args:
        check: Raises what the command would; it may write nothing.

    Returns:
        Whether it was run.

    Raises:
        FedloomError: What the check raised: its words and its exit code.
    """
    if "torch" in sys.modules or not hasattr(os, "fork"):
        return False  # nothing is gained, or not possible
    for name in LIGHT:
        importlib.import_module(name)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _check_and_leave(check, writing)
    os.close(writing)
    with open(reading, "rb") as answer:
        content = answer.read()
    os.waitpid(child, 0)
    if content:
        refused = json.loads(content)
        error = FedloomError(refused["text"])
        error.exit_code = refused["exit_code"]
        raise error
    return True


def _check_and_leave(check: Callable[[], object], writing: int) -> NoReturn:
    """Check in this child and end it, whatever happens; what it would print is nobody's business."""
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        gc.disable()  # imports make no garbage
        sys.meta_path.insert(0, _Absent())
        setattr(importlib, "import_module", _imported)  # noqa: B010 - a method of the user's, for one
        check()
    except FedloomError as error:
        with contextlib.suppress(BaseException):
            text = json.dumps({"text": str(error), "exit_code": error.exit_code})
            os.write(writing, text.encode())
    except BaseException:
        pass  # it needs what is absent here: the command will find out
    finally:
        os._exit(0)


class _Unknown(BaseException):
    """What happens is not to be told here; passes whoever would make an error of it."""


def _imported(
    name: str,
    package: str | None = None,
    load: Callable[..., types.ModuleType] = importlib.import_module,
) -> types.ModuleType:
    """Import a module; that it fails says nothing, as it may need what is absent here."""
    try:
        return load(name, package)
    except Exception as error:
        raise _Unknown from error


class _Nothing(type):
    """A class of which every attribute is another such class."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __iter__(cls) -> Iterator[object]:
        return iter(())


class _Anything(metaclass=_Nothing):
    """Stands for a class, a constant or a decorator of a package that is absent."""

    def __init__(self, *given: object, **options: object) -> None:
        """Take whatever the real one takes."""

    def __call__(self, *given: object, **options: object) -> object:
        return given[0] if len(given) == 1 and callable(given[0]) else self

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Empty(types.ModuleType):
    """Stands for a package that is absent, or for a module of it."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for every heavy one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in HEAVY:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""
