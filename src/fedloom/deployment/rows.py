"""A client's rows: those of its own file, or its part of the experiment's partition."""

from __future__ import annotations

from fedloom.deployment.client_file import OwnFile
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partitioning import OwnRows, PartitionedData, only, partition_data


def partitioned(
    experiment: Experiment, own: OwnFile, client: int, classes: tuple[str, ...] | None
) -> PartitionedData:
    """Return a client's rows.

    Args:
        experiment: As the client takes part in it (``policy_enforcement.py``).
        own: The client's file.
        client: The client's number.
        classes: Class names in the order of their ids, as the coordinator has them; ``None`` for those
            that the rows have.

    Raises:
        DataError: The rows cannot be used; the text may quote them, and names files of this machine.
    """
    if own.data is not None and own.data.share == "experiment":
        return only(partition_data(experiment), client)
    return partition_data(experiment, own=OwnRows(client, experiment.data, classes))
