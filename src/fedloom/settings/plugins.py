"""Classes that a section chooses by ``name``: fedloom's, installed packages' and the user's own.

``Choices`` is a mapping from a name to settings and class. It lists fedloom's own alone, and finds
others when they are asked for: of an entry point of its group, or ``package.module:Class``, for which the
current folder is searched last. Nothing is imported for a name that nobody asks for, and
:meth:`Choices.is_foreign` says beforehand whether a name would have something imported.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from fedloom.errors import FedloomError, PluginError, SettingsError, first_line
from fedloom.settings.schema import NamedSettings

KindT = TypeVar("KindT")

CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""``package.module:Class``."""

_FILES: dict[str, str] = {}
"""Files of the classes that are not fedloom's and were imported here, each with its name."""


@dataclass(frozen=True)
class Provenance:
    """Where a class that is not fedloom's comes from.

    Attributes:
        module: That defines it.
        name: Of the class.
        file: The module's file, "" where it has none.
        sha256: Of that file's content, "" likewise.
        distribution: That was installed with it, "" where it is found by a path alone.
        version: Of the distribution.
    """

    module: str
    name: str
    file: str
    sha256: str
    distribution: str = ""
    version: str = ""

    def to_record(self) -> dict[str, str]:
        """Return it as plain JSON."""
        return asdict(self)


class Choices(Mapping[str, tuple[type[NamedSettings], type[KindT]]], Generic[KindT]):
    """A mapping from a name to settings and class; see the module.

    Others' classes have their settings as ``Settings``, a subclass of :class:`NamedSettings`.
    """

    def __init__(
        self,
        group: str,
        ours: Mapping[str, tuple[type[NamedSettings], type[KindT]]],
        base: type[KindT],
        require: Callable[[type[KindT]], list[str]] = lambda kind: [],
    ) -> None:
        """Take fedloom's own.

        Args:
            group: Of entry points.
            ours: Settings and class by name.
            base: What others' classes must be a subclass of.
            require: Returns what a class lacks that fedloom's own have.
        """
        self.group, self.ours, self.base, self.require = group, ours, base, require
        self._found: dict[str, tuple[type[NamedSettings], type[KindT], Provenance]] = {}

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of fedloom's own."""
        return iter(self.ours)

    def __len__(self) -> int:
        """Return the number of fedloom's own."""
        return len(self.ours)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a name, or it has the form of a class's name; imports nothing."""
        return name in self.ours or self.is_foreign(name)

    def __getitem__(self, name: str) -> tuple[type[NamedSettings], type[KindT]]:
        """Return settings and class; see :meth:`resolve`."""
        if name in self.ours:
            return self.ours[name]
        if not self.is_foreign(name):
            raise KeyError(name)
        return self.resolve(name)[:2]

    @property
    def names(self) -> list[str]:
        """All names that need no module: fedloom's own and those of entry points."""
        return [*self.ours, *sorted({point.name for point in self._points()} - self.ours.keys())]

    def is_foreign(self, name: object) -> bool:
        """Return whether a name is of a class that is not fedloom's and would have to be imported."""
        if not isinstance(name, str) or name in self.ours:
            return False
        return CLASS.fullmatch(name) is not None or bool(self._points(name))

    def resolve(self, name: str) -> tuple[type[NamedSettings], type[KindT], Provenance]:
        """Import a class that is not fedloom's, once.

        Raises:
            SettingsError: It does not exist, its import fails, or the class cannot be used.
        """
        if name not in self._found:
            self._found[name] = self._resolved(name)
        return self._found[name]

    def _resolved(self, name: str) -> tuple[type[NamedSettings], type[KindT], Provenance]:
        points = self._points(name)
        if len({point.value for point in points}) > 1:
            owners = " and ".join(sorted(_owner(point)[0] for point in points))
            raise SettingsError(
                [f"{owners} both install it: name the class, as package.module:Class"]
            )
        value = points[0].value.partition(" ")[0] if points else name
        module_name, _, class_name = value.partition(":")
        module = imported(module_name)
        kind = getattr(module, class_name, None)
        if kind is None:
            near = difflib.get_close_matches(class_name, vars(module), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError([f"module {module_name} has no class {class_name!r}{hint}"])
        if not isinstance(kind, type) or not issubclass(kind, self.base):
            whole = f"{self.base.__module__}.{self.base.__qualname__}"
            raise SettingsError([f"{value} is not a subclass of {whole}"])
        settings: Any = getattr(kind, "Settings", NamedSettings)
        lacks = [] if _is_settings(settings) else ["its Settings must subclass NamedSettings"]
        lacks += self.require(kind) if not lacks else []
        if lacks:
            raise SettingsError([f"{value}: {text}" for text in lacks])
        file = getattr(module, "__file__", None) or ""
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        _FILES[file] = value
        owner = _owner(points[0]) if points else ("", "")
        return settings, kind, Provenance(module_name, class_name, file, digest, *owner)

    def provenance(self, name: str) -> Provenance | None:
        """Return where a class comes from, ``None`` for fedloom's own."""
        return self.resolve(name)[2] if self.is_foreign(name) else None

    def of_class(self, kind: type) -> Provenance | None:
        """Return where a class that was found comes from, ``None`` for any other."""
        return next((own[2] for own in self._found.values() if own[1] is kind), None)

    def _points(self, name: str | None = None) -> list[EntryPoint]:
        found = entry_points(group=self.group)
        return [point for point in found if name is None or point.name == name]


def plugin_place(error: BaseException) -> str:
    """Return where, in a file of a class that is not fedloom's, an error arose: "a.py, line 7, in round".

    It is the innermost such line that the error passed through, and empty where it passed through none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return next(
        (
            f"{f.filename}, line {f.lineno}, in {f.name}"
            for f in frames[::-1]
            if f.filename in _FILES
        ),
        "",
    )


def plugin_error(error: Exception) -> PluginError | None:
    """Return one error for what a class that is not fedloom's raised, ``None`` for anything else.

    Errors that fedloom raises on purpose say enough by themselves.
    """
    place = "" if isinstance(error, FedloomError) else plugin_place(error)
    if not place:
        return None
    return PluginError(
        f"{_FILES[place.partition(', line ')[0]]} failed: {type(error).__name__}: {first_line(error)} "
        f"({place}): correct it there"
    )


def undefined(kind: type[Any], names: Iterable[str], base: type[Any] = object) -> list[str]:
    """Return what to say of a class that lacks some of ``names``, or has them from ``base`` alone."""
    lacking = [n for n in names if getattr(kind, n, None) is getattr(base, n, None)]
    return [f"it must define {' and '.join(lacking)}"] if lacking else []


def _is_settings(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, NamedSettings)


def _owner(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else ("", "")


def imported(name: str) -> ModuleType:
    """Import a module; the current folder is searched last.

    Raises:
        SettingsError: There is none, or it fails.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if absent:
            text = (
                f"there is no module {name} here: install it, or start fedloom in the folder that its "
                "file lies in"
            )
        else:
            text = (
                f"its module {name} cannot be imported: {type(error).__name__}: {first_line(error)}"
            )
        raise SettingsError([text]) from error
