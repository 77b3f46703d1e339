"""The best round of a run by a held-out metric, and when no later one is waited for.

As transformers' ``load_best_model_at_end`` and ``EarlyStoppingCallback``: a round is the best if its
value is strictly better than that of all before; the run ends once so many evaluations in a row were not
better than the best by more than a threshold. The start, round 0, is no candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.tensors import State


@dataclass
class BestRound:
    """What is known of the best round so far.

    Attributes:
        metric: Name of the held-out metric, on the global set.
        higher_is_better: Its direction.
        patience: Evaluations in a row without a better one after which the run ends; ``None`` for all
            rounds.
        threshold: What a value has to be better by, to count as better there.
        round: The best so far, 0 before the first.
        value: Its metric; ``None`` where none was a number yet.
        state: The state after it.
        waited: Evaluations in a row that were not better.
    """

    metric: str
    higher_is_better: bool
    patience: int | None = None
    threshold: float = 0.0
    round: int = 0
    value: float | None = None
    state: State | None = None
    waited: int = 0

    @property
    def over(self) -> bool:
        """Whether the run ends."""
        return self.patience is not None and self.waited >= self.patience

    def see(self, round: int, metrics: Mapping[str, float] | None, state: State) -> None:
        """Take the metrics of a round, ``None`` where it was not evaluated, and the state after it."""
        if metrics is None or round == 0:
            return
        value = metrics.get(self.metric, math.nan)
        gain = self._gain(value)
        self.waited = 0 if gain > self.threshold else self.waited + 1
        if gain > 0 or self.state is None:
            self.value = None if math.isnan(value) else value
            tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
            self.round, self.state = round, State(tensors, state.numbers)

    def _gain(self, value: float) -> float:
        """Return by how much a value is better than the best; below 0 where it is no number."""
        if math.isnan(value):
            return -math.inf
        if self.value is None:
            return math.inf
        return value - self.value if self.higher_is_better else self.value - value

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it beside the state; plain JSON."""
        return {"round": self.round, "value": self.value, "waited": self.waited}

    def restore(self, saved: Mapping[str, Any], state: State | None) -> None:
        """Go on from what :meth:`saved` returned, and the state that was beside it."""
        self.round, self.value = saved["round"], saved["value"]
        self.waited, self.state = saved["waited"], state

    def record(self, last: int) -> dict[str, Any]:
        """Return what ``summary.json`` says of it.

        Args:
            last: The last round that was made.
        """
        shown = "no number" if self.value is None else f"{self.value:.4f}"
        text = f"The adapter is that of round {self.round}, the best by held-out {self.metric} ({shown})"
        if self.over:
            which = "the last one was" if self.waited == 1 else f"the last {self.waited} were"
            text += f"; the run ended after round {last}, as {which} not better"
            text += f" by more than {self.threshold:g}" if self.threshold else ""
        return {
            "round": self.round,
            "metric": self.metric,
            "value": self.value,
            "last_round": last,
            "stopped_early": self.over,
            "text": text + ".",
        }
