"""Why the figures of runs are not to be relied on, or not to be compared: one sentence for each reason.

A page shows them and the command line prints them: records that are not what was written, a run that was
resumed with other versions, and runs that are set side by side and were made with other versions, other
data or another model under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedloom.reports.run_data import Run
from fedloom.storage.run_folder import Record, other_versions, versions_of

MOST = 3
"""Runs that are named of those that are alike; of the others it says how many they are."""


def all_doubts(runs: Sequence[Run]) -> list[str]:
    """Return what is to be said of runs on one page: of each by itself, and of all together."""
    return [text for run in runs for text in doubts_of(run, run.label)] + between(runs)


def doubts_of(run: Run, name: str = "this run") -> list[str]:
    """Return what is to be said of a run by itself.

    Args:
        run: The run.
        name: What it is called in the sentence.
    """
    found = []
    if run.doubts:
        found.append(
            f"the figures of {name} are not to be relied on, as its records are not what was written: "
            f"{'; '.join(run.doubts)}"
        )
    if others := _other_versions(run):
        found.append(
            f"{name} was resumed with other versions than it was begun with: {', '.join(others)}; its "
            "results may differ from those of a run without a break"
        )
    return found


def between(runs: Sequence[Run]) -> list[str]:
    """Return what keeps differences of runs from being due to their settings alone."""
    found = []
    for package in dict.fromkeys(name for run in runs for name in versions_of(run.run)):
        own = _by(runs, lambda run, package=package: versions_of(run.run).get(package, "none"))  # type: ignore[misc]
        if len(own) > 1:
            found.append(
                f"the runs were not made with the same {package}, and may differ for that: "
                f"{_listed(own)}"
            )
    for data in _by(runs, _data).values():
        own = _by(data, lambda run: str(run.run["data"].get("digest") or "")[:12])
        if len(own) > 1:
            found.append(
                f"the rows of {data[0].run['data']['source']} were not the same in all runs, which "
                f"differences may come from (SHA-256): {_listed(own)}"
            )
    for model in _by(runs, lambda run: run.run["model"]["name"]).values():
        own = _by(model, lambda run: str(run.run["model"].get("sha256") or "")[:12])
        if len(own) > 1:
            found.append(
                f"the model {model[0].run['model']['name']} was not the same in all runs, which "
                f"differences may come from (SHA-256): {_listed(own)}"
            )
    return found


def _other_versions(run: Run) -> list[str]:
    """Return each version with which a run was resumed and not begun."""
    begun = versions_of(run.run)
    found = [
        text
        for start in run.starts
        for text in other_versions(run.run, {**begun, **start.get("versions", {})})
    ]
    return list(dict.fromkeys(found))


def _data(run: Run) -> str:
    """Return how the rows of a run are read; runs that read them in the same way should have the same."""
    import tomllib

    settings: Record = tomllib.loads(run.experiment)
    own = [settings.get(name) for name in ("data", "public", "partition")]
    return repr(
        [own, run.run["data"]["kind"], run.run["seed"]]
    )  # a seed draws rows and their order


def _by(runs: Sequence[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _listed(groups: dict[Any, list[Run]]) -> str:
    return "; ".join(f"{value} ({_named(runs)})" for value, runs in groups.items())


def _named(runs: Sequence[Run]) -> str:
    more = len(runs) - MOST
    labels = ", ".join(run.label for run in runs[:MOST])
    return f"{labels} and {more} more" if more > 0 else labels
