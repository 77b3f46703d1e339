"""The secret of a run's noise: a file of its own beside the run folder, for as long as the run lasts."""

from __future__ import annotations

from pathlib import Path

from fedloom.experiment.experiment import Experiment
from fedloom.privacy.noise import NoiseSource

ENDING = ".noise-key"
"""Of the file's name, after that of the run folder: in neither folder nor checkpoint."""

NAME = "rows"
"""What names a run's noise: the key is of one run alone."""


def key_file(folder: Path) -> Path:
    """Return where the key of the run in ``folder`` is."""
    return folder.absolute().with_name(folder.name + ENDING)


def new_noise(experiment: Experiment, folder: Path) -> NoiseSource | None:
    """Return the noise of a run that begins, ``None`` for one without row-level privacy or from the seed.

    Raises:
        OutputError: Its key cannot be written.
    """
    if experiment.privacy.unit != "row" or experiment.privacy.seeded:
        return None
    forget_noise(folder)  # of a run that was deleted
    return NoiseSource.kept(key_file(folder), NAME, create=True)


def kept_noise(experiment: Experiment, folder: Path, *, finished: bool) -> NoiseSource | None:
    """Return the noise of a run that is continued; see :func:`new_noise`.

    Args:
        experiment: The run's.
        folder: Its folder.
        finished: Whether nothing is trained any more, so that any noise will do.

    Raises:
        CheckpointError: The key is missing or damaged.
    """
    if experiment.privacy.unit != "row" or experiment.privacy.seeded:
        return None
    if finished:
        return NoiseSource.fresh(NAME)
    return NoiseSource.kept(key_file(folder), NAME, create=False)


def forget_noise(folder: Path) -> None:
    """Delete the key of a run that has ended: nobody can subtract its noise any more."""
    key_file(folder).unlink(missing_ok=True)
