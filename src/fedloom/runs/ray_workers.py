"""A run's workers on Ray: how many there are, and what each builds and compares first.

Nodes need not be alike, so a worker compares before it builds: the packages that shape results, the kind
of device, and then, as any worker, digests of model and rows.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from fedloom.accounting.cores import available_cores
from fedloom.engines.in_process import SimulationEngine
from fedloom.engines.ray_pool import Needs, RayCluster, RayPool
from fedloom.engines.workers import WorkersEngine
from fedloom.errors import FedloomError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.assembly import RunComponents
from fedloom.runs.observers import RunObserver
from fedloom.runs.records import versions
from fedloom.runs.workers import (
    HostProcess,
    Workers,
    WorkerTask,
    build_engine,
    host_process,
    packed_task,
    task_with_digests,
    with_workers,
    worker_memory,
)

LOCAL = "local"
"""In place of an address: Ray is started on this machine for the run alone."""

PROCESS = 600e6
"""Bytes that an actor's process takes before it loads a model, estimated."""


@contextlib.contextmanager
def worker_source(asked: Workers, ray: str | None) -> Iterator[HostProcess | RayCluster | None]:
    """Begin to start what workers come from, if there may be any; end it with them.

    Args:
        asked: How many workers, or "auto".
        ray: Address of a Ray cluster, or "local"; ``None``: workers are processes of this machine.

    Raises:
        SettingsError: Ray is not installed, or the address is none.
        ConnectionFailed: Ray does not answer, or does not start.
    """
    if ray is None:
        with host_process(asked) as host:
            yield host
        return
    cores = available_cores() if asked == "auto" else asked
    cluster = RayCluster(None if ray == LOCAL else ray, cores)
    try:
        yield cluster
    finally:
        cluster.close()


def with_workers_of(
    parts: RunComponents,
    asked: Workers,
    source: HostProcess | RayCluster | None,
    task: WorkerTask,
    observer: RunObserver,
) -> RunComponents:
    """Have workers work on a run's clients, if any were asked for; see :func:`worker_source`."""
    if isinstance(source, RayCluster):
        return with_ray(parts, asked, source, task_with_digests(task, parts), observer)
    return with_workers(parts, asked, source, task, observer)


def with_ray(
    parts: RunComponents,
    asked: Workers,
    cluster: RayCluster,
    task: WorkerTask,
    observer: RunObserver,
) -> RunComponents:
    """Have actors of Ray work on a run's clients.

    Args:
        parts: What the run has.
        asked: How many actors; "auto": one for each CPU or GPU, as far as a round has clients.
        cluster: Where.
        task: What ``parts`` were made of, with digests.
        observer: Told what is done.

    Raises:
        SettingsError: There is no room for as many.
        FedloomError: An actor could not be started, or has other packages, rows or weights.
    """
    if parts.row_privacies and cluster.address is not None and not task.experiment.privacy.seeded:
        raise SettingsError(
            [
                'privacy.unit = "row": the key of the noise would travel to other machines, and who has '
                "it can subtract the noise: run it on this machine (without --ray-address)"
            ]
        )
    needs = _needs(parts, asked, cluster, task.experiment)
    size = _number(parts, asked, cluster, needs, task.experiment)
    nodes = len(cluster.nodes())
    observer.stage(
        f"starting {size} worker{'s' if size > 1 else ''} on Ray ({nodes} node{'s' if nodes > 1 else ''})"
    )
    content = pickle.dumps((_facts(parts.model.device), packed_task(task)))
    pool = RayPool(cluster, built_on_node, content, size, needs)
    return replace(parts, engine=WorkersEngine(parts.local, pool))


def _needs(
    parts: RunComponents, asked: Workers, cluster: RayCluster, experiment: Experiment
) -> Needs:
    """Return what a worker takes up of its node."""
    weights, each = worker_memory(parts, experiment, PROCESS)
    if parts.model.device.type == "cpu":
        return Needs(weights + each)
    gpus = sum(int(own["Resources"].get("GPU", 0)) for own in cluster.nodes().values())
    if not gpus:
        raise SettingsError(
            [
                f"--engine ray: the run computes on {parts.model.device}, and Ray knows of no GPU there"
            ],
            "the command",
        )
    on_one = 1 if asked == "auto" else -(-asked // gpus)
    return Needs(PROCESS, int(10_000 / on_one) / 10_000)  # Ray counts in ten-thousandths


def _number(
    parts: RunComponents,
    asked: Workers,
    cluster: RayCluster,
    needs: Needs,
    experiment: Experiment,
) -> int:
    """Return how many actors there will be.

    Raises:
        SettingsError: There is no room for as many.
    """
    room = cluster.room(needs)
    if room and asked == "auto":
        return min(room, experiment.federation.cohort_size)
    if room and asked != "auto" and asked <= room:
        return asked
    has: dict[str, float] = {}
    for own in cluster.nodes().values():
        for name in ("CPU", "GPU", "memory"):
            has[name] = has.get(name, 0.0) + own["Resources"].get(name, 0.0)
    gpus = f", {has['GPU']:.0f} GPUs" if parts.model.device.type != "cpu" else ""
    raise SettingsError(
        [
            f"--workers {asked}: a worker takes a CPU and about {needs.memory / 1e9:.1f} GB (derived) of "
            f"its node; Ray has {has['CPU']:.0f} CPUs{gpus} and {has['memory'] / 1e9:.1f} GB on "
            f"{len(cluster.nodes())} nodes: at most {room} fit"
        ],
        "the command",
    )


def built_on_node(content: bytes) -> SimulationEngine:
    """Build a worker's engine on whatever node this is.

    Raises:
        FedloomError: The node differs from the machine of the run in what shapes results.
    """
    torch.set_num_threads(1)
    facts, packed = pickle.loads(content)
    device = torch.device(
        "cuda" if "cuda" in facts["device"] and torch.cuda.is_available() else "cpu"
    )
    own = _facts(device)
    differ = [
        f"{name} {own.get(name)}, not {facts[name]}"
        for name in facts
        if own.get(name) != facts[name]
    ]
    if differ:
        raise FedloomError(
            f"this node has {'; '.join(differ)}: nodes need the same packages and devices as the machine "
            "of the run, or results would depend on who computes them"
        )
    return build_engine(pickle.loads(packed))


def _facts(device: torch.device) -> Mapping[str, str]:
    """Return what must be equal on all nodes for the same bits."""
    if device.type == "cuda":
        kind = f"cuda, {torch.cuda.get_device_name(device)}"
    else:
        kind = f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return {**versions(), "device": kind}
