"""The folder of a new run, and what can be checked before its data and model are read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedloom.data.reader import require_files
from fedloom.display.untrusted_text import short
from fedloom.errors import (
    DataError,
    OutputError,
)
from fedloom.experiment.experiment import Experiment
from fedloom.federation.engine import RemoteEngine
from fedloom.methods import METHODS
from fedloom.models.load import require_reachable
from fedloom.runs.answer_order import order_of_answers
from fedloom.runs.model_building import of_server
from fedloom.storage import run_folder as names
from fedloom.storage.files import remove_temporary
from fedloom.storage.run_folder import RunFolder


@contextlib.contextmanager
def new_folder(experiment: Experiment) -> Iterator[RunFolder]:
    """Create the run folder, and take its lock.

    Raises:
        OutputError: It holds something already, another run begins there, or it cannot be made.
    """
    chosen, path = experiment.output.folder, free_folder(experiment)
    apart = experiment.privacy.amplification
    while True:
        try:
            remove_temporary(path, names.EXPERIMENT)  # of a run that was killed before it began
            _require_free(experiment, path)
            path.mkdir(parents=True, exist_ok=bool(chosen))
            path.chmod(0o700)  # held-out prompts and answers are in it
            if apart:
                own = names.own_folder_of(path)
                own.mkdir(mode=0o700, exist_ok=bool(chosen))
                own.chmod(0o700)
            break
        except FileExistsError as error:  # another run was quicker
            if chosen:  # a link that leads nowhere
                raise OutputError(
                    f"output.folder {chosen!r} is there and is not a folder; choose another"
                ) from error
            path = free_folder(experiment)
        except OSError as error:
            raise OutputError(
                f"cannot make the run folder {short(str(path), 300)}: {error.strerror}; choose another "
                "output.folder"
            ) from error
    folder = RunFolder(names.own_folder_of(path) if apart else path)
    with folder.locked():
        _require_free(experiment, path)
        if apart:
            folder.write_text(names.NOTICE, SERVER_ONLY)
        yield folder


SERVER_ONLY = """\
Only the server of this run may read this folder. Its records name the clients of each round, and epsilon
was computed as if nobody knew who was drawn (privacy.amplification = true). Hand out the folder beside
it, of the same name without .private, and nothing of this one. The server needs it to resume the run.
"""
"""Content of the notice in a server's own folder."""


def discard(folder: RunFolder) -> None:
    """Remove the folder of a run that did not begin, and that of what it would have released."""
    released = folder.released
    for path in (folder.path, *([released] if released is not None else [])):
        shutil.rmtree(path, ignore_errors=True)


def _require_free(experiment: Experiment, path: Path) -> None:
    """Check that nothing is in the folders of a run that were chosen.

    Raises:
        OutputError: Something is.
    """
    chosen = experiment.output.folder
    _require_empty(path, chosen)
    if experiment.privacy.amplification:
        _require_empty(names.own_folder_of(path), chosen and str(names.own_folder_of(path)))


def _require_empty(path: Path, chosen: str | None) -> None:
    """Check that nothing is in a folder that was chosen.

    Raises:
        OutputError: Something is.
    """
    if not chosen or not path.exists():
        return
    if not path.is_dir() or any(own.name != names.LOCK for own in path.iterdir()):
        raise OutputError(
            f"output.folder {chosen!r} is not empty: choose another, or go on with "
            f"fedloom run --resume {chosen}"
        )


def require_startable(experiment: Experiment) -> None:
    """Raise mistakes in a run that can be found before its data and model are read.

    Raises:
        OutputError: Its folder holds something already.
        DataError: A data file is not there or cannot be opened, or rows are not where they are needed.
        SettingsError: The trace of devices has mistakes.
        ModelError: The model's folder is none.
    """
    if experiment.output.folder:
        _require_free(experiment, free_folder(experiment))
    require_rows(experiment, None)
    require_files(experiment.data)
    order_of_answers(experiment)
    for path in (of_server(experiment).model.path, *_models(experiment)):
        require_reachable(path)


def _models(experiment: Experiment) -> set[str]:
    """Return the models of groups of clients."""
    groups = experiment.clients.groups.values()
    return {experiment.model.path, *(group.model for group in groups if group.model)}


def free_folder(experiment: Experiment) -> Path:
    """Return the folder that a run of an experiment goes to: as set, or a new one in ``runs``."""
    path = Path(experiment.output.folder or Path("runs") / experiment.name)
    if experiment.output.folder:
        return path
    number, candidate = 2, path
    while candidate.exists() or names.own_folder_of(candidate).exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate


def require_rows(experiment: Experiment, remote: RemoteEngine | None) -> None:
    """Check that this engine has the rows where the experiment needs them, and can do what is asked."""
    if experiment.data.is_private and remote is None:
        raise DataError(
            'data.source = "clients": the rows are on other machines; use --engine flower'
        )
    if remote is not None and METHODS[experiment.method.name][1].pools_data:
        raise DataError(
            f"method.name = {experiment.method.name!r} puts all rows together: run it in one process"
        )
