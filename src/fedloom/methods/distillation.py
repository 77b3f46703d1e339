"""KD-FedLLM: clients and server teach each other by their logits on public data; no parameter travels.

Source: arXiv 2501.04436 (second framework), with the rules of FedMKT (Fan et al. 2024,
https://arxiv.org/abs/2406.02224) and the treatment of missing entries of arXiv 2509.01750. The order of
a round is a reconstruction after the former's description:

1. each client trains its own adapter on its own rows, and sends what it says about public rows;
2. the server puts the answers together and distils them into its own model, which may be larger or of
   another architecture;
3. the server sends back what its model says now (or the clients' consensus), and clients distil that.

Public rows are drawn from (seed, "public", round), which every party knows, so no ids travel. A client
keeps its adapter from round to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from fedloom.aggregation.soft_labels import Rule, SoftLabels, combine
from fedloom.data.public import PublicRows
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.logit_exchange import (
    TAKEN,
    Lesson,
    LogitExchange,
    exchanging_logits,
)
from fedloom.methods.bases.logit_wire import LogitSettings, texts_of, true_entries
from fedloom.methods.contract.averaging import weights_of
from fedloom.methods.contract.checks import TASKS
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import Reveal, Variant
from fedloom.settings.schema import NamedSettings
from fedloom.wire.messages import Reply


class DistillationSettings(LogitSettings):
    """``[method] name = "distillation"``."""

    name: Literal["distillation"] = "distillation"
    rule: Rule = "mean"
    """How the server puts answers together: mean of logits or of probabilities (mean_prob), weighted by
    rows; by each answer's entropy or confidence; or the answer with the lowest loss, text by text, which
    needs public.labelled."""


class DistillationMethod(LogitExchange):
    """Logits travel: up what clients say, down what the server's model has learnt from it."""

    declares = exchanging_logits(
        "KD-FedLLM",
        "https://arxiv.org/abs/2501.04436",
        "reconstructed",
        "rules of FedMKT (2406.02224)",
    )
    reveals: frozenset[Reveal] = frozenset({"logits"})
    taken = ("rule", *TAKEN)

    def __init__(self, settings: DistillationSettings) -> None:
        """Keep the settings."""
        self.settings, self.rule = settings, settings.rule

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what the rule does not go with."""
        yield from super().check(view)
        labelled = view.public is not None and view.public.labelled
        if view.method.rule == "lowest_loss" and not labelled:
            yield 'method.rule = "lowest_loss" needs public.labelled = true'

    @classmethod
    def variants(cls, own: NamedSettings | None, view: ExperimentView) -> Iterator[Variant]:
        """Yield it as it is set, or with the likeliest tokens alone."""
        if view.objective_name not in TASKS:
            return
        logits = DistillationSettings(top_k=None if view.objective_name == "classification" else 32)
        logits = own if isinstance(own, DistillationSettings) else logits
        kept = f"top {logits.top_k} logits" if logits.top_k else "all logits"
        remark = "It needs public rows, and learns no more than these can show."
        yield Variant(f"KD-FedLLM, {kept}, {logits.encoding}", logits, remark=remark)

    def lesson(
        self,
        answers: Sequence[SoftLabels],
        replies: Sequence[Reply],
        public: PublicRows,
        cohort: Cohort,
    ) -> Lesson:
        """Return the answers put together by the rule."""
        head = self.server.objective.head
        consensus = combine(
            answers,
            weights_of(replies, by_rows=True),
            self.rule,
            labels=true_entries(public, head),
            groups=texts_of(public.share),
        )
        return Lesson(consensus, self.distillation(public, head), consensus)
