"""Workers that live in the test's own process, to have them answer in any order and end at any moment."""

import copy

import numpy as np

from fedloom.engines.workers import WorkersEngine, carry_out
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data


class PoolHere:
    """A pool whose workers are engines of this process.

    Attributes:
        dies: For each request that is received, whether its worker ends without an answer.
        idle_dies: How many workers end while they have nothing to do.
        handlers: Handlers that take the place of the method's, by action.
    """

    def __init__(self, settings, size, seed=0, dies=(), idle_dies=0, handlers=None):
        self.ready, self.dies, self.idle_dies = range(size), list(dies), idle_dies
        self._settings, self._handlers = settings, handlers or {}
        self._engines = [self._make() for _ in range(size)]
        self._asked = {}
        self._rng = np.random.default_rng(seed)
        self.order, self.units = [], []

    def _make(self):
        engine = assemble(self._settings, partition_data(self._settings)).local
        engine.handlers = {**engine.handlers, **self._handlers}
        return engine

    def send(self, worker, request):
        assert worker not in self._asked, "a worker has one request at a time"
        self._asked[worker] = request
        self.order += request.clients
        self.units.append(request.clients)

    def receive(self):
        idle = [own for own in self.ready if own not in self._asked]
        if self.idle_dies and idle:
            self.idle_dies -= 1
            self._engines[idle[0]] = self._make()
            return idle[0], "by signal 9"
        worker = int(self._rng.choice(sorted(self._asked)))
        request = self._asked.pop(worker)
        if self.dies and self.dies.pop(0):
            self._engines[worker] = self._make()
            return worker, "by signal 9"
        sent = copy.deepcopy(request)  # as through a pipe: no tensor is the same object
        return worker, copy.deepcopy(carry_out(self._engines[worker], sent))


def with_pool(settings, size=2, **others):
    """Return a run's parts whose engine has workers in this process, and their pool."""
    from dataclasses import replace

    parts = assemble(settings, partition_data(settings))
    pool = PoolHere(settings, size, **others)
    return replace(parts, engine=WorkersEngine(parts.local, pool)), pool
