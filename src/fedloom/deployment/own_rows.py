"""The rows that a client's own file names, read as they are."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.data.examples import Example
from fedloom.data.loading import load_examples
from fedloom.data.sources import DataSettings
from fedloom.deployment.client_file import OwnData
from fedloom.randomness import generator


def own_rows(data: OwnData) -> Sequence[Example]:
    """Read all rows of a client, as ``fedloom client check`` does.

    Args:
        data: ``[data]`` of the client's file.

    Raises:
        DataError: They cannot be read.
    """
    settings = DataSettings(**data.model_dump(exclude={"share"}, exclude_unset=True))
    return load_examples(settings, generator(0, "data"), hold_out=False).train
