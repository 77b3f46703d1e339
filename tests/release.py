"""Check that a release says one version everywhere: the package, the citation, the change log."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(root: Path = ROOT) -> list[str]:
    """Return what does not agree with the version in pyproject.toml."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    places = {
        "src/fedloom/__init__.py": rf'^__version__ = "{re.escape(version)}"$',
        "CITATION.cff": rf"^version: {re.escape(version)}$",
        "CHANGELOG.md": rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$",
    }
    return [
        f"{name} does not say version {version}"
        for name, pattern in places.items()
        if not re.search(pattern, (root / name).read_text(), re.M)
    ]


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or "one version everywhere")
    sys.exit(bool(found))
