"""How many clients of a simulation are trained in lockstep the fastest, by measuring (``tuning.py``).

What is timed is the first request of a round, as the run's own engine and method carry it out: clients,
the same in every timing, are worked on in cohorts of some size. Only the optimizer steps are fewer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

from fedloom.accounting.ledger import Ledger
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import ModelError
from fedloom.experiment.experiment import Experiment
from fedloom.experiment.simulation import SimulationSettings
from fedloom.federation.contract import begin
from fedloom.federation.presence import NOBODY_YET
from fedloom.federation.protocol import Cohort
from fedloom.methods.contract.soundness import first_state
from fedloom.models.stacked_lora import reason_against
from fedloom.runs.assembly import RunComponents
from fedloom.storage.client_store import ClientStore
from fedloom.training.cohort import MOST, cohort_size
from fedloom.training.results import reported
from fedloom.training.settings import TrainingSettings
from fedloom.wire.messages import Exchange

COHORT = "cohort"


@dataclass
class CohortBench:
    """The first request of a round to some clients, ready to be timed.

    Attributes:
        engine: The run's.
        exchange: What its method asks.
        training: ``[simulation]``, which says how many are trained together.
        steps: Optimizer steps of each client.
    """

    engine: SimulationEngine
    exchange: Exchange
    training: SimulationSettings
    steps: int = 1
    _loss: float = float("nan")

    def run(self, settings: SimulationSettings) -> tuple[float, float, int]:
        """Return seconds, mean loss and tokens of the steps of all clients.

        Raises:
            ModelError: A client could not carry the request out.
            MemoryError: Memory does not suffice for so many together.
        """
        engine = replace(
            self.engine,
            training=_of_steps(self.engine.training, self.steps),
            cohort=settings.cohort,
            ledger=Ledger(),
            store=ClientStore(),
            shares=dict(self.engine.shares),
            alone=set(self.engine.alone),
        )
        began = time.perf_counter()
        answers = list(engine.exchange(self.exchange))
        seconds = time.perf_counter() - began
        losses = []
        for answer in answers:
            if answer.data is None:
                raise ModelError(f"client {answer.client} cannot be timed: {answer.error}")
            metrics = self.exchange.read_reply(answer.client, answer.data).metrics
            losses += [metrics["loss"]] if "loss" in metrics else []
        self._loss = fmean(losses) if losses else 0.0
        return seconds, self._loss, sum(cost.tokens for cost in engine.ledger.costs)

    def loss(self, settings: SimulationSettings) -> float:
        """Return the mean loss of the steps that were timed last."""
        return self._loss


def cohort_bench(experiment: Experiment, parts: RunComponents) -> CohortBench | str:
    """Return what is timed, or why clients are not trained together whatever the size.

    References of the clients that are asked are computed, so that no timing has them.
    """
    engine = parts.local
    models = {id(own.model): own.model for own in engine.resources.values()}
    if reasons := sorted({reason_against(model) for model in models.values()} - {""}):
        return f"clients are trained one by one: {'; '.join(reasons)}"
    asked = min(experiment.federation.cohort_size, len(engine.sizes()), MOST)
    if asked < 2:
        return "a round has one client"
    if engine.drivers:
        return (
            "clients are trained one by one, as row-level privacy hides each one's rows by itself"
        )
    if _by_width(experiment, parts) == 1 and experiment.simulation.cohort == 1:
        return "one client's step fills a pass of this model already"
    presence = NOBODY_YET.begun(1, engine.membership(), engine.sizes(), {})
    cohort = Cohort(
        1,
        tuple(sorted(engine.sizes())[:asked]),
        presence,
        experiment.training.learning_rate,
        reported=reported(parts.objective),
    )
    steps, exchange = begin(parts.method, first_state(parts.method, parts.initial), cohort)
    steps.close()
    first = dict(
        islice(exchange.requests.items(), asked)
    )  # an asynchronous method names all clients
    exchange = replace(exchange, requests=first, buffered=None)
    bench = CohortBench(engine, exchange, experiment.simulation)
    try:
        for client in first:
            engine.add_reference(1, client)
        _, _, tokens = bench.run(experiment.simulation)
    except ModelError as error:
        return str(error)
    return bench if tokens else "the method's first request of a round has no client train"


def cohort_candidates(experiment: Experiment, parts: RunComponents) -> list[int | str]:
    """Return sizes that are worth a timing, the present one first: it, 1, and about what "auto" takes."""
    most = min(experiment.federation.cohort_size, MOST)
    auto, now = _by_width(experiment, parts), experiment.simulation.cohort
    sizes = sorted({min(size, most) for size in (1, 2, max(1, auto // 2), auto, 2 * auto)})
    return [now, *(size for size in sizes if size != now)]


def _by_width(experiment: Experiment, parts: RunComponents) -> int:
    """Return what "auto" takes of the model that most clients have."""
    engine = parts.local
    shares = [engine.shares[client] for client in engine.sizes()]
    model = engine.resources[min(engine.sizes())].model
    return cohort_size("auto", model, shares, experiment.training.batch_size)


def _of_steps(training: TrainingSettings, steps: int) -> TrainingSettings:
    """Return settings with which a client makes so many steps in a round."""
    amounts = ("local_epochs", "local_examples", "local_tokens", "total_epochs")
    return training.model_copy(
        update={**dict.fromkeys(amounts), "local_steps": steps, "amount_per": "model"}
    )
